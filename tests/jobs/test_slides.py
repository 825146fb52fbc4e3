"""Slides through a bundle: against pictures of the same pixels, and what becomes of slides that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

import medseg
from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle
from medseg.errors import RequestError
from medseg.io.slides.geojson import read_geojson
from medseg.io.slides.slide import open_slide
from medseg.networks import UNet
from tests.io.conftest import write_dicom_slide

tifffile = pytest.importorskip("tifffile", reason="slides are made by tifffile, of the extra 'slides'")
pytest.importorskip("openslide", reason="needs the extra 'slides'")

WSI = Path(__file__).parents[3] / "shared" / "data" / "awkward" / "wsi"
LABELS = {1: "small", 2: "large"}
BLOCKS: dict[str, Any] = {
    "intensity": {
        "ScaleIntensityd": [{"_target_": "monai.transforms.ScaleIntensityd", "keys": "image"}],
        "NormalizeIntensityd": [{"_target_": "monai.transforms.NormalizeIntensityd", "keys": "image"}],
    },
}


def rgb_source(source: dict[str, Any], **knobs: Any) -> dict[str, Any]:
    source.update(name="blobs_rgb_unet", template="rgb_image", channels={"0": "r", "1": "g", "2": "b"})
    source["network_def"].update(spatial_dims=2, in_channels=3, norm="batch")
    source["knobs"] = {"patch_size": [64, 64], "roi_size": [96, 80], "microns_per_pixel": 1.0, **knobs}
    return source


def with_weights(bundle: Bundle) -> Bundle:
    """Give a bundle random weights that use all classes."""
    torch.manual_seed(3)
    definition = json.loads(bundle.config_path("inference").read_text())["network_def"]
    network = UNet(**{key: value for key, value in definition.items() if key != "_target_"})
    bundle.weights.parent.mkdir()
    torch.save(network.state_dict(), bundle.weights)
    build(bundle)
    return bundle


@pytest.fixture
def rgb_bundle(make_bundle: Any, tiny_source: dict[str, Any]) -> Bundle:
    return with_weights(make_bundle(rgb_source(tiny_source)))


def picture(width: int = 140, height: int = 200) -> np.ndarray:
    """Colored blocks on glass, `(y, x, 3)`."""
    generator = np.random.default_rng(7)
    pixels = np.full((height, width, 3), 243, np.uint8)
    tissue = generator.integers(40, 200, (height // 10, width // 20, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    pixels[height // 4 : height // 4 + height // 2, : width // 2] = tissue[: height // 2, : width // 2]
    return pixels


def write_slide(path: Path, pixels: np.ndarray, *, mpp: float | None = 0.5) -> Path:
    """Write a pyramid whose second level is `pixels`, at twice the micrometers per pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tags: dict[str, Any] = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as writer:
        writer.write(pixels.repeat(2, 0).repeat(2, 1), **options, **tags)
        writer.write(pixels, subfiletype=1, **options, **tags)
    return path


def rasterized(polygons: Path, slide: Path, **options: Any) -> np.ndarray:
    with open_slide(slide, microns_per_pixel=1.0, **options) as opened:
        shape, scale = opened.shape[1:], opened.scale
    return read_geojson(polygons, shape, labels=LABELS, scale=scale)


