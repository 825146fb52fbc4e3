import os

import numpy as np
import pytest
from PIL import Image

from medseg.errors import CaseError, RequestError
from medseg.io import load, read_grid


@pytest.mark.parametrize("read", [load, read_grid])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("missing.nii.gz", "does not exist"),
        ("folder.nii", "is a folder"),
        ("text.txt", "has an unsupported format"),
        ("empty.nii", "is empty"),
        ("empty.png", "is empty"),
    ],
)
def test_what_is_no_readable_file_is_refused_by_name(tmp_path, read, name, part):
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    elif not name.startswith("missing"):
        (tmp_path / name).write_bytes(b"x" if name.endswith("txt") else b"")
    with pytest.raises(CaseError) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert part in str(error.value)


@pytest.mark.parametrize("read", [load, read_grid])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "a.nii.gz")
    with pytest.raises(CaseError, match="is a pipe or device"):
        read(tmp_path / "a.nii.gz")


def test_an_array_without_a_geometry_and_other_objects_are_refused():
    with pytest.raises(RequestError, match="needs its affine"):
        load(np.zeros(3))
    with pytest.raises(RequestError, match="Unsupported image type dict"):
        load({"image": "a.nii.gz"})


@pytest.mark.parametrize(
    ("failure", "part"), [(PermissionError(13, "Permission denied"), "Permission denied"), (MemoryError(), "memory")]
)
def test_failures_of_the_machine_are_case_errors_that_name_the_file(tmp_path, monkeypatch, failure, part):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr("medseg.io.formats.nifti.read", fail)
    path = tmp_path / "a.nii"
    path.write_bytes(b"x")
    with pytest.raises(CaseError, match=part) as error:
        load(path)
    assert str(path) in str(error.value)


def test_paths_may_be_relative_and_text(tmp_path, monkeypatch):
    Image.new("L", (3, 4)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert load("a.png").meta["filename_or_obj"] == str(tmp_path / "a.png")
