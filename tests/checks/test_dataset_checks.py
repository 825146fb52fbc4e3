"""Faults of a data set as a whole: copies, parts of scans, patients across the split, outliers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.diagnosis.doctor import examine
from medseg.io.patients import patient_of
from tests.diagnosis.conftest import AFFINE, ball, edit_listing, image, label, noise, one, write_nifti

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the project")


def test_copies_are_found_however_they_are_stored(dataset: Path) -> None:
    loaded = nib.load(image(dataset, 0))
    turned = nib.Nifti1Image(np.asarray(loaded.dataobj), loaded.affine).as_reoriented(
        np.array([[1, -1], [0, 1], [2, -1]])
    )
    write_nifti(image(dataset, 1), np.asarray(turned.dataobj).astype(np.float32), turned.affine)
    finding = one(examine(dataset), "duplicate")
    assert finding.cases == ("case0", "case1")
    assert "their labels differ" in finding.message
    assert finding.repair == ""


def test_a_copy_on_both_sides_of_the_split_is_an_error(dataset: Path) -> None:
    shutil.copy(image(dataset, 0), image(dataset, 3))
    shutil.copy(label(dataset, 0), label(dataset, 3))
    finding = one(examine(dataset), "leak")
    assert (finding.severity, finding.cases, finding.repair) == ("error", ("case0", "case3"), "duplicate")


def test_a_part_of_a_volume_with_the_affine_of_the_whole_is_found(dataset: Path) -> None:
    write_nifti(image(dataset, 3), noise(0)[..., 4:9])
    write_nifti(label(dataset, 3), ball()[..., 4:9])
    finding = one(examine(dataset), "leak")
    assert "share 5 slices (case0 4-8, case3 0-4" in finding.message
    assert "12 mm apart by their affines: at least one affine is wrong" in finding.message


def test_a_part_of_a_volume_in_its_true_place_is_no_fault_of_the_affine(dataset: Path) -> None:
    place = AFFINE.copy()
    place[:3, 3] += AFFINE[:3, 2] * 4
    write_nifti(image(dataset, 1), noise(0)[..., 4:9], place)
    write_nifti(label(dataset, 1), ball()[..., 4:9], place)
    finding = one(examine(dataset), "duplicate")
    assert finding.severity == "warning"
    assert "affine" not in finding.message


def test_one_label_for_two_images_is_suspicious(dataset: Path) -> None:
    shutil.copy(label(dataset, 0), label(dataset, 1))
    assert one(examine(dataset), "identical labels").cases == ("case0", "case1")


def test_a_grid_unlike_the_others_is_found(dataset: Path, nifti: Callable[..., Path]) -> None:
    folder = dataset.parent / "images"
    for number in range(6):
        affine = AFFINE @ np.diag([4, 4, 4, 1]) if number == 5 else AFFINE
        nifti(folder / f"x{number}.nii.gz", noise(number), affine)
    nifti(folder / "x6.nii.gz", noise(6), AFFINE @ np.diag([-1, 1, 1, 1]))
    report = examine(folder)
    assert one(report, "unusual spacing").cases == ("x5",)
    assert one(report, "unusual extent").cases == ("x5",)
    assert one(report, "unusual orientation").cases == ("x6",)


def test_a_label_that_no_case_holds_is_noted(dataset: Path) -> None:
    edit_listing(dataset, lambda content: content["labels"].update({"3": "rim"}))
    assert "3 (rim)" in one(examine(dataset), "unused label").message


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("sub-012_ses-1_T1w", "sub-012"),
        ("TCGA-AB-1234-01Z", "tcga-ab-1234"),
        ("LIDC-IDRI-0314_1", "lidc-idri-0314"),
        ("patient_07_slice_3", "patient_07"),
        ("abc_slice_012", "abc"),
        ("Image_01L", "image_01"),
        ("knee12_right", "knee12"),
        ("hippocampus_001", ""),
        ("train_10", ""),
        ("0280fa8f60f6", ""),
        ("CELL", ""),
    ],
)
def test_patients_are_told_by_names_carefully(name: str, patient: str) -> None:
    assert patient_of(name) == patient


def test_a_patient_on_both_sides_by_name_is_a_warning(tmp_path: Path) -> None:
    root = tmp_path / "eyes"
    names = ["Image_01L", "Image_01R", "Image_02L"]
    for number, name in enumerate(names):
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise(number, (20, 30)) % 200).astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(ball((20, 30), 0.4 + 0.1 * number)).save(root / "labels" / f"{name}.png")
    (root / "split.json").write_text(json.dumps({"train": names[:1], "val": names[1:]}))
    finding = one(examine(root), "patient")
    assert (finding.severity, finding.cases) == ("warning", ("Image_01L", "Image_01R"))


def test_a_dicom_patient_on_both_sides_is_an_error_without_a_name(dicom: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "set"
    entries = []
    for number, patient in enumerate(("Secret-1", "Secret-1", "Secret-2")):
        folder = dicom(root / f"series{number}", noise(number), patient=patient)
        mask = nib.Nifti1Image(ball(center=0.4 + number * 0.1), np.diag([-0.8, -0.8, 2.5, 1]))
        mask.affine[:2, 3] = 30, 40
        write_nifti(root / f"label{number}.nii.gz", np.asarray(mask.dataobj), mask.affine)
        entries.append({"image": folder.name, "label": f"label{number}.nii.gz"})
    listing = {"training": entries[:1], "validation": entries[1:]}
    (root / "dataset.json").write_text(json.dumps(listing))
    report = examine(root)
    finding = one(report, "patient")
    assert (finding.severity, finding.cases) == ("error", ("series0", "series1"))
    assert report.cases[0].image.modality == "CT"
    assert "Secret" not in json.dumps(report.to_json())
    assert "Secret" not in repr(report)


# --- the listing
