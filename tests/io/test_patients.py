"""Which cases are of one patient: by listing, DICOM number and name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from medseg.errors import RequestError
from medseg.io import patients
from medseg.io.patients import find_patients
from tests.io.dicom.conftest import make_series


def _folder(root: Path, names: list[str], split: dict[str, Any] | None = None) -> Path:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / f"{name}.png").write_bytes(b"x")
    if split is not None:
        (root / "split.json").write_text(json.dumps(split))
    return root


def _listed(root: Path, entries: list[dict[str, Any]]) -> Path:
    for entry in entries:
        for key in ("image", "label"):
            path = root / entry[key]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    (root / "dataset.json").write_text(json.dumps({"training": entries[:-1], "validation": entries[-1:]}))
    return root


def test_names_tell_patients_and_other_cases_stand_alone(tmp_path: Path) -> None:
    root = _folder(tmp_path, ["eye_01L", "eye_01R", "patient_7_a", "patient_7_b", "scan"])
    assert find_patients(root) == {
        "eye_01L": "eye_01L",
        "eye_01R": "eye_01L",
        "patient_7_a": "patient_7_a",
        "patient_7_b": "patient_7_a",
        "scan": "scan",
    }


def test_the_data_set_knows_better_than_names(tmp_path: Path) -> None:
    root = _folder(tmp_path, ["a_slice_1", "a_slice_2", "b"], {"patients": {"a_slice_1": "one", "b": "one"}})
    assert find_patients(root) == {"a_slice_1": "a_slice_1", "a_slice_2": "a_slice_2", "b": "a_slice_1"}


def test_entries_of_a_listing_name_patients_by_text_or_number(tmp_path: Path) -> None:
    names = ["x", "y", "z"]
    entries: list[dict[str, Any]] = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names]
    entries[0]["patient"], entries[2]["patient"] = 5, "5"
    root = _listed(tmp_path, entries)
    expected = {"x": "x", "y": "y", "z": "x"}
    assert find_patients(root) == expected
    assert find_patients(root / "dataset.json") == expected


def test_series_and_files_called_anything_tell_their_patient(tmp_path: Path) -> None:
    for number, patient in enumerate(("SECRET-1", "SECRET-2", "SECRET-1"), start=1):

        def name(ds: Dataset, _: int, patient: str = patient) -> None:
            ds.PatientID = patient

        make_series(tmp_path / f"images/all/{number}", shape=(6, 5, 2), series_number=number, edit=name)
    first = min((tmp_path / "images/all/1").iterdir())
    (tmp_path / "images/single").write_bytes(first.read_bytes())
    images = ["images/all::1", "images/all::2", "images/all::3", "images/single"]
    entries = [{"image": image, "label": f"labels/{place}.nii.gz"} for place, image in enumerate(images)]
    (tmp_path / "labels").mkdir()
    for entry in entries:
        (tmp_path / entry["label"]).write_bytes(b"x")
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    assert find_patients(tmp_path) == {
        "all::1": "all::1",
        "all::2": "all::2",
        "all::3": "all::1",
        "single": "all::1",
    }


def test_dicom_numbers_tell_patients_and_are_not_told_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _folder(tmp_path, ["a", "b", "c"])
    numbers = {"a": "SECRET-1", "b": "", "c": "SECRET-1"}
    monkeypatch.setattr(patients, "_patient_id", lambda image: numbers[image.stem])
    assert find_patients(root) == {"a": "a", "b": "b", "c": "a"}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([1], "expected an object"),
        ({"nobody": "x"}, "which has no image"),
        ({"a": [1]}, "expected a string or an integer"),
    ],
)
def test_unclear_entries_are_refused(tmp_path: Path, told: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        find_patients(_folder(tmp_path, ["a"], {"patients": told}))
