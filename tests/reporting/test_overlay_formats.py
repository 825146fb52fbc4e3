"""Overlays of every format that predict reads and writes: the same picture as of the NIfTI files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medseg.errors import CaseError, GeometryError
from medseg.io import load, write_mask
from medseg.io.dicom.rtstruct import write_rtstruct
from medseg.reporting import overlay
from medseg.reporting.overlay import write_overlay

SHAPE = (20, 16, 8)
LABELS = {1: "liver", 2: "spleen"}


def picture(path: Path) -> Any:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


@pytest.fixture
def values() -> Any:
    return np.random.default_rng(0).integers(-100, 300, SHAPE).astype(np.int16)


@pytest.fixture
def mask() -> Any:
    array = np.zeros(SHAPE, np.uint8)
    array[3:9, 4:9, 2:5] = 1
    array[12:15, 6:12, 4:6] = 2
    return array


@pytest.fixture(autouse=True)
def _no_title(monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles name the file, which differs on purpose."""
    original = overlay.compose
    monkeypatch.setattr(overlay, "compose", lambda title, *rest: original("title", *rest))


@pytest.fixture
def expected(values: Any, mask: Any, nifti: Callable[..., Path], tmp_path: Path) -> Any:
    """The picture of the NIfTI files of the place that the DICOM series has."""
    affine = np.diag([-0.8, -0.8, 2.5, 1])
    affine[:3, 3] = [30, 40, 0]
    image = nifti(tmp_path / "n" / "a.nii.gz", values, affine)
    label = nifti(tmp_path / "n" / "b.nii.gz", mask, affine)
    return picture(write_overlay(image, label, tmp_path / "expected.png", labels=LABELS))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mgz"])
def test_a_volume_of_another_format_gives_the_same_picture(
    suffix: str, expected: Any, mask: Any, tmp_path: Path
) -> None:
    source = tmp_path / "n" / "a.nii.gz"
    target = tmp_path / f"a{suffix}"
    if suffix == ".mgz":
        loaded = nib.load(source)
        nib.save(nib.MGHImage(np.asarray(loaded.dataobj), loaded.affine), target)
    else:
        sitk.WriteImage(sitk.ReadImage(str(source)), str(target))
    write_mask(mask, tmp_path / f"mask{suffix}", like=target)
    made = write_overlay(target, tmp_path / f"mask{suffix}", tmp_path / "o.png", labels=LABELS)
    np.testing.assert_array_equal(picture(made), expected)


@pytest.mark.parametrize("named", ["folder", "series"])
def test_a_dicom_series_gives_the_same_picture(
    named: str, expected: Any, values: Any, mask: Any, dicom: Callable[..., Path], tmp_path: Path
) -> None:
    folder = dicom(tmp_path / "ct", values)
    source = str(folder) if named == "folder" else f"{folder}::3"
    write_mask(mask, tmp_path / "ct.nii.gz", like=source)
    made = write_overlay(source, tmp_path / "ct.nii.gz", tmp_path / "o.png", labels=LABELS)
    np.testing.assert_array_equal(picture(made), expected)


@pytest.mark.parametrize("labels", [LABELS, {1: "other", 2: "names"}, None], ids=["named", "misnamed", "unnamed"])
def test_an_rtstruct_mask_lies_on_its_series(
    labels: Any, expected: Any, values: Any, mask: Any, dicom: Callable[..., Path], tmp_path: Path
) -> None:
    folder = dicom(tmp_path / "ct", values)
    file = write_rtstruct(mask.astype(np.int32), tmp_path / "ct.rtstruct.dcm", folder, labels=LABELS)
    made = picture(write_overlay(folder, file, tmp_path / "o.png", labels=labels))
    assert made.shape[1] > 100
    if labels == LABELS:
        np.testing.assert_array_equal(made, expected)
    else:
        height = expected.shape[0] * 3 // 4  # the legend differs
        np.testing.assert_array_equal(made[:height], expected[:height])


def test_a_dicom_seg_mask_lies_on_its_series_and_on_its_nifti(
    expected: Any, values: Any, mask: Any, dicom: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("highdicom")
    from medseg.io.dicom.seg import write_seg

    folder = dicom(tmp_path / "ct", values)
    file = write_seg(mask, tmp_path / "ct.seg.dcm", folder, labels=LABELS)
    for number, image in enumerate((folder, tmp_path / "n" / "a.nii.gz")):
        made = write_overlay(image, file, tmp_path / f"{number}.png", labels=LABELS)
        np.testing.assert_array_equal(picture(made), expected)


def test_an_rtstruct_on_another_format_is_refused(
    expected: Any, values: Any, mask: Any, dicom: Callable[..., Path], tmp_path: Path
) -> None:
    folder = dicom(tmp_path / "ct", values)
    file = write_rtstruct(mask.astype(np.int32), tmp_path / "ct.rtstruct.dcm", folder, labels=LABELS)
    with pytest.raises(GeometryError, match="the image must be its DICOM series"):
        write_overlay(tmp_path / "n" / "a.nii.gz", file, tmp_path / "o.png")


def test_a_mask_beside_its_dicom_series_is_refused(
    values: Any, mask: Any, dicom: Callable[..., Path], nifti: Callable[..., Path], tmp_path: Path
) -> None:
    folder = dicom(tmp_path / "ct", values)
    shifted = load(folder).affine.numpy().copy()
    shifted[2, 3] += 2.5
    other = nifti(tmp_path / "mask.nii.gz", mask, shifted)
    with pytest.raises(GeometryError, match=r"Geometry mismatch between mask\.nii\.gz and ct"):
        write_overlay(folder, other, tmp_path / "o.png")
    assert not (tmp_path / "o.png").exists()


def test_a_dicom_file_that_is_no_mask_is_refused(values: Any, dicom: Callable[..., Path], tmp_path: Path) -> None:
    folder = dicom(tmp_path / "ct", values)
    with pytest.raises(CaseError, match="IM000"):
        write_overlay(folder, folder / "IM000", tmp_path / "o.png")
