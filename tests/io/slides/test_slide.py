"""Slides against tifffile's own reading, and against themselves in other pieces."""

from __future__ import annotations

import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.uid import CTImageStorage

from medseg.errors import CaseError, RequestError
from medseg.io.slides import levels
from medseg.io.slides import slide as slide_module
from medseg.io.slides.slide import open_slide
from medseg.io.slides.tissue import find_tissue
from tests.io.conftest import write_dicom_slide

tifffile = pytest.importorskip("tifffile", reason="slides are made and read by tifffile, of the extra 'slides'")
pytest.importorskip("openslide", reason="needs the extra 'slides'")

WSI = Path(__file__).parents[4] / "shared" / "data" / "awkward" / "wsi"
needs_data = pytest.mark.skipif(not WSI.is_dir(), reason=f"real slides are not in {WSI}")


def picture(width=1300, height=900, seed=0):
    """A smooth color picture with noise, `(y, x, 3)`."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = 128 + 90 * np.sin(x / 37)[..., None] * np.cos(y / 23)[..., None] * np.array([1, 0.5, -1])
    return np.clip(smooth + generator.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def shrink(pixels, factor):
    height, width = (size // factor * factor for size in pixels.shape[:2])
    parts = pixels[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return parts.mean(axis=(1, 3)).round().astype(np.uint8)


def write_pyramid(path, pixels, *, mpp=0.25, factors=(4, 16), tile=(128, 128)):
    """Write a generic tiled TIFF whose levels are pages, as OpenSlide reads it."""
    tags = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    with tifffile.TiffWriter(path) as writer:
        for number, level in enumerate((pixels, *(shrink(pixels, factor) for factor in factors))):
            writer.write(level, tile=tile, photometric="rgb", subfiletype=1 if number else 0, metadata=None, **tags)
    return path


def write_ome(path, pixels, *, mpp=0.25, unit="µm", factors=(2, 4)):
    """Write an OME-TIFF whose smaller levels are sub-IFDs."""
    sizes = {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": unit, "PhysicalSizeY": mpp, "PhysicalSizeYUnit": unit}
    with tifffile.TiffWriter(path, ome=True) as writer:
        options = {"tile": (128, 128), "photometric": "rgb"}
        writer.write(pixels, subifds=len(factors), metadata={"axes": "YXS", **(sizes if mpp else {})}, **options)
        for factor in factors:
            writer.write(shrink(pixels, factor), subfiletype=1, **options)
    return path


def planes(pixels):
    """`(y, x, 3)` as the project has it, `(3, x, y)`."""
    return pixels.transpose(2, 1, 0)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tiff", picture())


def whole(slide):
    return slide.read(0, slide.shape[1], 0, slide.shape[2])


def test_the_finest_level_is_what_is_stored(pyramid):
    with open_slide(pyramid) as slide:
        assert slide.backend == "openslide"
        assert slide.shape == (3, 1300, 900)
        assert slide.mpp == pytest.approx((0.25, 0.25))
        assert slide.scale == (1.0, 1.0)
        assert np.array_equal(whole(slide), planes(picture()))
        assert np.array_equal(slide.read(1000, 1300, 3, 700), planes(picture())[:, 1000:1300, 3:700])


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("backend", ["openslide", "tiffslide"])
def test_a_stored_level_is_what_is_stored(pyramid, level, backend, monkeypatch):
    only(monkeypatch, backend)
    stored = tifffile.imread(pyramid, key=level)
    with open_slide(pyramid, level=level) as slide:
        assert slide.backend == backend
        assert slide.scale == ((4, 4), (16, 16))[level - 1]
        assert slide.mpp == pytest.approx((0.25 * slide.scale[0],) * 2)
        assert np.array_equal(whole(slide), planes(stored))


def test_a_resolution_next_to_a_stored_one_is_the_stored_one(pyramid):
    with open_slide(pyramid, microns_per_pixel=1.01) as slide:
        assert slide.mpp == pytest.approx((1.0, 1.0))
        assert np.array_equal(whole(slide), planes(tifffile.imread(pyramid, key=1)))


@pytest.mark.parametrize(("microns", "level", "times"), [(0.5, 0, 2), (0.75, 0, 3), (2.0, 1, 2), (8.0, 2, 2)])
def test_another_resolution_is_the_mean_over_the_nearest_finer_level(pyramid, microns, level, times):
    stored = tifffile.imread(pyramid, key=level).astype(np.float64)
    height, width = stored.shape[:2]
    with open_slide(pyramid, microns_per_pixel=microns) as slide:
        assert slide.shape == (3, -(-width // times), -(-height // times))
        assert slide.mpp == pytest.approx((microns, microns))
        pixels = whole(slide)
    whole_height, whole_width = height // times * times, width // times * times
    blocks = stored[:whole_height, :whole_width].reshape(height // times, times, width // times, times, 3)
    expected = planes(blocks.mean(axis=(1, 3)))
    found = pixels[:, : expected.shape[1], : expected.shape[2]]
    assert np.abs(found - expected).max() <= 0.5 + 1e-4


def test_an_uneven_reduction_keeps_every_bit_of_light(pyramid):
    """The mean over the slide is that of its stored pixels, up to rounding, whatever the factor."""
    with open_slide(pyramid, microns_per_pixel=0.25 * 1300 / 577) as slide:
        assert slide.shape[1] == 577
        edge = slide.shape[2] * 1300 / 577 - 900
        pixels = whole(slide)
    weights = np.ones(pixels.shape[2])
    weights[-1] = 1 - edge / (1300 / 577)
    mean = (pixels * weights).sum(axis=(1, 2)) / weights.sum() / 577
    assert mean == pytest.approx(picture().mean(axis=(0, 1)), abs=0.02)


def test_a_finer_resolution_is_interpolated_between_pixel_centers(tmp_path):
    ramp = np.broadcast_to((np.arange(200, dtype=np.uint8))[None, :, None], (150, 200, 3))
    with open_slide(write_pyramid(tmp_path / "a.tiff", ramp, factors=()), microns_per_pixel=0.125) as slide:
        assert slide.shape == (3, 400, 300)
        pixels = whole(slide)[0, :, 7].astype(np.float64)
    assert np.abs(pixels - np.clip((np.arange(400) + 0.5) / 2 - 0.5, 0, 199)).max() <= 0.5


@pytest.mark.parametrize("microns", [0.25, 0.125, 0.33, 0.5, 1.0, 1.7, 4.0, 5.1])
@pytest.mark.parametrize("backend", ["openslide", "tiffslide"])
def test_a_pixel_has_one_value_whatever_it_is_read_with(tmp_path, microns, backend, monkeypatch):
    """Also where the levels' factors are not whole, so that OpenSlide interpolates."""
    only(monkeypatch, backend)
    monkeypatch.setattr(slide_module, "_BLOCK", 128)
    path = write_pyramid(tmp_path / "a.tiff", picture(701, 499), factors=(3, 7), tile=(64, 64))
    generator = np.random.default_rng(1)
    with open_slide(path, microns_per_pixel=microns) as slide:
        _, width, height = slide.shape
        at_once = whole(slide)
        for _ in range(25):
            x0, x1 = sorted(generator.choice(width + 1, 2, replace=False))
            y0, y1 = sorted(generator.choice(height + 1, 2, replace=False))
            assert np.array_equal(slide.read(x0, x1, y0, y1), at_once[:, x0:x1, y0:y1])
    monkeypatch.setattr(slide_module, "_CACHE_BYTES", 0)
    monkeypatch.setattr(slide_module, "_PIECE", 100)
    with open_slide(path, microns_per_pixel=microns) as slide:
        assert np.array_equal(whole(slide), at_once)


