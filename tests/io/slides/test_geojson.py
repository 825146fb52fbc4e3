"""GeoJSON against Pillow's filling of polygons, against itself, and against what QuPath writes and expects."""

from __future__ import annotations

import errno
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from medseg.errors import CaseError, OutputError, RequestError
from medseg.io.slides import geojson
from medseg.io.slides.components import ObjectMerger
from medseg.io.slides.geojson import GeoJSONStyle, GeoJSONWriter, read_geojson, write_geojson

NAMES = {1: "Tumor", 2: "Stroma", 3: "Necrosis"}


def blobs(shape=(90, 70), seed=0):
    """A label map with holes, objects in holes and corners that touch."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 4, (-(-shape[0] // 5), -(-shape[1] // 5)))
    labels = np.kron(coarse, np.ones((5, 5), int))[: shape[0], : shape[1]]
    labels[generator.random(shape) < 0.05] = 0
    return labels.astype(np.uint8)


def area(ring):
    x, y = np.array(ring[:-1]).T
    return 0.5 * (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()


def drawn(document, shape, factor):
    """The label map of a file of exact outlines, filled by Pillow on a plane three times as fine."""
    values = {name: value for value, name in NAMES.items()}
    labels = np.zeros(shape, int)
    for feature in document["features"]:
        parts = feature["geometry"]["coordinates"]
        parts = [parts] if feature["geometry"]["type"] == "Polygon" else parts
        inside = np.zeros((3 * shape[1], 3 * shape[0]), dtype=bool)
        for ring in (ring for part in parts for ring in part):
            plane = Image.new("1", (3 * shape[0], 3 * shape[1]))
            corners = (3 * np.array(ring) / factor - 0.5).tolist()
            ImageDraw.Draw(plane).polygon([tuple(corner) for corner in corners], fill=1)
            inside ^= np.asarray(plane)
        labels[inside[1::3, 1::3].T] = values[feature["properties"]["classification"]["name"]]
    return labels


@pytest.mark.parametrize("connectivity", [4, 8])
def test_filling_the_polygons_gives_back_the_mask(tmp_path, connectivity):
    labels = blobs()
    style = GeoJSONStyle(NAMES, scale=(4.0, 4.0))
    count = write_geojson(labels, tmp_path / "a.geojson", style, connectivity=connectivity)
    document = json.loads((tmp_path / "a.geojson").read_text())
    assert len(document["features"]) == count > 20
    assert np.array_equal(drawn(document, labels.shape, 4), labels)
    kinds = {feature["geometry"]["type"] for feature in document["features"]}
    assert kinds == ({"Polygon"} if connectivity == 4 else {"Polygon", "MultiPolygon"})


def test_a_file_is_what_qupath_and_the_standard_expect(tmp_path):
    write_geojson(blobs(), tmp_path / "a.geojson", GeoJSONStyle(NAMES, kind="detection"))
    document = json.loads((tmp_path / "a.geojson").read_text())
    assert document["type"] == "FeatureCollection"
    holes = 0
    for feature in document["features"]:
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "detection"
        classification = feature["properties"]["classification"]
        assert classification["name"] in NAMES.values()
        assert len(classification["color"]) == 3
        assert all(isinstance(part, int) and 0 <= part <= 255 for part in classification["color"])
        outer, *inner = feature["geometry"]["coordinates"]
        assert all(ring[0] == ring[-1] and len(ring) >= 5 for ring in (outer, *inner))
        assert area(outer) > 0
        assert all(area(ring) < 0 for ring in inner)
        holes += len(inner)
    assert holes > 10


@st.composite
def places(draw):
    numbers = st.floats(0.05, 40, allow_nan=False)
    far = st.floats(-1e4, 1e4, allow_nan=False)
    return blobs((draw(st.integers(1, 30)), draw(st.integers(1, 30))), draw(st.integers(0, 99))), (
        (draw(numbers), draw(numbers)),
        (draw(far), draw(far)),
    )


@settings(deadline=None, max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=places())
def test_any_place_and_scale_round_trips(tmp_path, case):
    labels, (scale, origin) = case
    path = tmp_path / "a.geojson"
    write_geojson(labels, path, GeoJSONStyle(NAMES, scale=scale, origin=origin))
    assert np.array_equal(read_geojson(path, labels.shape, labels=NAMES, scale=scale, origin=origin), labels)


def test_strips_give_the_features_of_the_whole(tmp_path, monkeypatch):
    labels = blobs((60, 90))

    def features(path):
        return sorted(json.dumps(feature) for feature in json.loads(path.read_text())["features"])

    write_geojson(labels, tmp_path / "whole.geojson", GeoJSONStyle(NAMES))
    monkeypatch.setattr(geojson, "_BAND_PIXELS", 60 * 7)
    write_geojson(labels, tmp_path / "bands.geojson", GeoJSONStyle(NAMES))
    merger = ObjectMerger(60)
    with GeoJSONWriter(tmp_path / "strips.geojson", GeoJSONStyle(NAMES)) as writer:
        for top in range(0, 90, 11):
            writer.add(merger.add(labels[:, top : top + 11]))
        writer.add(merger.finish())
    expected = features(tmp_path / "whole.geojson")
    assert features(tmp_path / "bands.geojson") == expected
    assert features(tmp_path / "strips.geojson") == expected
    assert writer.count == len(expected)


def test_instances_are_objects_of_their_own_and_keep_their_numbers(tmp_path):
    labels = np.ones((6, 4), np.uint8)
    instances = np.repeat([7, 9, 11], 2)[:, None].repeat(4, axis=1)
    path = tmp_path / "a.geojson"
    assert write_geojson(labels, path, GeoJSONStyle(NAMES), instances=instances) == 3
    names = [feature["properties"]["name"] for feature in json.loads(path.read_text())["features"]]
    assert names == ["7", "9", "11"]
    back = read_geojson(path, (6, 4), labels=NAMES, instances=True)
    assert np.array_equal(back, (instances - 5) // 2)


def test_small_objects_are_left_out_and_unnamed_labels_get_a_name(tmp_path):
    labels = np.zeros((9, 9), np.uint8)
    labels[0, 0:3] = labels[4:6, 4:6] = 5
    path = tmp_path / "a.geojson"
    assert write_geojson(labels, path, GeoJSONStyle(NAMES, min_area=4)) == 1
    (feature,) = json.loads(path.read_text())["features"]
    assert feature["properties"]["classification"]["name"] == "Label 5"
    assert feature["geometry"]["coordinates"] == [[[4, 4], [6, 4], [6, 6], [4, 6], [4, 4]]]


def test_simplified_outlines_are_smaller_and_near(tmp_path):
    x, y = np.mgrid[:300, :300]
    labels = (((x - 150) ** 2 + (y - 150) ** 2 < 140**2) & ((x - 150) ** 2 + (y - 140) ** 2 > 50**2)).astype(np.uint8)
    exact, simple = tmp_path / "exact.geojson", tmp_path / "simple.geojson"
    write_geojson(labels, exact, GeoJSONStyle(NAMES))
    write_geojson(labels, simple, GeoJSONStyle(NAMES, tolerance=1.0))
    assert simple.stat().st_size < 0.2 * exact.stat().st_size
    back = read_geojson(simple, labels.shape, labels=NAMES)
    assert 0.98 < 2 * (back & labels).sum() / (back.sum() + labels.sum()) < 1


def test_an_empty_mask_is_an_empty_collection(tmp_path):
    path = tmp_path / "a.geojson"
    assert write_geojson(np.zeros((5, 4), np.uint8), path, GeoJSONStyle()) == 0
    assert json.loads(path.read_text()) == {"type": "FeatureCollection", "features": []}
    assert not read_geojson(path, (5, 4), labels={}).any()


def fail_after(path, items, error):
    with GeoJSONWriter(path, GeoJSONStyle(NAMES)) as writer:
        writer.add(items)
        raise error


def test_a_failed_run_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.geojson"
    path.write_text("old")
    items = ObjectMerger(3).add(np.pad(np.ones((1, 1), int), 1))
    assert len(items) == 1
    with pytest.raises(KeyError):
        fail_after(path, items, KeyError())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.geojson"]


class FullDisk(io.StringIO):
    """A file with room for a few bytes."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_is_an_error_of_ours(tmp_path, monkeypatch, room):
    monkeypatch.setattr("pathlib.Path.open", lambda *_, **__: FullDisk(room))
    with pytest.raises(OutputError, match="No space left"):
        write_geojson(blobs((300, 300)), tmp_path / "a.geojson", GeoJSONStyle(NAMES))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_last_bytes_is_an_error_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pathlib.Path.open", lambda *_, **__: FullDisk(len('{"type": "FeatureCollection", "features": ['))
    )
    with pytest.raises(OutputError, match="No space left"):
        write_geojson(np.zeros((3, 3), int), tmp_path / "a.geojson", GeoJSONStyle(NAMES))
    assert list(tmp_path.iterdir()) == []