def area(geometry: dict[str, Any]) -> float:
    """Return the area of a polygon without its holes, by the shoelace formula."""
    parts = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    rings = [np.asarray(ring) for part in parts for ring in part]
    return float(sum((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2 for x, y in (ring.T for ring in rings)))


def test_a_slide_gets_the_labels_of_a_picture_of_the_same_pixels(rgb_bundle: Bundle, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "in" / "a.svs", picture())
    Image.fromarray(picture()).save(tmp_path / "in" / "b.png")
    told: list[float] = []
    manifest = medseg.predict(
        rgb_bundle.root,
        tmp_path / "in",
        tmp_path / "out",
        settings={"skip_glass": False, "output_format": "tiff"},
        report=lambda done, total, note: told.append(done / total),
    )
    assert manifest.exit_code == 0
    assert {record.output for record in manifest.cases.values()} == {"a.geojson", "b.tif"}
    assert told == sorted(told)
    assert told[-1] == 1
    with Image.open(tmp_path / "out" / "b.tif") as mask:
        expected = np.asarray(mask).T
    assert set(np.unique(expected)) == {0, 1, 2}
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif").T, expected)
    assert np.array_equal(rasterized(tmp_path / "out" / "a.geojson", slide), expected)


def test_a_dicom_slide_in_a_folder_gets_the_labels_of_its_pixels(rgb_bundle: Bundle, tmp_path: Path) -> None:
    pixels, folder = picture(), tmp_path / "in" / "patient"
    write_dicom_slide(folder / "fine.dcm", pixels.repeat(2, 0).repeat(2, 1), mpp=0.5)
    write_dicom_slide(folder / "coarse.dcm", pixels, mpp=1.0, number=1)
    write_dicom_slide(folder / "label.dcm", pixels[:64, :64], number=2, flavor="LABEL")
    write_dicom_slide(folder / "overview.dcm", pixels[:64, :64], number=3, flavor="OVERVIEW")
    Image.fromarray(pixels).save(tmp_path / "in" / "b.png")
    settings = {"skip_glass": False, "output_format": "tiff"}
    manifest = medseg.predict(rgb_bundle.root, tmp_path / "in", tmp_path / "out", settings=settings)
    assert manifest.exit_code == 0, [record.error for record in manifest.cases.values()]
    assert {record.output for record in manifest.cases.values()} == {"patient.geojson", "b.tif"}
    with Image.open(tmp_path / "out" / "b.tif") as mask:
        expected = np.asarray(mask).T
    assert set(np.unique(expected)) == {0, 1, 2}
    assert np.array_equal(rasterized(tmp_path / "out" / "patient.geojson", folder), expected)
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "patient.tif").T, expected)
    single = medseg.predict(rgb_bundle.root, folder / "coarse.dcm", tmp_path / "single", settings=settings)
    assert list(single.cases) == ["coarse.geojson"]
    assert (tmp_path / "single" / "coarse.geojson").read_bytes() == (tmp_path / "out/patient.geojson").read_bytes()