def test_threads_read_what_one_reader_reads(pyramid):
    with open_slide(pyramid, microns_per_pixel=0.6) as slide:
        at_once = whole(slide)
        wrong = []

        def look(first):
            for x in range(first, 500, 40):
                if not np.array_equal(slide.read(x, x + 30, 0, 200), at_once[:, x : x + 30, :200]):
                    wrong.append(x)

        threads = [threading.Thread(target=look, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_ome_tiff_levels_and_pixel_size_are_found(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", picture())
    with open_slide(path, microns_per_pixel=1.0) as slide:
        assert slide.backend == "tiffslide"
        assert slide.level_sizes == ((1300, 900), (650, 450), (325, 225))
        assert slide.mpp == pytest.approx((1.0, 1.0))
        assert np.array_equal(whole(slide), planes(shrink(picture(), 4)))


@pytest.mark.parametrize(("size", "unit"), [(250.0, "nm"), (0.00025, "mm")])
def test_units_of_ome_are_heeded(tmp_path, size, unit):
    with open_slide(write_ome(tmp_path / "a.tif", picture(300, 200), mpp=size, unit=unit)) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.25))


def test_a_dicom_slide_is_a_folder_or_one_of_its_files(tmp_path):
    file = write_dicom_slide(tmp_path / "a.dcm", picture(300, 200))
    write_dicom_slide(tmp_path / "b.dcm", shrink(picture(300, 200), 2), mpp=1.0, number=1)
    (tmp_path / "notes.txt").write_text("of no use")
    for path in (tmp_path, file):
        with open_slide(path, microns_per_pixel=1.0) as slide:
            assert slide.level_sizes == ((300, 200), (150, 100))
            assert slide.mpp == pytest.approx((1.0, 1.0))
            assert np.array_equal(whole(slide), planes(shrink(picture(300, 200), 2)))
    write_dicom_slide(tmp_path / "c.dcm", picture(300, 200), series="1.2.4")
    with pytest.raises(CaseError, match="2 DICOM slides"):
        open_slide(tmp_path)


FLAVORS = {
    "LABEL": "the label image",
    "OVERVIEW": "the overview image",
    "LOCALIZER": "the overview image",
    "THUMBNAIL": "the thumbnail",
}


def test_the_label_an_overview_and_a_thumbnail_are_no_slides(tmp_path):
    for number, (flavor, what) in enumerate(FLAVORS.items(), start=5):
        file = write_dicom_slide(tmp_path / f"{flavor}.dcm", picture(100, 80), number=number, flavor=flavor)
        with pytest.raises(CaseError, match=f"{flavor}.dcm is {what} of a slide: give a file of the slide"):
            open_slide(file)
        with pytest.raises(CaseError, match="has no DICOM slide"):
            open_slide(tmp_path)
    write_dicom_slide(tmp_path / "z.dcm", picture(300, 200))
    with open_slide(tmp_path) as slide:
        assert slide.shape == (3, 300, 200)
        assert np.array_equal(whole(slide), planes(picture(300, 200)))


def test_other_dicom_is_no_slide_and_named_by_its_class(tmp_path):
    file = write_dicom_slide(tmp_path / "a.dcm", picture(100, 80))
    dataset = dcmread(file)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.save_as(file, enforce_file_format=True)
    with pytest.raises(CaseError, match=r"a\.dcm has the SOP class CT Image Storage: expected VL Whole Slide"):
        open_slide(file)
    with pytest.raises(CaseError, match="has no DICOM slide"):
        open_slide(tmp_path)


def test_a_compressed_dicom_slide_is_read_and_one_with_a_wrong_table_of_frames_refused(tmp_path):
    """OpenSlide believes the table; with most wrong ones it ends the process."""
    good = write_dicom_slide(tmp_path / "a.dcm", picture(300, 200), jpeg=True)
    with open_slide(good) as slide:
        assert np.abs(whole(slide) - planes(picture(300, 200)).astype(np.int16)).mean() < 4
    data = good.read_bytes()
    table = data.index(b"\xe0\x7f\x10\x00OB") + 12
    frames = struct.unpack_from("<I", data, table + 4)[0] // 4
    places = struct.unpack_from(f"<{frames}I", data, table + 8)
    first = table + 8 + 4 * frames
    damages = [
        (table + 8 + 4 * 3, struct.pack("<I", places[3] + 2)),
        (table + 8 + 4 * 3, struct.pack("<I", 0xFFFFFFF0)),
        (table + 8 + 4 * 3, struct.pack("<I", places[2])),
        (table, b"\xfe\xff\x00\xe1"),
        (first + places[5] + 4, struct.pack("<I", 0x7FFFFFFF)),
        (first + places[5], b"\0\0\0\0"),
        (data.index(b"\x28\x00\x08\x00IS") + 8, b"99"),
    ]
    for place, value in damages:
        good.write_bytes(data[:place] + value + data[place + len(value) :])
        with pytest.raises(CaseError, match=r"a\.dcm"):
            open_slide(good)
    for length in (len(data) - 100, first + places[7] + 4):
        good.write_bytes(data[:length])
        with pytest.raises(CaseError, match=r"a\.dcm"):
            open_slide(good)


def test_an_uncompressed_dicom_slide_that_is_cut_off_is_refused(tmp_path):
    path = write_dicom_slide(tmp_path / "a.dcm", picture(300, 200))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CaseError, match=r"is truncated: .* bytes of pixel data"):
        open_slide(path)


