import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import LoadImage
from PIL import Image, ImageCms

from medseg.errors import CaseError, GeometryError
from medseg.io import load, read_grid

SLIDES = Path(__file__).parents[4] / "shared" / "data" / "awkward" / "wsi"


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def save(path, picture, **options):
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path, **options)
    return path


def channel_first(array):
    """Turn `(y, x[, C])` into `(C, x, y)`."""
    return array.T[None] if array.ndim == 2 else array.transpose(2, 1, 0)


def png_of_one_row(path, width, bits, color, row, *more):
    """Write a PNG that Pillow itself cannot write; `color` is 0 for grey, 2 for RGB; `more` are chunks."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0)), *more]
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def png_of_16_bit_color(path):
    return png_of_one_row(path, 2, 16, 2, struct.pack(">6H", *range(1000, 1006)))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".bmp"])
def test_color_is_channel_first_with_x_before_y(tmp_path, pixels, suffix):
    image = load(save(tmp_path / f"a{suffix}", pixels), spatial_dims=2)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert np.array_equal(image.numpy(), channel_first(pixels))
    assert np.array_equal(image.affine.numpy(), np.eye(4))
    assert image.spatial_ndim == 2


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg"])
@pytest.mark.parametrize("color", [True, False])
def test_pictures_read_as_monai_reads_them(tmp_path, pixels, suffix, color):
    path = save(tmp_path / f"a{suffix}", pixels if color else pixels[..., 0])
    reference = LoadImage(reader="PILReader", ensure_channel_first=True)(path)
    assert np.array_equal(load(path).numpy(), reference.numpy())


def test_the_grid_is_known_without_reading_pixels(tmp_path, pixels):
    grid = read_grid(save(tmp_path / "a.png", pixels))
    assert grid.shape == (7, 5)
    assert np.array_equal(grid.affine, np.eye(4))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_keeps_its_values(tmp_path, suffix):
    array = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800
    path = save(tmp_path / f"a{suffix}", array)
    assert np.array_equal(load(path).numpy(), channel_first(array))
    assert np.array_equal(load(path, label=True).numpy(), channel_first(array))


def test_float_tiff_keeps_its_values(tmp_path):
    array = np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7)
    assert np.array_equal(load(save(tmp_path / "a.tif", array)).numpy(), channel_first(array))


def test_a_tiff_with_nan_is_refused(tmp_path):
    path = save(tmp_path / "a.tif", np.array([[1, np.nan]], dtype=np.float32))
    with pytest.raises(CaseError, match="1 NaN") as error:
        load(path)
    assert str(path) in str(error.value)


def test_1_bit_is_black_and_white_or_the_labels_0_and_1(tmp_path):
    array = np.eye(5, 7, dtype=bool)
    path = save(tmp_path / "a.png", array)
    assert np.array_equal(load(path).numpy(), channel_first(array * 255))
    label = load(path, label=True)
    assert label.dtype == torch.int32
    assert np.array_equal(label.numpy(), channel_first(array))


def test_a_palette_is_color_or_the_labels_themselves(tmp_path):
    indices = np.arange(35, dtype=np.uint8).reshape(5, 7) % 3
    picture = Image.fromarray(indices)
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    path = save(tmp_path / "a.png", picture)
    colors = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    assert np.array_equal(load(path).numpy(), channel_first(colors[indices]))
    assert np.array_equal(load(path, label=True).numpy(), channel_first(indices))


@pytest.mark.parametrize("color", [True, False])
def test_alpha_is_dropped_where_all_is_opaque(tmp_path, pixels, color):
    base = pixels if color else pixels[..., 0]
    picture = Image.fromarray(base)
    picture.putalpha(255)
    assert np.array_equal(load(save(tmp_path / "a.png", picture)).numpy(), channel_first(base))


def transparent(mode, pixels):
    picture = Image.fromarray(pixels).convert(mode)
    if mode in ("RGBA", "LA"):
        alpha = np.full((5, 7), 255, np.uint8)
        alpha[0, :2] = 7
        picture.putalpha(Image.fromarray(alpha))
    return picture


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_refused_with_their_number(tmp_path, pixels, mode):
    path = save(tmp_path / "a.png", transparent(mode, pixels))
    with pytest.raises(CaseError, match="2 transparent pixels of 35") as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_transparent_palette_color_is_refused(tmp_path, pixels):
    picture = Image.fromarray(pixels[..., 0] % 2)
    picture.putpalette([0, 0, 0, 255, 255, 255])
    path = save(tmp_path / "a.png", picture, transparency=0)
    with pytest.raises(CaseError, match="transparent pixels"):
        load(path)
    assert np.array_equal(load(path, label=True).numpy(), channel_first(pixels[..., 0] % 2))


def test_grey_is_repeated_for_a_color_model_and_said(tmp_path, pixels, caplog):
    path = save(tmp_path / "a.png", pixels[..., 0])
    with caplog.at_level(logging.INFO):
        image = load(path, channels=3)
    assert np.array_equal(image.numpy(), np.repeat(channel_first(pixels[..., 0]), 3, axis=0))
    assert f"{path} is grayscale" in caplog.text


def test_color_with_equal_channels_is_grey(tmp_path, pixels):
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    path = save(tmp_path / "a.png", grey)
    assert np.array_equal(load(path, channels=1).numpy(), channel_first(pixels[..., 0]))
    assert np.array_equal(load(path, label=True).numpy(), channel_first(pixels[..., 0]))
    assert load(path).shape == (3, 7, 5)


@pytest.mark.parametrize(("color", "channels"), [(True, 1), (True, 4), (False, 2)])
def test_other_channel_counts_are_refused(tmp_path, pixels, color, channels):
    path = save(tmp_path / "a.png", pixels if color else pixels[..., 0])
    with pytest.raises(CaseError, match=f"expected {channels}") as error:
        load(path, channels=channels)
    assert str(path) in str(error.value)


def test_a_color_label_is_refused(tmp_path, pixels):
    with pytest.raises(CaseError, match="is in color"):
        load(save(tmp_path / "a.png", pixels), label=True)


def test_a_jpeg_label_is_refused_whatever_it_is_called(tmp_path, pixels):
    path = save(tmp_path / "a.png", pixels[..., 0], format="JPEG")
    with pytest.raises(CaseError, match="lossy compression") as error:
        load(path, label=True)
    assert str(path) in str(error.value)


def test_exif_rotation_is_not_applied_with_a_warning(tmp_path, pixels, assert_warns):
    exif = Image.Exif()
    exif[274] = 6
    path = save(tmp_path / "a.png", pixels, exif=exif)
    with Image.open(path) as picture:
        assert picture.getexif()[274] == 6
    assert np.array_equal(load(path).numpy(), channel_first(pixels))
    assert_warns(lambda: load(path), "exif-orientation-ignored")


def test_volumes_are_not_read_from_pictures(tmp_path, pixels):
    path = save(tmp_path / "a.png", pixels)
    for read in (load, read_grid):
        with pytest.raises(CaseError, match="expected a volume") as error:
            read(path, spatial_dims=3)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_several_pages_are_refused_with_their_number(tmp_path, pixels, suffix):
    pages = [Image.fromarray(pixels + n) for n in range(4)]
    path = tmp_path / f"a{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(CaseError, match="4 pages") as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_color_modes_are_refused(tmp_path, pixels, mode):
    picture = Image.fromarray(pixels)
    if mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        picture = ImageCms.applyTransform(picture, lab)
    else:
        picture = picture.convert(mode)
    path = save(tmp_path / "a.tif", picture)
    with pytest.raises(CaseError, match=f"color mode {mode}") as error:
        load(path)
    assert str(path) in str(error.value)


def test_16_bit_color_is_refused_rather_than_cut(tmp_path):
    path = png_of_16_bit_color(tmp_path / "a.png")
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
    with pytest.raises(CaseError, match="16 bit color") as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("damage", [b"", b"no picture at all", None])
def test_damaged_pictures_are_refused_by_name(tmp_path, suffix, damage):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    path = save(tmp_path / f"a{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage is None else damage)
    with pytest.raises(CaseError) as error:
        load(path)
    assert str(path) in str(error.value)


def test_too_many_pixels_are_refused_without_a_warning(tmp_path, pixels, monkeypatch):
    path = save(tmp_path / "a.png", pixels)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert load(path).shape == (3, 7, 5)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(CaseError, match="has too many pixels") as error:
        load(path)
    assert str(path) in str(error.value)


def test_max_voxels_can_be_lowered(tmp_path, pixels):
    path = save(tmp_path / "a.png", pixels)
    with pytest.raises(GeometryError, match="limit is 34"):
        load(path, max_voxels=34)


def write_tiff(path, array, *, bitspersample=None, **options):
    """Write by tifffile; pixels of few bits are packed here, which imagecodecs of Python 3.10 cannot."""
    tifffile = pytest.importorskip("tifffile")
    if bitspersample is None:
        tifffile.imwrite(path, array, **options)
        return
    bits = (array[..., None] >> np.arange(bitspersample)[::-1]) & 1
    rows = np.packbits(bits.reshape(len(array), -1).astype(np.uint8), axis=1)
    shape, dtype = array.shape, array.dtype
    tifffile.imwrite(path, iter([rows.tobytes()]), shape=shape, dtype=dtype, bitspersample=bitspersample, **options)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_few_bits_are_shades_or_the_labels_themselves(tmp_path, bits, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        png_of_one_row(path, 4, bits, 0, {2: b"\x1b", 4: b"\x01\x23"}[bits])
    else:
        write_tiff(path, np.arange(4, dtype=np.uint8)[None], bitspersample=bits, photometric="minisblack")
    assert load(path, label=True).numpy().ravel().tolist() == [0, 1, 2, 3]
    assert load(path).numpy().ravel().tolist() == [n * 255 // (2**bits - 1) for n in range(4)]


def test_16_bit_grey_with_a_transparent_value_keeps_its_values_or_is_refused(tmp_path):
    row = struct.pack(">3H", 1, 700, 65000)
    path = png_of_one_row(tmp_path / "a.png", 3, 16, 0, row, (b"tRNS", struct.pack(">H", 5)))
    assert load(path).numpy().ravel().tolist() == [1, 700, 65000]
    path = png_of_one_row(tmp_path / "b.png", 3, 16, 0, row, (b"tRNS", struct.pack(">H", 700)))
    with pytest.raises(CaseError, match="1 transparent pixels of 3"):
        load(path)


SHAPE = (5, 7)
TWO_VALUES = "2 values per pixel|cannot identify"  # the latter from Pillow before 13


def numbers(dtype, *channels):
    """Values over the whole range of a type, `(y, x[, C])`."""
    generator = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return generator.normal(0, 100, (*SHAPE, *channels)).astype(dtype)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, (*SHAPE, *channels), dtype=dtype, endpoint=True)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (numbers(np.uint8), {}),
        (numbers(np.int8), {}),
        (numbers(np.uint16), {}),
        (numbers(np.uint16), {"byteorder": ">"}),
        (numbers(np.uint16) >> 4, {"bitspersample": 12}),
        (numbers(np.int16), {}),
        (numbers(np.uint32), {}),
        (numbers(np.uint32), {"compression": "zlib"}),
        (numbers(np.int32), {}),
        (numbers(np.float32), {}),
        (numbers(np.uint8, 3), {"photometric": "rgb"}),
        (numbers(np.uint8, 3), {"photometric": "rgb", "tile": (16, 16)}),
        (numbers(np.uint8, 3), {"photometric": "rgb", "bigtiff": True}),
        (numbers(np.uint8, 3), {"photometric": "rgb", "compression": "lzw", "tile": (16, 16)}),
        (numbers(np.uint8, 3), {"photometric": "rgb", "compression": "zlib", "predictor": True}),
        (numbers(np.uint8, 3), {"photometric": "rgb", "compression": "zstd"}),
        (numbers(np.uint8, 3), {"photometric": "rgb", "planarconfig": "separate"}),
    ],
    ids=lambda item: f"{item.dtype}-{item.ndim}" if isinstance(item, np.ndarray) else "-".join(map(str, item.values())),
)
def test_a_tiff_of_any_make_keeps_its_values(tmp_path, array, options):
    path = tmp_path / "a.tif"
    separate = options.get("planarconfig") == "separate"
    write_tiff(path, np.moveaxis(array, -1, 0) if separate else array, **options)
    assert np.array_equal(load(path).numpy(), channel_first(array).astype(np.float32))
    if array.ndim == 2 and array.dtype.kind != "f" and array.max() <= np.iinfo(np.int32).max:
        assert np.array_equal(load(path, label=True).numpy(), channel_first(array))


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (numbers(np.uint16, 3), {"photometric": "rgb"}, "16 bit color"),
        (numbers(np.uint8, 4), {"photometric": "rgb", "extrasamples": ["unspecified"]}, "4 values per pixel"),
        (numbers(np.uint8, 2), {"photometric": "minisblack", "planarconfig": "contig"}, TWO_VALUES),
        (numbers(np.uint16), {"photometric": "miniswhite"}, "white as 0"),
        (numbers(np.uint8, 4)[None].repeat(3, 0)[..., 0], {"photometric": "minisblack"}, "3 pages"),
        (numbers(np.float64), {}, "cannot be read"),
        *(
            (
                numbers(np.uint8),
                {"compression": packing, "extratags": [(274, "H", 1, turn, True)]},
                f"orientation {turn}",
            )
            for packing in (None, "zlib")
            for turn in (2, 3, 6, 8)
        ),
    ],
)
def test_what_pillow_would_read_otherwise_than_stored_is_refused(tmp_path, array, options, message):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, **options)
    with pytest.raises(CaseError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"), [({"photometric": "miniswhite"}, "white as 0"), ({}, "lossy compression")]
)
def test_labels_that_a_tiff_would_change_are_refused(tmp_path, options, message):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    if options:
        tifffile.imwrite(path, numbers(np.uint8), **options)
    else:
        save(path, numbers(np.uint8), compression="jpeg")
    assert load(path).shape == (1, 7, 5)
    with pytest.raises(CaseError, match=message) as error:
        load(path, label=True)
    assert str(path) in str(error.value)


@pytest.mark.data
@pytest.mark.skipif(not SLIDES.is_dir(), reason=f"real slides are not in {SLIDES}")
def test_a_real_pyramid_is_no_picture():
    with pytest.raises(CaseError, match="4 pages"):
        load(SLIDES / "boxes.tiff")