def feature(coordinates, *, form="Polygon", **properties):
    return {
        "type": "Feature",
        "id": "5c1b6a37-0000-4000-8000-000000000000",
        "geometry": {"type": form, "coordinates": coordinates},
        "properties": properties,
    }


SQUARE = [[[1, 1], [4, 1], [4, 3], [1, 3], [1, 1]]]
TUMOR = {"classification": {"name": "Tumor", "color": [200, 0, 0]}}


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [feature(SQUARE, objectType="annotation", **TUMOR)]},
        [feature(SQUARE, objectType="annotation", **TUMOR)],
        feature(SQUARE, classification={"names": ["Tumor"], "color": [200, 0, 0]}),
        feature(SQUARE, classification={"name": "Tumor", "colorRGB": -3670016}),
        feature(SQUARE, classification="Tumor"),
        feature([[[*point, 0] for point in SQUARE[0][:4]]], **TUMOR),
        feature([SQUARE], form="MultiPolygon", **TUMOR),
    ],
    ids=["collection", "list", "names", "old color", "text", "open, three values", "multi"],
)
def test_annotations_of_any_version_are_read(tmp_path, content):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    expected = np.zeros((6, 5), np.int32)
    expected[1:4, 1:3] = 1
    assert np.array_equal(read_geojson(path, (6, 5), labels=NAMES), expected)