def test_a_plain_picture_is_a_slide_of_one_level(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(400, 300)).save(path)
    with pytest.raises(CaseError, match="give default_mpp"):
        open_slide(path, microns_per_pixel=1.0)
    with open_slide(path) as slide:
        assert slide.backend == "pillow"
        assert slide.mpp is None
        assert np.array_equal(whole(slide), planes(picture(400, 300)))
    with open_slide(path, microns_per_pixel=1.0, default_mpp=0.5) as slide:
        assert slide.shape == (3, 200, 150)


@pytest.mark.parametrize("mpp", [None, 25400 / 72], ids=["none", "72 dpi"])
def test_pixels_of_no_known_size_need_a_default(tmp_path, mpp):
    path = write_pyramid(tmp_path / "a.tiff", picture(300, 200), mpp=mpp)
    with pytest.raises(CaseError, match="give default_mpp") as error:
        open_slide(path, microns_per_pixel=1.0)
    assert str(path) in str(error.value)
    with open_slide(path, microns_per_pixel=1.0, default_mpp=0.5) as slide:
        assert slide.mpp == pytest.approx((1.0, 1.0))
        assert slide.shape == (3, 150, 100)


def test_what_the_file_says_goes_before_the_default(pyramid):
    with open_slide(pyramid, microns_per_pixel=1.0, default_mpp=99.0) as slide:
        assert slide.scale == (4.0, 4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microns_per_pixel": 1.0, "level": 0}, "not both"),
        ({"microns_per_pixel": 0.0}, "expected a positive number"),
        ({"microns_per_pixel": float("nan")}, "expected a positive number"),
        ({"default_mpp": -1.0}, "expected a positive number"),
        ({"level": -1}, "the finest"),
        ({"level": 3}, "expected 0 to 2"),
        ({"microns_per_pixel": 0.05}, "the limit of upsampling is 4 times"),
    ],
)
def test_resolutions_that_cannot_be_are_refused(pyramid, options, message):
    with pytest.raises(RequestError, match=message):
        open_slide(pyramid, **options)