def test_other_dicom_and_damaged_slides_are_failed_cases_with_the_reason(rgb_bundle: Bundle, tmp_path: Path) -> None:
    from pydicom import dcmread
    from pydicom.uid import CTImageStorage

    other = write_dicom_slide(tmp_path / "in" / "a" / "other.dcm", picture(), tile=64, series="1.2.4")
    dataset = dcmread(other)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.save_as(other, enforce_file_format=True)
    torn = write_dicom_slide(tmp_path / "in" / "b" / "torn.dcm", picture())
    torn.write_bytes(torn.read_bytes()[:-1000])
    manifest = medseg.predict(rgb_bundle.root, tmp_path / "in", tmp_path / "out")
    errors = {name: str(record.error) for name, record in manifest.cases.items()}
    assert errors.keys() == {"a.nii.gz", "b.geojson"}
    assert "without geometry" in errors["a.nii.gz"]
    assert "torn.dcm is truncated" in errors["b.geojson"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_glass_is_left_out_and_tissue_keeps_its_labels(rgb_bundle: Bundle, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.svs", picture(480, 600))
    windows = {}
    for skip in (True, False):
        seen: list[str] = []
        medseg.predict(
            rgb_bundle.root,
            slide,
            tmp_path / str(skip),
            settings={"skip_glass": skip, "output_format": "tiff"},
            announce=lambda name, forecast, seen=seen: seen.append(forecast),
        )
        windows[skip] = int(seen[0].split()[0])
    assert windows[True] < 0.7 * windows[False]
    skipped, whole = (tifffile.imread(tmp_path / name / "a.tif") for name in ("True", "False"))
    assert np.array_equal(skipped[150:450, :240], whole[150:450, :240])
    assert not skipped[:, 400:].any()


def test_a_tiff_is_a_slide_only_for_those_who_say_so(rgb_bundle: Bundle, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.tiff", picture())
    assert medseg.predict(rgb_bundle.root, slide, tmp_path / "x").exit_code == 1
    assert medseg.predict(rgb_bundle.root, slide, tmp_path / "y", settings={"tiff_slides": True}).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "y").iterdir()) == ["a.geojson", "manifest.json"]


def test_a_damaged_slide_is_reported_leaves_no_file_and_the_next_goes_on(rgb_bundle: Bundle, tmp_path: Path) -> None:
    write_slide(tmp_path / "in" / "b.svs", picture())
    content = write_slide(tmp_path / "in" / "a.svs", np.random.default_rng(0).integers(0, 200, (200, 140, 3), np.uint8))
    torn = bytearray(content.read_bytes())
    with tifffile.TiffFile(content) as file:
        tags = file.pages[1].tags["TileOffsets"]
        position = tags.valueoffset + 4 * (len(tags.value) - 1)
    torn[position : position + 4] = (len(torn) + 10**6).to_bytes(4, "little")
    content.write_bytes(torn)
    settings = {"skip_glass": False, "output_format": "tiff"}
    manifest = medseg.predict(rgb_bundle.root, tmp_path / "in", tmp_path / "out", settings=settings)
    assert manifest.exit_code == 1
    assert manifest.cases["a.geojson"].status == "failed"
    assert "a.svs" in str(manifest.cases["a.geojson"].error)
    assert manifest.cases["b.geojson"].status == "done"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.geojson", "b.tif", "manifest.json"]


def test_what_an_earlier_run_has_done_is_left_out(rgb_bundle: Bundle, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.svs", picture())
    medseg.predict(rgb_bundle.root, slide, tmp_path / "out")
    before = (tmp_path / "out" / "a.geojson").stat().st_mtime_ns
    medseg.predict(rgb_bundle.root, slide, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "a.geojson").stat().st_mtime_ns == before
    medseg.predict(rgb_bundle.root, slide, tmp_path / "out", resume=True, settings={"microns_per_pixel": 2.0})
    assert (tmp_path / "out" / "a.geojson").stat().st_mtime_ns > before


def test_a_slide_without_resolution_needs_to_be_told_it(rgb_bundle: Bundle, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.svs", picture(), mpp=None)
    manifest = medseg.predict(rgb_bundle.root, slide, tmp_path / "x")
    assert "--set slide_microns_per_pixel" in str(manifest.cases["a.geojson"].error)
    settings = {"slide_microns_per_pixel": 0.5}
    assert medseg.predict(rgb_bundle.root, slide, tmp_path / "y", settings=settings).exit_code == 0
    assert rasterized(tmp_path / "y" / "a.geojson", slide, default_mpp=0.5).any()


def test_a_slide_that_is_too_coarse_fails_alone(rgb_bundle: Bundle, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.svs", picture(), mpp=9.0)
    manifest = medseg.predict(rgb_bundle.root, slide, tmp_path / "out")
    assert "the limit of upsampling" in str(manifest.cases["a.geojson"].error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"microns_per_pixel": None}, "--mpp"),
        ({"microns_per_pixel": 0.0}, "above 0"),
        ({"slide_microns_per_pixel": "0.5 um"}, "above 0"),
        ({"output_format": "nifti"}, "as tiff, not as 'nifti'"),
    ],
)
def test_requests_that_cannot_be_are_refused_before_anything_is_written(
    rgb_bundle: Bundle, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    slide = write_slide(tmp_path / "in" / "a.svs", picture())
    with pytest.raises(RequestError, match=message):
        medseg.predict(rgb_bundle.root, slide, tmp_path / "out", settings=settings)
    assert list((tmp_path / "out").iterdir()) == []


def test_results_never_replace_a_slide_nor_each_other(rgb_bundle: Bundle, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.tif", picture())
    settings = {"tiff_slides": True, "output_format": "tiff"}
    with pytest.raises(RequestError, match="choose another folder"):
        medseg.predict(rgb_bundle.root, slide, tmp_path, settings=settings)
    write_slide(tmp_path / "a.svs", picture())
    with pytest.raises(RequestError, match="have the same mask name"):
        medseg.predict(rgb_bundle.root, tmp_path, tmp_path / "out", settings=settings)


def test_a_slides_label_image_and_a_pictures_mask_share_no_name(rgb_bundle: Bundle, tmp_path: Path) -> None:
    write_slide(tmp_path / "in" / "a.svs", picture())
    write_slide(tmp_path / "in" / "a.tif", picture())
    with pytest.raises(RequestError, match=r"would share the mask a\.tif"):
        medseg.predict(rgb_bundle.root, tmp_path / "in", tmp_path / "out", settings={"output_format": "tiff"})


@pytest.mark.parametrize("name", BLOCKS["intensity"])
def test_a_step_that_looks_at_more_than_a_pixel_is_refused_by_name(
    make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path, name: str
) -> None:
    source = rgb_source(tiny_source)
    bundle = with_weights(make_bundle({**source, "blocks": {"intensity": BLOCKS["intensity"][name]}}))
    slide = write_slide(tmp_path / "a.svs", picture())
    with pytest.raises(RequestError, match=f"{name} may need the whole image"):
        medseg.predict(bundle.root, slide, tmp_path / "out")


def test_normalization_by_constants_acts_pixel_by_pixel(
    make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path
) -> None:
    step = {"_target_": "monai.transforms.NormalizeIntensityd", "keys": "image", "subtrahend": 128.0, "divisor": 64.0}
    bundle = with_weights(make_bundle({**rgb_source(tiny_source), "blocks": {"intensity": [step]}}))
    slide = write_slide(tmp_path / "a.svs", picture())
    Image.fromarray(picture()).save(tmp_path / "a.png")
    medseg.predict(bundle.root, slide, tmp_path / "out", settings={"skip_glass": False})
    medseg.predict(bundle.root, tmp_path / "a.png", tmp_path / "out")
    with Image.open(tmp_path / "out" / "a.png") as mask:
        assert np.array_equal(rasterized(tmp_path / "out" / "a.geojson", slide), np.asarray(mask).T)


def test_a_bundle_for_volumes_says_what_takes_slides(trained: Bundle, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "a.svs", picture())
    manifest = medseg.predict(trained.root, slide, tmp_path / "out")
    (record,) = manifest.cases.values()
    assert "bundle for 2D color images" in str(record.error)
    write_dicom_slide(tmp_path / "dicom" / "a.dcm", picture())
    manifest = medseg.predict(trained.root, tmp_path / "dicom", tmp_path / "out")
    assert "needs a bundle for 2D color images" in str(manifest.cases["dicom.geojson"].error)


@pytest.mark.data
@pytest.mark.skipif(not WSI.is_dir(), reason=f"real slides are not in {WSI}")
class TestRealSlides:
    @pytest.mark.slow
    def test_an_aperio_slide_gets_the_labels_of_its_pixels_as_a_picture(
        self, rgb_bundle: Bundle, tmp_path: Path
    ) -> None:
        slide = WSI / "cmu-1-small-region.svs"
        with open_slide(slide, microns_per_pixel=2.5) as opened:
            pixels, scale = opened.read(0, opened.shape[1], 0, opened.shape[2]), opened.scale
        Image.fromarray(pixels.transpose(2, 1, 0)).save(tmp_path / "whole.png")
        settings = {"output_format": "tiff", "overlap": 0.25, "microns_per_pixel": 2.5}
        assert medseg.predict(rgb_bundle.root, slide, tmp_path, settings=settings).exit_code == 0
        assert medseg.predict(rgb_bundle.root, tmp_path / "whole.png", tmp_path, settings=settings).exit_code == 0
        with Image.open(tmp_path / "whole.tif") as mask:
            expected = np.asarray(mask).T
        found = tifffile.imread(tmp_path / "cmu-1-small-region.tif").T
        features = json.loads((tmp_path / "cmu-1-small-region.geojson").read_text())["features"]
        for value, name in LABELS.items():
            own = [item["geometry"] for item in features if item["properties"]["classification"]["name"] == name]
            objects = sitk.ConnectedComponentImageFilter()
            objects.Execute(sitk.GetImageFromArray((found == value).astype(np.uint8)))
            assert len(own) == objects.GetObjectCount()
            assert sum(map(area, own)) == pytest.approx((found == value).sum() * scale[0] * scale[1], rel=1e-3)
        with open_slide(slide, microns_per_pixel=2.5) as opened:
            tissue = opened.tissue()
        assert tissue.mask.shape == found.shape
        assert np.array_equal(found[tissue.mask], expected[tissue.mask])

    @pytest.mark.slow
    def test_the_pixels_of_an_aperio_slide_stored_as_dicom_give_the_same_polygons(
        self, rgb_bundle: Bundle, tmp_path: Path
    ) -> None:
        slide = WSI / "cmu-1-small-region.svs"
        with open_slide(slide) as opened:
            pixels = opened.read(0, opened.shape[1], 0, opened.shape[2]).transpose(2, 1, 0)
        write_dicom_slide(tmp_path / "cmu" / "a.dcm", pixels, mpp=0.499, tile=240)
        write_dicom_slide(tmp_path / "cmu" / "b.dcm", pixels[:300, :300], number=1, flavor="LABEL")
        for source in (slide, tmp_path / "cmu"):
            manifest = medseg.predict(rgb_bundle.root, source, tmp_path, settings={"microns_per_pixel": 4.0})
            assert manifest.exit_code == 0
        polygons = [(tmp_path / name).read_bytes() for name in ("cmu-1-small-region.geojson", "cmu.geojson")]
        assert polygons[0] == polygons[1]

    def test_a_broken_slide_is_one_failed_case(self, rgb_bundle: Bundle, tmp_path: Path) -> None:
        manifest = medseg.predict(rgb_bundle.root, WSI / "broken.svs", tmp_path)
        assert manifest.exit_code == 1
        assert "broken.svs" in str(manifest.cases["broken.geojson"].error)
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
