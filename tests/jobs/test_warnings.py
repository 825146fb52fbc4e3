"""Warnings on their way from a file to the manifest and the terminal, and what strict mode makes of them."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medseg.bundle.catalog import Bundle
from medseg.errors import CaseError, RequestError
from medseg.jobs import api
from medseg.jobs.folds import make_folds
from medseg.jobs.launch import _gather_warnings
from medseg.jobs.runner import _prepared
from medseg.manifest import Manifest
from medseg.notices import CaseWarning, collect, warn
from medseg.types import Case

SHAPE = (20, 28, 26)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def _image(path: Path, **fields: Any) -> Path:
    values = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.int32)
    image = nibabel.Nifti1Image(values, AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    for name, value in {"vox_offset": 352, **fields}.items():
        image.header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.header.binaryblock + b"\0" * 4 + values.tobytes(order="F"))
    return path


def _nrrd(path: Path) -> None:
    lines = ["NRRD0004", "type: float", "dimension: 3", "space: left-posterior-superior", "sizes: 20 28 26"]
    lines += ["space directions: (2,0,0) (0,2,0) (0,0,2)", "endian: little", "encoding: raw", "", ""]
    values = np.random.default_rng(0).normal(100, 20, SHAPE).astype("<f4")
    path.write_bytes("\n".join(lines).encode() + values.tobytes(order="F"))


def _rounded(path: Path) -> None:
    content = bytearray(_image(path).read_bytes())
    content[352:356] = np.int32(2**24 + 1).tobytes()
    path.write_bytes(content)


# Name of the image -> its code, and how it is written.
KINDS: Mapping[str, tuple[str, Callable[[Path], object]]] = {
    "conflict.nii": ("sform-qform-conflict", lambda path: _image(path, qoffset_x=32)),
    "mirrored.nii": ("sform-qform-conflict", lambda path: _image(path, quatern_d=1)),
    "pixdim.nii": ("spacing-assumed", lambda path: _image(path, sform_code=0, pixdim=[1, 2, 0, 2, 0, 0, 0, 0])),
    "qfac.nii": ("header-repaired", lambda path: _image(path, sform_code=0, pixdim=[5, 2, 2, 2, 0, 0, 0, 0])),
    "rounded.nii": ("values-rounded", _rounded),
    "origin.nrrd": ("origin-assumed", _nrrd),
    "sound.nii": ("", _image),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (_, write) in KINDS.items():
        write(folder / name)
    return folder


def _cases(output: Path) -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in json.loads((output / "manifest.json").read_text())["cases"]}


def test_each_kind_is_in_the_record_of_its_case_and_printed_once(
    trained: Bundle, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = api.predict(trained.root, images, tmp_path / "out", overlay=True)
    assert manifest.exit_code == 0
    assert manifest.warnings == []
    for name, case in _cases(tmp_path / "out").items():
        code = KINDS[name][0]
        assert [(entry["code"], entry["file"]) for entry in case["warnings"]] == ([(code, name)] if code else [])
    ours = [record for record in caplog.records if record.name.startswith("medseg.")]
    assert len(ours) == len(KINDS) - 1


def test_strict_mode_fails_each_of_these_cases_and_writes_nothing_for_them(
    trained: Bundle, images: Path, tmp_path: Path
) -> None:
    manifest = api.predict(trained.root, images, tmp_path / "out", strict=True)
    assert manifest.exit_code == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "sound.nii"]
    for name, case in _cases(tmp_path / "out").items():
        code = KINDS[name][0]
        assert case["status"] == ("failed" if code else "done")
        assert f"({code})" in (case["error"] or "()")


def _with_conflict(path: Path) -> str:
    image = nibabel.load(path)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine @ np.diag([1, -1, 1, 1]), 1)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
    return path.name


@pytest.fixture
def conflicting(tiny_data: Path, tmp_path: Path) -> tuple[Path, str, str]:
    """The tiny data set with a conflict in the image of a training case and in the label of the validation case."""
    folder = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    listing = json.loads((folder / "dataset.json").read_text())
    image = _with_conflict(folder / listing["training"][0]["image"])
    return folder, image, _with_conflict(folder / listing["validation"][0]["label"])


def test_evaluate_warns_of_labels(trained_copy: Bundle, conflicting: tuple[Path, str, str], tmp_path: Path) -> None:
    folder, _, label = conflicting
    (case,) = api.evaluate(trained_copy.root, folder, output=tmp_path / "a").cases.values()
    assert [(warning.code, warning.file) for warning in case.warnings] == [("sform-qform-conflict", label)]
    (case,) = api.evaluate(trained_copy.root, folder, output=tmp_path / "b", strict=True).cases.values()
    assert case.status == "failed"
    assert "(sform-qform-conflict)" in str(case.error)


@pytest.mark.parametrize("settings", [{"num_workers": 0}, {"num_workers": 1, "cache_memory": "0"}], ids=str)
def test_train_warns_of_images_and_labels(
    trained_copy: Bundle, conflicting: tuple[Path, str, str], settings: dict[str, Any]
) -> None:
    folder, image, label = conflicting
    options: dict[str, Any] = {"overwrite": True, "settings": {"max_epochs": 2, "val_interval": 2, **settings}}
    manifest = api.train(trained_copy.root, folder, **options)
    assert sorted((warning.code, warning.file) for warning in manifest.warnings) == [
        ("sform-qform-conflict", name) for name in sorted({image, label})
    ]
    content = json.loads((trained_copy.root / "runs" / "train" / "manifest.json").read_text())
    assert len(content["warnings"]) == 2
    with pytest.raises(CaseError, match="sform-qform-conflict"):
        api.train(trained_copy.root, folder, strict=True, **options)


def test_what_reading_ahead_warns_of_belongs_to_the_case_that_is_read() -> None:
    threads: list[threading.Thread] = []
    following = threading.Event()

    def preprocessing(entry: dict[str, Any]) -> dict[str, Any]:
        threads.append(threading.current_thread())
        warn(logging.getLogger("medseg.test"), "identity-affine", "read", entry["image"])
        if entry["name"] == "b":
            following.set()
        return entry

    cases = [Case(name, (f"{name}.nii",)) for name in "ab"]
    found = {}
    for case, data in zip(cases, _prepared(preprocessing, cases, ahead=True), strict=True):
        with collect(case.name) as found[case.name]:
            assert following.wait(10)  # the second case was read while the first is at work
            assert data()["name"] == case.name
    assert [[warning.file for warning in found[name]] for name in "ab"] == [["a.nii"], ["b.nii"]]
    assert threading.main_thread() not in threads


def test_a_resumed_run_with_other_settings_says_that_it_starts_anew(
    trained: Bundle, images: Path, tmp_path: Path
) -> None:
    image, output = images / "sound.nii", tmp_path / "out"
    api.predict(trained.root, image, output)
    manifest = api.predict(trained.root, image, output, settings={"overlap": 0.0}, resume=True)
    (warning,) = manifest.warnings
    assert str(warning) == "manifest.json: the earlier run differs in its settings; no case is resumed"
    with pytest.raises(RequestError, match="resume-ignored"):
        api.predict(trained.root, image, output, resume=True, strict=True)


def test_images_without_a_label_are_in_no_fold(tmp_path: Path, assert_warns: Callable[..., None]) -> None:
    for folder, count in (("images", 3), ("labels", 2)):
        for number in range(count):
            _image(tmp_path / "data" / folder / f"case{number}.nii")
    assert_warns(lambda: make_folds(tmp_path / "data", 2, 0), "unlabeled-skipped", run=True)


def test_warnings_of_processes_that_train_together_join_the_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, other = CaseWarning("identity-affine", "read", "a.nii"), CaseWarning("identity-affine", "read", "b.nii")
    path = tmp_path / "manifest.json"
    Manifest("train", warnings=[first]).write(path)
    for rank, warnings in ((1, [first, other]), (2, [other])):
        (tmp_path / f"warnings_{rank}.json").write_text(json.dumps([warning.to_dict() for warning in warnings]))
    _gather_warnings(path, tmp_path)
    assert Manifest.read(path).warnings == [first, other]
    assert [record.getMessage() for record in caplog.records] == ["a.nii: read", "b.nii: read"]


@pytest.mark.slow
def test_two_processes_train_with_the_warnings_of_both_in_one_record(
    trained_copy: Bundle, conflicting: tuple[Path, str, str]
) -> None:
    folder, image, label = conflicting
    settings = {"max_epochs": 1, "val_interval": 1, "device_name": "cpu"}
    manifest = api.train(trained_copy.root, folder, overwrite=True, devices=2, settings=settings)
    assert {warning.file for warning in manifest.warnings} == {image, label}
    with pytest.raises(CaseError, match="sform-qform-conflict"):
        api.train(trained_copy.root, folder, overwrite=True, devices=2, settings=settings, strict=True)