@pytest.mark.parametrize("window", [(0, 0, 0, 5), (-1, 5, 0, 5), (0, 1301, 0, 5), (5, 2, 0, 5), (0, 5, 899, 901)])
def test_windows_outside_are_refused(pyramid, window):
    with open_slide(pyramid) as slide, pytest.raises(RequestError, match="1300 x 900"):
        slide.read(*window)


def test_one_read_has_a_limit(pyramid, monkeypatch):
    monkeypatch.setattr(slide_module, "MAX_READ_PIXELS", 9999)
    with open_slide(pyramid) as slide:
        assert slide.read(0, 99, 0, 100).shape == (3, 99, 100)
        with pytest.raises(RequestError, match=r"the limit is 9,999"):
            slide.read(0, 100, 0, 100)


def claim(path, width, height):
    """Overwrite the size in the first directory of a small-endian TIFF."""
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", data, entry)
        if tag in (256, 257):
            struct.pack_into("<HII", data, entry + 2, 4, 1, width if tag == 256 else height)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("backend", ["openslide", "tiffslide"])
def test_a_huge_claim_ends_in_an_error_and_not_in_memory(tmp_path, backend, monkeypatch):
    only(monkeypatch, backend)
    path = claim(write_pyramid(tmp_path / "a.tiff", picture(300, 200), factors=()), 2_000_000, 2_000_000)
    with pytest.raises(CaseError) as error:
        look_through(path)
    assert str(path) in str(error.value)


def look_through(path):
    with open_slide(path) as slide:
        with pytest.raises(RequestError, match="the limit is"):
            slide.read(0, 1_000_000, 0, 1_000_000)
        slide.thumbnail(64)


