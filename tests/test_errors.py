"""Errors carry what programs decide by: a code, a path and data."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg import errors
from medseg.checks.subjects import find_subjects
from medseg.errors import (
    CODES,
    CaseError,
    GeometryError,
    MedsegError,
    RequestError,
    error_from_json,
    out_of_memory,
    shortened,
)
from medseg.io import load
from medseg.io.voxels import refuse_nonfinite

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MedsegError)]


def test_each_class_has_a_code_of_its_own_and_stands_in_the_tree() -> None:
    codes = {kind.code for kind in KINDS}
    assert len(codes) == len(KINDS)
    assert not codes & set(CODES)
    for kind in KINDS:
        assert kind.__name__ in str(errors.__doc__)
        assert f'"{kind.code}"' in str(errors.__doc__)


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_error_carries_survives_copies_and_other_processes(kind: type[MedsegError]) -> None:
    error = kind("wrong", code="memory", path="a/b.nii", found=3, expected=[1, 2])
    for other in (error, copy.copy(error), pickle.loads(pickle.dumps(error)), error_from_json(error.to_json())):
        assert type(other) is kind
        assert (str(other), other.code, other.path) == ("wrong", "memory", Path("a/b.nii"))
        assert other.data == {"found": 3, "expected": [1, 2]}


def test_an_error_without_more_has_the_code_of_its_class() -> None:
    error = GeometryError("sheared")
    assert (error.code, error.path, error.data) == ("geometry", None, {})
    assert isinstance(error, CaseError)


def test_an_unknown_class_becomes_the_base() -> None:
    content = {"type": "Path", "code": "x", "message": "m", "path": None, "data": {}}
    assert type(error_from_json(content)) is MedsegError


def test_memory_errors_of_every_source_are_known() -> None:
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error in (torch_error.value, MemoryError(), CaseError("no room", code="memory")):
        wrapped = RuntimeError("applying transform")
        wrapped.__cause__ = error
        assert out_of_memory(error)
        assert out_of_memory(wrapped)
    assert not out_of_memory(CaseError("its report says: out of memory"))


def test_nonfinite_voxels_are_counted() -> None:
    with pytest.raises(CaseError) as caught:
        refuse_nonfinite(np.array([np.nan, np.inf, 1.0, np.nan]), Path("a.nii"))
    assert (caught.value.code, caught.value.path) == ("nonfinite", Path("a.nii"))
    assert caught.value.data == {"nan": 2, "infinite": 1}


def test_channels_are_counted(tmp_path: Path) -> None:
    import nibabel as nib

    path = tmp_path / "a.nii.gz"
    nib.Nifti1Image(np.zeros((2, 3, 4, 5), np.int16), np.eye(4)).to_filename(path)
    with pytest.raises(CaseError) as caught:
        load(path)
    assert (caught.value.code, caught.value.path) == ("channels", path)
    assert caught.value.data == {"found": 5, "expected": 1}


def test_a_data_set_without_a_split_is_told_by_its_code(tmp_path: Path) -> None:
    from medseg.io import find_dataset

    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.nii.gz").touch()
    with pytest.raises(RequestError) as caught:
        find_dataset(tmp_path, "train")
    assert caught.value.code == "no-split"
    assert [finding.kind for finding in find_subjects(tmp_path).findings] == ["no split"]


def test_paths_in_messages_are_shortened(tmp_path: Path) -> None:
    error = CaseError(f"{tmp_path}/a/b.nii of {tmp_path} is damaged")
    assert shortened(error, tmp_path) == f"a/b.nii of {tmp_path.name} is damaged"


def test_missing_and_damaged_files_are_told_by_code_and_path(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.nii", tmp_path / "notes.txt"
    empty.touch()
    text.write_text("no image")
    for path, code in ((tmp_path / "none.nii", "missing"), (empty, "damaged"), (text, "format")):
        with pytest.raises(CaseError) as caught:
            load(path)
        assert (caught.value.code, caught.value.path) == (code, path)


def test_every_code_that_is_raised_is_listed() -> None:
    package = Path(errors.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in package.rglob("*.py")]
    raised = {code for source in sources for code in re.findall(r'Error\((?:[^()]|\([^()]*\))*code="([\w-]+)"', source)}
    assert raised >= {"memory", "missing", "nonfinite"}
    assert raised <= set(CODES)
