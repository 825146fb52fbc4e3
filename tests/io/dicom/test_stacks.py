import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from medseg.errors import CaseError, GeometryError
from medseg.io import load, read_grid

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ANGLE = st.floats(-3.1, 3.1)


def itk_series(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def itk_affine(image):
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


@given(
    angles=st.tuples(ANGLE, ANGLE, ANGLE),
    spacing=st.tuples(*[st.floats(0.3, 5)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    slices=st.integers(2, 6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_oblique_series_lie_where_itk_puts_them(write_series, angles, spacing, origin, slices, seed):
    with tempfile.TemporaryDirectory() as folder:
        series = write_series(
            Path(folder), shape=(5, 4, slices), angles=angles, spacing=spacing, origin=origin, seed=seed
        )
        image, expected = load(series.folder), itk_series(series.folder)
    assert np.array_equal(image.numpy()[0], series.values)
    assert np.array_equal(image.numpy()[0], sitk.GetArrayFromImage(expected).T)
    corners = np.array([[0, 0, 0, 1], [4, 3, slices - 1, 1], [4, 0, 0, 1], [0, 3, slices - 1, 1]]).T
    ours = image.affine.numpy() @ corners
    assert np.abs(ours - series.affine @ corners).max() < 1e-6
    assert np.abs(ours - itk_affine(expected) @ corners).max() < 1e-4


def test_two_series_lie_where_the_itk_package_puts_them(write_series, tmp_path):
    itk = pytest.importorskip("itk")
    series = write_series(tmp_path, shape=(7, 5, 3))
    names = itk.GDCMSeriesFileNames.New()
    names.SetDirectory(str(tmp_path))
    reader = itk.ImageSeriesReader[itk.Image[itk.SS, 3]].New()
    reader.SetImageIO(itk.GDCMImageIO.New())
    reader.SetFileNames(names.GetFileNames(names.GetSeriesUIDs()[0]))
    reader.Update()
    expected, image = reader.GetOutput(), load(series.folder)
    assert np.array_equal(itk.array_from_image(expected).T, image.numpy()[0])
    for index in ([0, 0, 0], [6, 0, 2], [3, 4, 1]):
        point = (LPS @ image.affine.numpy() @ [*index, 1])[:3]
        assert np.allclose(point, expected.TransformIndexToPhysicalPoint(index), atol=1e-4)


def test_slopes_that_differ_by_slice_are_applied_slice_by_slice_as_by_itk(write_series, tmp_path):
    def rescale(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = str(0.5 + 1.25 * k), str(-3 * k)

    series = write_series(tmp_path, modality="PT", dtype="uint16", edit=rescale)
    found = load(tmp_path).numpy()[0]
    slices = np.arange(4)
    assert np.array_equal(found, series.values * (0.5 + 1.25 * slices) - 3 * slices)
    for path in series.files:
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0].T
        assert np.array_equal(load(path).numpy()[0, ..., 0], expected)


def shifted(k, by):
    def edit(ds, number):
        if number == k:
            position = np.array([float(v) for v in ds.ImagePositionPatient])
            directions = np.reshape([float(v) for v in ds.ImageOrientationPatient], (2, 3))
            axes = np.array([*directions, np.cross(*directions)])
            ds.ImagePositionPatient = [f"{v:.8f}" for v in position + by @ axes]

    return edit


@pytest.mark.parametrize(
    ("by", "part"),
    [
        ([0, 0, 0.5], "usually 2.5 mm, but 3 mm between 125.5 and 128.5; 2 mm between 128.5 and 130.5"),
        ([0, 0, -0.5], "usually 2.5 mm, but 2 mm between 125.5 and 127.5; 3 mm between 127.5 and 130.5"),
        ([0.4, 0, 0], "pixels off the line of the others, at 128 mm"),
    ],
)
def test_slices_off_the_even_grid_are_refused_with_their_positions(write_series, tmp_path, by, part):
    write_series(tmp_path, shape=(4, 4, 7), angles=(0, 0, 0), edit=shifted(3, np.array(by)))
    with pytest.raises(GeometryError, match=part):
        read_grid(tmp_path)


def test_positions_rounded_like_those_of_scanners_are_accepted(write_series, tmp_path):
    def rounded(ds, k):
        ds.ImagePositionPatient = [f"{float(v):.2f}" for v in ds.ImagePositionPatient]

    series = write_series(tmp_path, shape=(4, 4, 9), spacing=(0.5, 0.5, 0.333), edit=rounded)
    corner = [3, 3, 8, 1]
    assert np.abs(read_grid(tmp_path).affine @ corner - series.affine @ corner).max() < 0.02


@pytest.mark.parametrize(("gone", "missing"), [([3], "1 slice were"), ([3, 4], "2 slices were")])
def test_missing_slices_are_named_by_their_neighbors(write_series, tmp_path, gone, missing):
    series = write_series(tmp_path, shape=(4, 4, 8), angles=(0, 0, 0))
    for k in gone:
        series.files[k].unlink()
    with pytest.raises(GeometryError, match=f"between 125.5 and .*as if {missing} missing"):
        load(tmp_path)


@pytest.mark.parametrize("shear", [(0.2, 0), (0, -0.6), (0.1, 0.1)])
@pytest.mark.parametrize("slices", [2, 5])
def test_a_tilted_gantry_is_refused_with_its_angle(write_series, tmp_path, shear, slices):
    write_series(tmp_path, shape=(4, 4, slices), shear=shear)
    angle = np.degrees(np.arctan2(np.hypot(*shear), 2.5))
    with pytest.raises(GeometryError, match=f"tilt of {angle:.1f} degrees"):
        load(tmp_path)


def test_copies_of_a_file_count_once_and_altered_copies_are_refused(write_series, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    series = write_series(tmp_path)
    shutil.copy(series.files[1], tmp_path / "copy")
    assert np.array_equal(load(tmp_path).numpy()[0], series.values)
    assert "is a duplicate of" in caplog.text
    ds = dcmread(series.files[1])
    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(tmp_path / "copy")
    with pytest.raises(CaseError, match="have the same SOPInstanceUID"):
        load(tmp_path)


def several(write_series, folder, count, edit, **options):
    """Write volumes of one series at one place into one folder."""
    uid = "1.2.826.0.1.3680043.8.498.77"
    return [
        write_series(
            folder,
            uid=uid,
            seed=number,
            name=f"{number}_{{:03d}}",
            edit=lambda ds, k, number=number: edit(ds, k, number),
            **options,
        )
        for number in range(count)
    ]


def by_time(ds, k, number):
    ds.TemporalPositionIdentifier = number + 1


def by_echo(ds, k, number):
    ds.EchoTime = f"{4.6 * (number + 1):.1f}"


def by_block(ds, k, number):
    ds.InstanceNumber = 100 * number + k


def by_turns(ds, k, number):
    ds.InstanceNumber = 3 * k + number


def by_time_beside_clock(ds, k, number):
    ds.AcquisitionTime = f"1200{k:02d}.{number}"  # another in each image, so it parts nothing
    ds.AcquisitionNumber = number


@pytest.mark.parametrize("edit", [by_time, by_echo, by_block, by_turns, by_time_beside_clock])
def test_volumes_at_one_place_are_refused_listed_and_selectable(write_series, tmp_path, edit):
    volumes = several(write_series, tmp_path, 3, edit)
    with pytest.raises(CaseError, match="has 3 volumes") as error:
        load(tmp_path)
    assert str(error.value).count("4 x 6 x 5") == 3
    found = [load(tmp_path, index=index).numpy()[0] for index in range(3)]
    for volume in volumes:
        assert sum(np.array_equal(volume.values, values) for values in found) == 1
    assert np.array_equal(load(f"{tmp_path}::3#1").numpy()[0], found[1])
    with pytest.raises(CaseError, match="no volume 3: the last is 2"):
        load(tmp_path, index=3)


def test_images_at_one_place_that_nothing_tells_apart_are_refused_even_by_index(write_series, tmp_path):
    def same(ds, k, number):
        ds.InstanceNumber = 1

    several(write_series, tmp_path, 2, same)
    with pytest.raises(CaseError, match="8 images at 4 positions cannot be separated"):
        load(tmp_path, index=0)


def test_an_incomplete_volume_among_several_is_refused(write_series, tmp_path):
    first, _ = several(write_series, tmp_path, 2, by_time)
    first.files[0].unlink()
    with pytest.raises(CaseError, match="7 images at 4 positions"):
        load(tmp_path, index=1)


@pytest.mark.parametrize(
    "other", [{"angles": (1.2, 0.3, 0.2)}, {"shape": (5, 5, 4)}, {"spacing": (0.8, 0.9, 2.5)}, {"shape": (5, 6, 4)}]
)
def test_orientations_sizes_and_pixel_spacings_are_not_mixed(write_series, tmp_path, other):
    uid = "1.2.826.0.1.3680043.8.498.78"
    first = write_series(tmp_path, uid=uid, name="a{}", edit=lambda ds, k: setattr(ds, "InstanceNumber", k + 1))
    second = write_series(
        tmp_path, uid=uid, name="b{}", seed=1, edit=lambda ds, k: setattr(ds, "InstanceNumber", k + 9), **other
    )
    with pytest.raises(CaseError, match="has 2 volumes"):
        load(tmp_path)
    for index, series in enumerate((first, second)):
        image = load(tmp_path, index=index)
        assert np.array_equal(image.numpy()[0], series.values)
        assert np.allclose(image.affine.numpy(), series.affine, atol=1e-6)


@pytest.mark.parametrize(
    ("orientation", "part"),
    [
        ([1, 0, 0, 1, 0, 0], "orthogonal unit vectors"),
        ([0, 0, 0, 0, 0, 0], "two orthogonal unit vectors"),
        ([2, 0, 0, 0, 2, 0], "two orthogonal unit vectors"),
        ([1, 0, 0, 0.1, 0.99, 0], "orthogonal unit vectors"),
    ],
)
def test_directions_that_cannot_be_are_refused(write_series, tmp_path, orientation, part):
    write_series(tmp_path, edit=lambda ds, k: setattr(ds, "ImageOrientationPatient", orientation))
    with pytest.raises(GeometryError, match=part):
        load(tmp_path)


@pytest.mark.parametrize(
    ("between", "thickness", "expected"),
    [("4", "2", 4.0), (None, "2", 2.0), (None, None, 1.0), ("-3", "2", 3.0), ("0", "2", 2.0)],
)
def test_a_single_slice_is_as_thick_as_it_says(
    write_series, tmp_path, caplog, assert_warns, between, thickness, expected
):
    def edit(ds, k):
        ds.SpacingBetweenSlices, ds.SliceThickness = between, thickness

    write_series(tmp_path, shape=(6, 5, 1), edit=edit)
    grid = read_grid(tmp_path)
    assert grid.shape == (6, 5, 1)
    assert grid.spacing == pytest.approx((0.7, 0.9, expected))
    assert ("1 mm is assumed" in caplog.text) is (thickness is None)
    if thickness is None:
        assert_warns(lambda: load(tmp_path), "spacing-assumed")
    assert read_grid(tmp_path, spatial_dims=2).shape == (6, 5)


def test_two_slices_suffice(write_series, tmp_path):
    series = write_series(tmp_path, shape=(6, 5, 2))
    image = load(tmp_path)
    assert np.array_equal(image.numpy()[0], series.values)
    assert np.allclose(image.affine.numpy(), series.affine, atol=1e-6)