def test_a_slanted_polygon_takes_the_pixels_whose_centers_it_holds(tmp_path):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(feature([[[0, 0], [40, 0], [0, 20]]], **TUMOR)))
    x, y = np.mgrid[:30, :30] * 2 + 1.0
    expected = x / 40 + y / 20 < 1
    found = read_geojson(path, (30, 30), labels=NAMES, scale=(2.0, 2.0))
    line = x / 40 + y / 20 == 1
    assert np.array_equal(found[~line] > 0, expected[~line])


def test_later_polygons_are_on_top_and_what_sticks_out_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(geojson, "_FILL_PIXELS", 16)
    path = tmp_path / "a.geojson"
    large = [[[-10, -10], [50, -10], [50, 50], [-10, 50]]]
    stroma = {"classification": {"name": "Stroma"}}
    path.write_text(json.dumps([feature(large, **stroma), feature(SQUARE, **TUMOR)]))
    found = read_geojson(path, (6, 7), labels=NAMES)
    assert (found[1:4, 1:3] == 1).all()
    assert (found == 2).sum() == 6 * 7 - 6


def test_features_of_other_classes_and_forms_are_refused_or_skipped(tmp_path):
    path = tmp_path / "a.geojson"
    for other, message in (
        (feature(SQUARE, classification={"name": "Fat"}), "class 'Fat': expected one of 'Tumor'"),
        (feature(SQUARE), "no class"),
        (feature([1, 2], form="Point", **TUMOR), "is a Point with the class 'Tumor'"),
    ):
        path.write_text(json.dumps([feature(SQUARE, **TUMOR), other]))
        with pytest.raises(CaseError, match=message) as error:
            read_geojson(path, (6, 5), labels=NAMES)
        assert str(path) in str(error.value)
        assert read_geojson(path, (6, 5), labels=NAMES, others="skip").sum() == 6


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no json",
        "[1, 2]",
        "{}",
        '{"type": "FeatureCollection"}',
        "null",
        "[" * 100000,
        json.dumps(feature([[[0, 0], [1, 1]]], **TUMOR)),
        json.dumps(feature([[[0, 0], [1, 1], [2]]], **TUMOR)),
        json.dumps(feature([[["a", "b"], [1, 1], [2, 1]]], **TUMOR)),
        json.dumps(feature([], **TUMOR)),
        json.dumps(feature(5, **TUMOR)),
        json.dumps(feature([[[0, 0], [float("nan"), 1], [2, 1]]], **TUMOR)),
        json.dumps(feature([[[0, 0], [1e300, 1], [2, 1]]], **TUMOR)),
        json.dumps(feature([[[0, 0], [10**400, 1], [2, 1]]], **TUMOR)),
        json.dumps({"type": "Feature", "geometry": None, "properties": TUMOR}),
        json.dumps(feature([[[100, 100], [110, 100], [110, 110]]], **TUMOR)),
    ],
)
def test_what_is_no_geojson_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.geojson"
    path.write_text(content)
    with pytest.raises(CaseError) as error:
        read_geojson(path, (6, 5), labels=NAMES)
    assert str(path) in str(error.value)


def test_missing_binary_and_giant_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.geojson"
    with pytest.raises(CaseError, match="No such file"):
        read_geojson(path, (6, 5), labels=NAMES)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CaseError, match="not GeoJSON"):
        read_geojson(path, (6, 5), labels=NAMES)
    monkeypatch.setattr(geojson, "_MAX_BYTES", 3)
    with pytest.raises(CaseError, match="4 bytes"):
        read_geojson(path, (6, 5), labels=NAMES)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (1.0, float("inf"))},
        {"origin": (float("nan"), 0.0)},
        {"tolerance": -1.0},
        {"min_area": -1},
        {"kind": "cell"},
    ],
)
def test_styles_that_cannot_be_are_refused(options):
    with pytest.raises(RequestError):
        GeoJSONStyle(NAMES, **options)


def test_maps_that_do_not_fit_are_refused(tmp_path):
    for labels, instances in ((np.ones(4, int), None), (np.ones((4, 4), int), np.ones((4, 3), int))):
        with pytest.raises(RequestError, match="shape"):
            write_geojson(labels, tmp_path / "a.geojson", GeoJSONStyle(), instances=instances)
    with pytest.raises(RequestError, match="with"):
        GeoJSONWriter(tmp_path / "a.geojson", GeoJSONStyle()).add(ObjectMerger(1).add(np.eye(1, 2, dtype=int)))
    assert list(tmp_path.iterdir()) == []
