"""Real files that break readers, and a CT against its label."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medseg.errors import CaseError, GeometryError
from medseg.io import find_cases, list_cases, load, read_grid
from medseg.io.dicom import open_series

DATA = Path(__file__).parents[4] / "shared" / "data"
AWKWARD = DATA / "awkward" / "dicom"
ABDOMEN = DATA / "ct_abdomen_totalseg" / "dicom"
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not AWKWARD.is_dir() or not ABDOMEN.is_dir(), reason="needs the data sets beside the project"),
]
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "shape", "spacing", "orientation", "mean"),
    [
        ("ct_3slice_with_seg", (512, 512, 3), (0.810547, 0.810547, 1), "LPS", -954.884),
        ("ct_tiny_23x38_with_seg", (23, 38, 3), (0.7, 0.7, 2.5), "LPS", 0.118),
        ("mr_two_slices", (256, 256, 2), (1, 1, 1), "PIR", 126.847),
        ("mr_uncompressed", (256, 256, 4), (1, 1, 1), "PIR", 127.017),
        ("mr_compressed_j2k", (256, 256, 4), (1, 1, 1), "PIR", 127.048),
        ("mr_compressed_jpegll", (256, 256, 4), (1, 1, 1), "PIR", 127.048),
        ("mr_compressed_jpegls", (256, 256, 4), (1, 1, 1), "PIR", 127.048),
        ("mr_compressed_rle", (256, 256, 4), (1, 1, 1), "PIR", 127.048),
        ("mr_enhanced_multiframe", (256, 256, 8), (1, 1, 1.2), "PIR", 541.541),
        ("mr_anisotropic", (64, 28, 4), (6.39996, 4, 0.5), "LPS", 51.604),
        ("mr_implicit_oblique", (64, 64, 4), (2.34375, 2.34375, 4), "PIR", 369.976),
        ("mr_mixed_orientation::202", (288, 288, 2), (0.32, 0.32, 3.3), "PIR", None),
        ("mr_mixed_orientation::501", (288, 288, 2), (0.555556, 0.555556, 4.4), "LPS", None),
        ("mr_4d_two_volumes::13#0", (64, 64, 4), (3, 3, 3.6), "LPS", None),
        ("single/CT_small.dcm", (128, 128, 1), (0.661468, 0.661468, 5), "LPS", -119.074),
        ("single/MR_small.dcm", (64, 64, 1), (0.3125, 0.3125, 0.8), "LPS", 518.881),
        ("single/MR_small_RLE.dcm", (64, 64, 1), (0.3125, 0.3125, 0.8), "LPS", 518.881),
        ("single/MR_small_bigendian.dcm", (64, 64, 1), (0.3125, 0.3125, 0.8), "LPS", 518.881),
        ("single/MR_small_jp2klossless.dcm", (64, 64, 1), (0.3125, 0.3125, 0.8), "LPS", 518.881),
        ("single/MR_small_padded.dcm", (64, 64, 1), (0.3125, 0.3125, 0.8), "LPS", 518.881),
        ("single/explicit_VR-UN.dcm", (512, 512, 1), (0.859375, 0.859375, 1), "LAI", -670.957),
    ],
)
def test_awkward_series_load_in_their_place(name, shape, spacing, orientation, mean):
    image, grid = load(AWKWARD / name), read_grid(AWKWARD / name)
    assert image.shape[1:] == grid.shape == shape
    assert grid.spacing == pytest.approx(spacing, rel=1e-4)
    assert grid.orientation == orientation
    if mean is not None:
        assert float(image.mean()) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "error", "part"),
    [
        ("ct_gantry_tilt", GeometryError, "tilt of 14.0 degrees"),
        ("ct_irregular_increment", GeometryError, "10 mm between 28.1075 and 38.1075, as if 1 slice were missing"),
        ("mr_mixed_orientation", CaseError, "has 2 series"),
        ("mr_rgb_j2k", CaseError, "in color"),
        ("mr_4d_two_volumes", CaseError, "has 2 volumes"),
        ("reference_nifti", CaseError, "has no DICOM image"),
        ("single", CaseError, "has 4 series"),
        ("single/MR_truncated.dcm", CaseError, "need 8,192 bytes, 62 are missing"),
        ("single/emri_small.dcm", CaseError, "10 frames without geometry"),
        ("single/emri_small_big_endian.dcm", CaseError, "10 frames without geometry"),
        ("single/liver.dcm", CaseError, "is a Segmentation object"),
    ],
)
def test_awkward_series_are_refused_with_the_reason(name, error, part):
    with pytest.raises(error, match=part):
        load(AWKWARD / name)


def in_space(values, affine):
    """Return values by world position: sorted along the world axes that the voxel axes are nearest to."""
    image = nib.as_closest_canonical(nib.Nifti1Image(values, affine))
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("mr_uncompressed", None),
        ("mr_anisotropic", None),
        ("mr_implicit_oblique", None),
        ("mr_enhanced_multiframe", None),
        ("mr_4d_two_volumes", 0),
        ("mr_4d_two_volumes", 1),
    ],
)
def test_what_another_converter_expects_is_reproduced(name, index):
    reference = nib.load(AWKWARD / "reference_nifti" / f"{name}.nii.gz")
    expected = np.asarray(reference.dataobj).astype(np.float32)
    if expected.ndim == 4:
        expected = expected[..., index or 0]
    image = load(AWKWARD / name, index=index)
    ours, affine = in_space(image.numpy()[0], image.affine.numpy())
    theirs, expected_affine = in_space(expected, reference.affine)
    assert np.allclose(ours, theirs, rtol=1e-6, atol=1e-4)
    assert np.allclose(affine, expected_affine, atol=2e-3)


def test_color_volumes_are_read_where_three_channels_are_asked_for():
    image = load(AWKWARD / "mr_rgb_j2k", channels=3)
    reference = nib.load(AWKWARD / "reference_nifti" / "mr_rgb_j2k.nii.gz")
    expected = np.asarray(reference.dataobj)
    assert np.array_equal(image.numpy(), np.stack([expected[channel] for channel in "RGB"]))
    assert np.allclose(image.affine.numpy(), reference.affine, atol=2e-3)


def test_lossless_codings_of_one_series_give_equal_voxels():
    first, *others = (load(AWKWARD / f"mr_compressed_{code}") for code in ("rle", "j2k", "jpegll", "jpegls"))
    for other in others:
        assert np.array_equal(first.numpy(), other.numpy())
        assert np.array_equal(first.affine.numpy(), other.affine.numpy())
    singles = [
        load(AWKWARD / "single" / f"MR_small{end}.dcm")
        for end in ("", "_RLE", "_bigendian", "_jp2klossless", "_padded")
    ]
    assert all(np.array_equal(singles[0].numpy(), other.numpy()) for other in singles)


@pytest.mark.parametrize(
    "name", ["mr_uncompressed", "mr_compressed_jpegls", "mr_implicit_oblique", "ct_3slice_with_seg"]
)
def test_voxels_lie_where_simpleitk_puts_them(name):
    compare_with_itk(AWKWARD / name, open_series(AWKWARD / name).files)


def compare_with_itk(folder, files):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in files])
    expected, image = reader.Execute(), load(folder)
    assert np.array_equal(image.numpy()[0], sitk.GetArrayFromImage(expected).T)
    last = [size - 1 for size in image.shape[1:]]
    for index in ([0, 0, 0], last, [last[0], 0, 0], [0, last[1], last[2]]):
        point = (LPS @ image.affine.numpy() @ [*index, 1])[:3]
        assert np.allclose(point, expected.TransformIndexToPhysicalPoint(index), atol=1e-3)


def test_a_ct_lies_where_simpleitk_puts_it_and_under_its_label():
    folder = ABDOMEN / "ct_jpeg2000"
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    series = open_series(folder)
    assert series.uid == ""
    assert {str(file) for file in series.files} == set(names) or len(names) < len(series.files)
    compare_with_itk(folder, series.files)
    image = load(folder, dtype="stored")
    assert image.numpy().dtype == np.int16
    ours = sitk.GetImageFromArray(image.numpy()[0].T)
    lps = LPS @ image.affine.numpy()
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    ours.SetOrigin(lps[:3, 3].tolist())
    ours.SetSpacing(spacing.tolist())
    ours.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    label = sitk.Resample(
        sitk.ReadImage(str(ABDOMEN / "ct_jpeg2000_label.nii.gz")), ours, sitk.Transform(), sitk.sitkNearestNeighbor
    )
    liver = sitk.GetArrayFromImage(label) == 5
    assert liver.sum() == 366_708
    assert image.numpy()[0].T[liver].mean() == pytest.approx(89, abs=0.5)


def test_a_tree_of_studies_becomes_one_case_per_series():
    found = list_cases(AWKWARD, pattern="mr_mixed_orientation/*")
    assert [case.name for case in found.cases] == [
        "mr_mixed_orientation/202_28571744.nii.gz",
        "mr_mixed_orientation/501_28571744.nii.gz",
    ]
    for case in found.cases:
        assert load(case.image).shape == (1, 288, 288, 2)
    reasons = {Path(item.path).name: item.reason for item in found.skipped}
    assert reasons["seg.dcm"] == "a Segmentation object"
    assert reasons["sparse-labelmap-ppv5.dcm"] == "a Label Map Segmentation object"
    assert find_cases(ABDOMEN / "ct_jpeg2000") == [
        {"image": str(ABDOMEN / "ct_jpeg2000"), "name": "ct_jpeg2000.nii.gz"}
    ]
