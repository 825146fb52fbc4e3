"""Real files that break readers: each loads as other programs say, or is refused with the reason."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from medseg.errors import MedsegError
from medseg.io import load, read_grid

AWKWARD = Path(__file__).parents[3] / "shared" / "data" / "awkward"
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not AWKWARD.is_dir(), reason=f"needs the real files in {AWKWARD}"),
]

# What loads: shape, orientation, spacing in mm, and the type that it keeps.
LOADS = {
    "nifti/anatomical.nii": ((33, 41, 25), "LAS", (2, 2, 2), "int16"),
    "nifti/chris_PD.nii.gz": ((191, 256, 54), "RAS", (0.8579, 0.8594, 2.4), "uint8"),
    "nifti/constant_8x8x8.nii.gz": ((8, 8, 8), "LPS", (1, 1, 1), "float32"),
    "nifti/cord_t2.nii.gz": ((60, 55, 52), "PSR", (1, 1, 1), "int16"),
    "nifti/cord_t2_seg.nii.gz": ((60, 55, 52), "PSR", (1, 1, 1), "uint8"),
    "nifti/disconnected_mask_8x8x8.nii.gz": ((8, 8, 8), "LPS", (1, 1, 1), "uint8"),
    "nifti/empty_mask_8x8x8.nii.gz": ((8, 8, 8), "LPS", (1, 1, 1), "uint8"),
    "nifti/fmri_pitch.nii.gz": ((64, 64, 35), "RAS", (3.25, 3.25, 3.6), "float32"),
    "nifti/full_mask_8x8x8.nii.gz": ((8, 8, 8), "LPS", (1, 1, 1), "uint8"),
    "nifti/one_voxel_mask_8x8x8.nii.gz": ((8, 8, 8), "LPS", (1, 1, 1), "uint8"),
    "nifti/orientation_lps.nii.gz": ((32, 48, 64), "LPS", (1.5, 1, 0.5), "uint8"),
    "nifti/standard.nii.gz": ((4, 5, 7), "RAS", (1, 3, 2), "uint8"),
    "nrrd/brain2_image.nrrd": ((256, 256, 23), "LAS", (0.78125, 0.78125, 6.5), "int16"),
    "nrrd/brain2_label.nrrd": ((256, 256, 23), "LAS", (0.78125, 0.78125, 6.5), "int32"),
    "nrrd/breast1_image.nrrd": ((45, 120, 21), "LPS", (0.664062, 0.664062, 2.1), "int16"),
    "nrrd/breast1_label.nrrd": ((45, 120, 21), "LPS", (0.664062, 0.664062, 2.1), "int16"),
}
# Series: shape with the number of volumes, orientation, spacing in mm. They are refused unless a volume is chosen.
SERIES = {
    "nifti/example4d.nii.gz": ((128, 96, 24, 2), "LAS", (2, 2, 2.2)),
    "nifti/example_nifti2.nii.gz": ((32, 20, 12, 2), "LAS", (2, 2, 2.2)),
    "nifti/functional.nii": ((17, 21, 3, 20), "LAS", (4, 4, 8)),
    "nifti/pcasl.nii.gz": ((52, 68, 20, 10), "RAS", (3, 3, 6)),
}
REFUSED = {
    "nifti/resampled_anat_moved.nii": "153 NaN and 0 Inf",
    "nifti/test.mgz": "sheared affine: two voxel axes meet at 38.21 degrees",
}


def test_the_tables_name_every_file():
    found = {f"{path.parent.name}/{path.name}" for kind in ("nifti", "nrrd") for path in (AWKWARD / kind).iterdir()}
    assert found == {*LOADS, *SERIES, *REFUSED}


@pytest.mark.parametrize("name", LOADS)
def test_images_load_as_the_independent_programs_say(name):
    shape, orientation, spacing, stored = LOADS[name]
    grid, image = read_grid(AWKWARD / name), load(AWKWARD / name)
    assert image.shape == (1, *shape)
    assert grid.orientation == orientation
    assert np.allclose(grid.spacing, spacing, rtol=1e-3)
    kept = load(AWKWARD / name, dtype="stored")
    assert str(kept.dtype) == f"torch.{stored}"
    assert np.array_equal(kept.numpy(), image.numpy())
    if name.startswith("nifti"):
        reference = nib.load(AWKWARD / name)
        assert np.array_equal(image[0].numpy(), reference.get_fdata(dtype=np.float32))
        assert np.array_equal(grid.affine, reference.affine)
        return
    reference = SimpleITK.ReadImage(str(AWKWARD / name))
    assert np.array_equal(image[0].numpy(), SimpleITK.GetArrayFromImage(reference).T)
    for index in [(0, 0, 0), tuple(size - 1 for size in shape)]:
        x, y, z = reference.TransformIndexToPhysicalPoint(index)
        assert np.allclose(grid.affine @ (*index, 1), (-x, -y, z, 1))


@pytest.mark.parametrize("name", SERIES)
def test_series_load_one_volume_or_as_channels_and_are_refused_whole(name):
    shape, orientation, spacing = SERIES[name]
    reference = nib.load(AWKWARD / name)
    values = np.moveaxis(reference.get_fdata(dtype=np.float32), -1, 0)
    with pytest.raises(MedsegError, match=f"{shape[3]} values per voxel") as error:
        load(AWKWARD / name)
    assert str(AWKWARD / name) in str(error.value)
    assert np.array_equal(load(AWKWARD / name, channels=shape[3]).numpy(), values)
    for index in (0, shape[3] - 1):
        assert np.array_equal(load(AWKWARD / name, index=index)[0].numpy(), values[index])
    grid = read_grid(AWKWARD / name)
    assert grid.shape == shape[:3]
    assert grid.orientation == orientation
    assert np.allclose(grid.spacing, spacing, rtol=1e-3)
    assert np.array_equal(grid.affine, reference.affine)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_reason(name):
    with pytest.raises(MedsegError, match=REFUSED[name]) as error:
        load(AWKWARD / name)
    assert str(AWKWARD / name) in str(error.value)


@pytest.mark.parametrize("name", [name for name in LOADS if "mask" in name or "label" in name or "seg" in name])
def test_labels_load_as_whole_numbers(name):
    label = load(AWKWARD / name, label=True)
    assert np.array_equal(label.numpy(), load(AWKWARD / name).numpy())
    assert label.max() <= 1