@pytest.mark.parametrize("suffix", [".svs", ".tiff", ".ndpi", ".dcm", ".png"])
@pytest.mark.parametrize("content", [b"", b"no slide", b"II*\0\x08\0\0\0\0\0"], ids=["empty", "text", "no pages"])
def test_broken_files_are_refused_by_name(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CaseError) as error:
        open_slide(path)
    assert str(path) in str(error.value)


def test_a_cut_off_slide_is_an_error_at_opening_or_reading(tmp_path, pyramid):
    data = pyramid.read_bytes()
    for length in range(1000, len(data), len(data) // 12):
        path = tmp_path / "a.tiff"
        path.write_bytes(data[:length])
        with pytest.raises(CaseError):
            read_all(path)


def read_all(path):
    with open_slide(path) as slide:
        return whole(slide)


def test_16_bit_and_many_channels_are_refused(tmp_path):
    for name in ("deep.tif", "deep.ome.tif"):
        deep = tmp_path / name
        tifffile.imwrite(deep, picture(300, 200).astype(np.uint16) * 256, tile=(64, 64), photometric="rgb")
        with pytest.raises(CaseError, match=r"8 bits per channel|8 bit color"):
            open_slide(deep)
    stains = tmp_path / "stains.ome.tif"
    tifffile.imwrite(stains, np.zeros((5, 200, 300), np.uint8), tile=(64, 64), metadata={"axes": "CYX"})
    with pytest.raises(CaseError, match="5 channels"):
        open_slide(stains)


def test_missing_files_and_folders_are_named(tmp_path):
    for path, message in ((tmp_path / "no.svs", "does not exist"), (tmp_path, "no DICOM slide")):
        with pytest.raises(CaseError, match=message) as error:
            open_slide(path)
        assert str(path) in str(error.value)


def only(monkeypatch, *names):
    """Make believe that only these libraries are installed."""
    monkeypatch.setattr(levels, "_installed", lambda name: name in names)


def test_without_the_extra_the_error_names_it(tmp_path, pyramid, monkeypatch):
    for name in ("openslide", "tiffslide"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CaseError, match="medseg\\[slides\\]"):
        open_slide(pyramid)
    (tmp_path / "a.svs").write_bytes(pyramid.read_bytes())
    with pytest.raises(CaseError, match="medseg\\[slides\\]"):
        open_slide(tmp_path / "a.svs")
    Image.fromarray(picture(40, 30)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.shape == (3, 40, 30)


@pytest.mark.parametrize(("factors", "tolerance"), [((), 0.5), ((5,), 1.0)])
def test_the_thumbnail_is_the_mean_of_the_slide(tmp_path, factors, tolerance):
    with open_slide(write_pyramid(tmp_path / "a.tiff", picture(), factors=factors)) as slide:
        small = slide.thumbnail(130)
        assert slide.thumbnail(5000).shape == slide.shape
        with pytest.raises(RequestError, match="Invalid size 0 of a thumbnail"):
            slide.thumbnail(0)
    expected = planes(picture().astype(np.float64).reshape(90, 10, 130, 10, 3).mean(axis=(1, 3)))
    assert small.shape == expected.shape
    assert np.abs(small - expected).max() <= tolerance


def glass_with_tissue(color=(238, 236, 230)):
    """A slide with two pieces of tissue, dust, noise, and a black border; and where the pieces are."""
    generator = np.random.default_rng(0)
    pixels = np.full((600, 800, 3), color, np.float64) + generator.normal(0, 2, (600, 800, 3))
    y, x = np.mgrid[:600, :800]
    truth = ((x - 250) / 120) ** 2 + ((y - 300) / 180) ** 2 < 1
    truth |= ((x - 600) / 90) ** 2 + ((y - 200) / 60) ** 2 < 1
    pixels[truth] = np.array([200, 150, 190]) + generator.normal(0, 15, (int(truth.sum()), 3))
    pixels[400:403, 700:703] = 100
    pixels[:40] = 0
    return np.clip(pixels, 0, 255).astype(np.uint8), truth


@pytest.mark.parametrize("color", [(238, 236, 230), (255, 255, 255), (228, 222, 200)])
def test_tissue_is_found_on_any_glass_and_dust_and_black_borders_are_not(color):
    pixels, truth = glass_with_tissue(color)
    mask = find_tissue(planes(pixels), margin=0).T
    both = (mask & truth).sum()
    assert 2 * both / (mask.sum() + truth.sum()) > 0.98
    assert not mask[:40].any()
    assert not mask[390:410, 690:710].any()
    wide = find_tissue(planes(pixels), margin=3).T
    assert (wide | truth).sum() == wide.sum()


def test_empty_glass_has_no_tissue_and_a_full_field_is_all_tissue():
    generator = np.random.default_rng(0)
    glass = np.clip(generator.normal(240, 2, (3, 200, 150)), 0, 255).astype(np.uint8)
    assert not find_tissue(glass).any()
    assert find_tissue((glass * 0.6).astype(np.uint8)).all()
    assert not find_tissue(np.zeros_like(glass)).any()
    with pytest.raises(RequestError, match="Invalid margin -1"):
        find_tissue(glass, margin=-1)


def test_the_tissue_of_a_slide_is_asked_by_window(tmp_path):
    pixels, truth = glass_with_tissue()
    with open_slide(write_pyramid(tmp_path / "a.tiff", pixels, factors=(2, 4)), microns_per_pixel=0.5) as slide:
        tissue = slide.tissue(max_size=200, margin=0, min_pixels=8)
    assert tissue.mask.shape == (200, 150)
    assert tissue.scale == (2.0, 2.0)
    assert tissue.size == (400, 300)
    assert tissue.fraction == pytest.approx(truth.mean(), rel=0.05)
    assert tissue.touches(100, 130, 140, 160)
    assert not tissue.touches(350, 400, 250, 300)
    assert not tissue.touches(0, 400, 0, 15)


@pytest.mark.data
@needs_data
class TestRealSlides:
    PATH = WSI / "cmu-1-small-region.svs"

    @pytest.mark.parametrize("backend", ["openslide", "tiffslide"])
    def test_the_finest_level_is_that_of_other_readers(self, backend, monkeypatch):
        only(monkeypatch, backend)
        stored = planes(tifffile.imread(self.PATH, key=0)).astype(np.int16)
        with open_slide(self.PATH) as slide:
            assert slide.shape == stored.shape
            assert slide.mpp == (0.499, 0.499)
            # Lossy JPEG may be decoded with another last bit.
            assert np.abs(whole(slide) - stored).max() <= (0 if backend == "tiffslide" else 4)

    def test_a_resolution_next_to_the_stored_one_is_the_stored_one(self):
        with open_slide(self.PATH, microns_per_pixel=0.5) as slide:
            assert slide.scale == (1.0, 1.0)

    def test_half_the_resolution_is_the_mean_of_four_pixels(self):
        with open_slide(self.PATH) as slide:
            stored = whole(slide)[:, :, :2966].astype(np.float64)
        with open_slide(self.PATH, microns_per_pixel=0.998) as slide:
            assert slide.shape == (3, 1110, 1484)
            pixels = whole(slide)[:, :, :1483]
            assert np.array_equal(slide.read(301, 700, 77, 990), pixels[:, 301:700, 77:990])
        expected = stored.reshape(3, 1110, 2, 1483, 2).mean(axis=(2, 4))
        assert np.abs(pixels - expected).max() <= 0.5

    def test_its_tissue_is_what_is_not_white(self):
        with open_slide(self.PATH) as slide:
            tissue = slide.tissue(max_size=512)
            small = slide.thumbnail(512)
        white = small.min(axis=0) > 235
        assert 0.2 < tissue.fraction < 0.95
        assert tissue.mask[white].mean() < 0.25
        assert tissue.mask[small.min(axis=0) < 190].mean() > 0.99

    def test_a_pyramid_with_cut_levels_is_read_level_by_level(self):
        path = WSI / "boxes.tiff"
        for number in range(4):
            with open_slide(path, level=number) as slide:
                assert slide.scale == (2.0**number, 2.0**number)
                stored = planes(tifffile.imread(path, key=number)).astype(np.int16)
                assert np.abs(whole(slide) - stored).max() <= 4
                assert slide.mpp is None

    def test_a_broken_slide_is_refused(self):
        with pytest.raises(CaseError, match=r"broken\.svs"):
            open_slide(WSI / "broken.svs")
