import numpy as np
import pytest

from medseg.errors import CaseError
from medseg.io import load, read_grid

RNG = np.random.default_rng(3)


@pytest.fixture
def picture(slice_of, save_image, tmp_path):
    """A radiograph: no position, so no place in space."""
    pixels = RNG.integers(0, 4096, (5, 7), dtype="uint16")
    return save_image(slice_of(pixels, modality="CR"), tmp_path / "cr.dcm"), pixels


@pytest.fixture
def color(slice_of, save_image, tmp_path):
    pixels = RNG.integers(0, 256, (5, 7, 3), dtype="uint8")
    ds = slice_of(pixels, modality="CR")
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    return save_image(ds, tmp_path / "rgb.dcm"), pixels


def test_an_image_without_a_position_is_a_picture(picture):
    path, pixels = picture
    image = load(path)
    assert np.array_equal(image.numpy()[0], pixels.T)
    assert np.array_equal(image.affine.numpy(), np.eye(4))
    assert read_grid(path, spatial_dims=2).shape == (7, 5)
    with pytest.raises(CaseError, match="2D image without geometry"):
        load(path, spatial_dims=3)


def test_grey_is_repeated_for_a_model_of_color_pictures(picture):
    path, pixels = picture
    image = load(path, channels=3)
    assert image.shape == (3, 7, 5)
    assert (image.numpy() == pixels.T).all()


def test_several_pictures_without_positions_are_not_stacked(picture, slice_of, save_image):
    path, _ = picture
    other = slice_of(np.zeros((5, 7), "uint16"), modality="CR")
    from pydicom import dcmread

    other.SeriesInstanceUID = dcmread(path).SeriesInstanceUID
    save_image(other, path.with_name("b.dcm"))
    with pytest.raises(CaseError, match="2 images without geometry"):
        load(path.parent)


def test_color_is_read_where_it_is_asked_for_and_refused_where_grey_is_due(color):
    path, pixels = color
    for image in (load(path), load(path, channels=3)):
        assert np.array_equal(image.numpy(), pixels.transpose(2, 1, 0))
    with pytest.raises(CaseError, match="in color, 3 values per voxel: expected 1"):
        load(path, channels=1)
    with pytest.raises(CaseError, match="expected 4"):
        load(path, channels=4)


def test_a_palette_is_refused(slice_of, save_image, tmp_path):
    ds = slice_of(np.zeros((5, 7), "uint8"), modality="CR")
    ds.PhotometricInterpretation = "PALETTE COLOR"
    with pytest.raises(CaseError, match="PALETTE COLOR"):
        load(save_image(ds, tmp_path / "a.dcm"))


def test_volumes_are_refused_where_pictures_are_due(write_series, tmp_path):
    write_series(tmp_path)
    with pytest.raises(CaseError, match="is a volume"):
        load(tmp_path, spatial_dims=2)
    with pytest.raises(CaseError, match="is grayscale"):
        load(tmp_path, channels=3)


@pytest.mark.parametrize(
    ("dtype", "inter", "slope", "expected"),
    [
        ("uint8", 0, 1, "uint8"),
        ("int16", 0, 1, "int16"),
        ("int16", -1024, 1, "int16"),
        ("int16", 32767, 1, "int32"),
        ("uint16", 0, 1, "int16"),
        ("uint16", 60000, 1, "int32"),
        ("int16", 0.5, 1, "float32"),
        ("int16", 0, 2.5, "float32"),
        ("uint32", 0, 1, "float32"),
    ],
)
def test_stored_whole_numbers_keep_the_narrowest_type_that_holds_them(
    write_series, tmp_path, dtype, inter, slope, expected
):
    def rescale(ds, k):
        ds.RescaleIntercept, ds.RescaleSlope = inter, slope

    series = write_series(tmp_path, dtype=dtype, edit=rescale)
    image = load(tmp_path, dtype="stored")
    assert str(image.numpy().dtype) == expected
    assert np.array_equal(image.numpy()[0], series.values * np.float64(slope) + inter)
    assert np.array_equal(image.numpy(), load(tmp_path).numpy())


def test_an_intercept_beyond_whole_numbers_of_32_bits_does_not_wrap_around(write_series, tmp_path):
    def rescale(ds, k):
        ds.RescaleIntercept, ds.RescaleSlope = 3_000_000_000, 1

    series = write_series(tmp_path, edit=rescale)
    image = load(tmp_path, dtype="stored").numpy()[0]
    assert np.allclose(image, series.values + 3e9, rtol=1e-6)


def test_a_label_is_read_as_whole_numbers(write_series, tmp_path):
    series = write_series(tmp_path, dtype="uint8")
    image = load(tmp_path, label=True)
    assert image.numpy().dtype == np.int32
    assert np.array_equal(image.numpy()[0], series.values)


def test_rescaled_values_beyond_float32_are_refused(write_series, tmp_path):
    write_series(tmp_path, edit=lambda ds, k: setattr(ds, "RescaleSlope", "1e40"))
    with pytest.raises(CaseError, match="non-finite"):
        load(tmp_path)
