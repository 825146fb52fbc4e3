"""`medseg doctor` as a user meets it: tables, exit codes, records, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

Run = Callable[..., tuple[int, str, str]]


def write(path: Path, array: Any, shift: float = 0.0) -> Path:
    image = nib.Nifti1Image(array, None)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = 5 + shift
    image.header.set_zooms((2.0, 2.0, 2.0))
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    entries = []
    for number in range(3):
        rng = np.random.default_rng(number)
        write(root / "i" / f"c{number}.nii.gz", rng.integers(0, 900, (10, 12, 8)).astype(np.int16))
        marks = np.zeros((10, 12, 8), np.uint8)
        marks[2:5, 3:7, 1 : 4 + number] = 1
        write(root / "l" / f"c{number}.nii.gz", marks)
        entries.append({"image": f"i/c{number}.nii.gz", "label": f"l/c{number}.nii.gz"})
    listing = {"labels": {"0": "background", "1": "ball"}, "training": entries[:2], "validation": entries[2:]}
    (root / "dataset.json").write_text(json.dumps(listing))
    return root


@pytest.mark.parametrize("given", ["folder", "listing"])
def test_a_faultless_set_ends_with_0(medseg: Run, data: Path, given: str) -> None:
    code, out, _ = medseg("doctor", data if given == "folder" else data / "dataset.json")
    assert code == 0
    assert "3 cases" in out
    assert "0 errors, 0 warnings, 0 notes" in out


def test_errors_end_with_1_and_are_grouped(medseg: Run, data: Path, tmp_path: Path) -> None:
    for number in range(3):
        marks = np.zeros((10, 12, 8), np.uint8)
        marks[2:5, 3:7, 1 : 4 + number] = 1
        write(data / "l" / f"c{number}.nii.gz", marks, shift=4)
    record = tmp_path / "report.json"
    code, out, _ = medseg("doctor", data, "--json", record)
    assert code == 1
    assert "geometry mismatch: shifted (3)" in out
    assert "(2, 0, 0) voxels" in out
    content = json.loads(record.read_text())
    assert [case["image"]["shape"] for case in content["cases"]] == [[10, 12, 8]] * 3
    assert {item["kind"] for item in content["findings"]} == {"geometry mismatch: shifted"}


def test_many_findings_of_a_kind_do_not_flood(medseg: Run, data: Path) -> None:
    folder = data / "many"
    for number in range(50):
        write(folder / f"x{number:02}.nii.gz", np.full((4, 4, 4), number, np.int16))
    code, out, _ = medseg("doctor", folder)
    assert code == 0
    assert "constant image (50)" in out
    assert "and 47 more" in out
    assert "and 10 more; --json FILE lists all" in out
    assert len(out.splitlines()) < 60


def test_fix_writes_a_copy_and_a_record(medseg: Run, data: Path, tmp_path: Path) -> None:
    marks = np.asarray(nib.load(data / "l" / "c0.nii.gz").dataobj).astype(np.float32)
    write(data / "l" / "c0.nii.gz", marks)
    write(data / "l" / "c1.nii.gz", marks.astype(np.uint8)[::-1] * np.uint8(3), shift=4)
    code, out, err = medseg("doctor", data, "--fix", tmp_path / "fixed")
    assert code == 1
    assert "1 changes; 2 errors remain" in out
    assert "remains: geometry mismatch: shifted" in err
    record = json.loads((tmp_path / "fixed" / "changes.json").read_text())
    assert record["changes"] == [
        {"file": "l/c0.nii.gz", "what": "converted to integers", "before": "float32", "after": "uint8"}
    ]
    assert {item["kind"] for item in record["remaining"]} == {"geometry mismatch: shifted", "unknown label"}
    assert (tmp_path / "fixed" / "i" / "c0.nii.gz").read_bytes() == (data / "i" / "c0.nii.gz").read_bytes()


def test_a_repaired_set_ends_with_0(medseg: Run, data: Path, tmp_path: Path) -> None:
    array = np.asarray(nib.load(data / "i" / "c0.nii.gz").dataobj).astype(np.float32)
    array[0, 0, 0] = np.nan
    write(data / "i" / "c0.nii.gz", array)
    code, out, _ = medseg("doctor", data / "dataset.json", "--fix", tmp_path / "fixed")
    assert code == 0
    assert "1 changes; 0 errors remain" in out


def test_a_bundle_says_what_it_cannot_read(medseg: Run, data: Path) -> None:
    assert medseg("doctor", data, "--bundle", "hippocampus_mri_unet")[0] == 0
    code, out, _ = medseg("doctor", data, "--bundle", "gland_pathology_unet")
    assert code == 1
    assert "incompatible image (3)" in out


def _foreign(folder: Path, edit: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """Write a bundle whose input and knobs of training are changed."""
    image: dict[str, Any] = {"spatial_shape": [32, 32, 32], "num_channels": 1, "modality": "MR"}
    train: dict[str, Any] = {"label_mapping": {"0": 0, "1": 1}, "spacing": [1, 1, 1], "orientation": "RAS"}
    edit(image, train)
    labels = {"0": "background", "1": "ball"}
    formats = {"inputs": {"image": image}, "outputs": {"pred": {"channel_def": labels}}}
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": formats}))
    (folder / "configs" / "inference.json").write_text("{}")
    (folder / "configs" / "train.json").write_text(json.dumps(train))
    return folder


@pytest.mark.parametrize(
    "edit",
    [
        lambda image, train: train.update(label_mapping={"ball": 1}),
        lambda image, train: train.update(label_mapping={"²": 1}),
        lambda image, train: train.update(label_mapping={"1": "ball"}),
        lambda image, train: train.update(label_names=["ball"]),
        lambda image, train: train.update(orientation="RA"),
        lambda image, train: train.update(orientation=5),
        lambda image, train: train.update(spacing=[0, 0, 0]),
    ],
)
def test_knobs_of_another_form_in_foreign_bundles_do_not_count(
    medseg: Run, data: Path, tmp_path: Path, edit: Callable[..., Any]
) -> None:
    code, out, _ = medseg("doctor", data, "--bundle", _foreign(tmp_path / "other", edit))
    assert code == 0
    assert "3 cases" in out


@pytest.mark.parametrize(
    "edit",
    [
        lambda image, train: image.pop("spatial_shape"),
        lambda image, train: image.update(spatial_shape=3),
        lambda image, train: image.pop("num_channels"),
        lambda image, train: image.update(num_channels="one"),
    ],
)
def test_a_foreign_bundle_that_does_not_describe_its_input_is_refused(
    medseg: Run, data: Path, tmp_path: Path, edit: Callable[..., Any]
) -> None:
    code, _, err = medseg("doctor", data, "--bundle", _foreign(tmp_path / "other", edit))
    assert code == 2
    assert "does not describe its input" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "No such file or folder"),
        (["set", "--bundle", "no_such"], "no shipped bundle"),
        (["set", "--fix", "set/out"], "is inside the data"),
        (["set", "--fix", "."], "not empty"),
        (["set/l", "--fix", "set/i"], "not empty"),
        (["empty"], "Nothing to predict"),
    ],
)
def test_bad_requests_end_with_2(
    medseg: Run, data: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(data.parent)
    Path("empty").mkdir()
    before = sorted(Path().rglob("*"))
    code, _, err = medseg("doctor", *arguments)
    assert code == 2
    assert message in err
    assert sorted(Path().rglob("*")) == before
