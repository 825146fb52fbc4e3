"""NRRD as viewers ask for it."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from medseg.errors import RequestError
from medseg.io import write_mask
from medseg.label.plain_nrrd import to_viewer_nrrd


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    affine = np.array([[-1.5, 0.0, 0.0, 20.0], [0.0, -1.25, 0.0, 30.0], [0.0, 0.0, 2.0, -10.0], [0.0, 0.0, 0.0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine), tmp_path / "image.nii.gz")
    labels = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    write_mask(labels, tmp_path / "mask.nrrd", like=tmp_path / "image.nii.gz")
    return tmp_path / "mask.nrrd"


@pytest.mark.parametrize(
    ("dtype", "compress", "pixel", "encoding"),
    [
        ("uint16", False, sitk.sitkUInt16, b"encoding: raw"),
        ("uint16", True, sitk.sitkUInt16, b"encoding: gzip"),
        (None, False, sitk.sitkUInt8, b"encoding: raw"),
        ("uint8", None, sitk.sitkUInt8, b"encoding: gzip"),
    ],
)
def test_itk_reads_the_same_voxels_in_the_same_place(mask: Path, dtype, compress, pixel, encoding) -> None:
    before = sitk.ReadImage(str(mask))
    to_viewer_nrrd(mask, dtype=dtype, compress=compress)
    after = sitk.ReadImage(str(mask))
    assert (sitk.GetArrayFromImage(before) == sitk.GetArrayFromImage(after)).all()
    assert after.GetPixelID() == pixel
    assert encoding in mask.read_bytes()
    for place in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        assert getattr(before, place)() == getattr(after, place)()


def test_what_is_as_asked_for_or_no_nrrd_stays(mask: Path) -> None:
    before = mask.read_bytes()
    to_viewer_nrrd(mask)
    assert mask.read_bytes() == before
    other = mask.with_name("image.nii.gz")
    content = other.read_bytes()
    to_viewer_nrrd(other, dtype="uint16", compress=False)
    assert other.read_bytes() == content


@pytest.mark.parametrize("dtype", ["float32", "object", "../x"])
def test_types_that_masks_have_not_are_refused(mask: Path, dtype: str) -> None:
    before = mask.read_bytes()
    with pytest.raises(RequestError, match="unsupported data type"):
        to_viewer_nrrd(mask, dtype=dtype)
    assert mask.read_bytes() == before


def test_a_type_too_small_for_the_labels_is_refused(mask: Path) -> None:
    labels = np.full((4, 5, 6), 300)
    write_mask(labels, mask, like=mask.with_name("image.nii.gz"))
    with pytest.raises(RequestError, match="300"):
        to_viewer_nrrd(mask, dtype="uint8")
