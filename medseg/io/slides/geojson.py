"""Writing objects of a slide as GeoJSON polygons for QuPath, and reading such annotations as label maps.

Coordinates are pixels of the slide's finest level: x to the right, y down, (0, 0) at the corner of the first pixel.
Polygons follow the edges of the mask's pixels, so filling them restores the mask exactly; simplified polygons are
smaller files and approximate it. Rings are closed; outer rings have a positive area, holes a negative one (RFC 7946).

QuPath's `objectType`, `classification` and `color` are written. QuPath's origin is the corner of the displayed region,
so polygons are shifted on slides that it crops to the scanned region (MIRAX).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from medseg.errors import CaseError, OutputError, RequestError
from medseg.files import replacing
from medseg.io.dicom.terms import default_color
from medseg.io.geometry import check_size
from medseg.io.names import StrPath, absolute
from medseg.io.polygons import fill_rings
from medseg.io.slides.components import ObjectMerger, PixelObject
from medseg.io.slides.outlines import Points, Polygon, polygons, simplify

__all__ = ["GeoJSONStyle", "GeoJSONWriter", "read_geojson", "write_geojson"]

_BAND_PIXELS: Final = 1 << 24
_FILL_PIXELS: Final = 1 << 22
# The file is read as a whole, into Python objects several times as large.
_MAX_BYTES: Final = 1 << 29
# Thousandths of a pixel of the finest level: enough to round-trip any scale.
_DECIMALS: Final = 3
_FARTHEST: Final = 1e9


@dataclass(frozen=True)
class GeoJSONStyle:
    """Options for writing objects.

    Attributes:
        labels: Label value -> class name; a label without a name becomes, for example, "Label 3".
        scale: Pixels of the finest level per pixel of the mask, along x and y (`Slide.scale`).
        origin: Position of the corner of the mask's first pixel, in pixels of the finest level.
        min_area: Minimum area in pixels; smaller objects are skipped.
        tolerance: Maximum distance, in pixels of the mask, of a simplified outline from the exact one; 0 writes exact
            outlines.
        kind: "annotation" for regions, "detection" for many small objects such as nuclei, which QuPath handles faster.

    Raises:
        RequestError: Invalid value.
    """

    labels: Mapping[int, str] = field(default_factory=dict)
    scale: tuple[float, float] = (1.0, 1.0)
    origin: tuple[float, float] = (0.0, 0.0)
    min_area: int = 0
    tolerance: float = 0.0
    kind: Literal["annotation", "detection"] = "annotation"

    def __post_init__(self) -> None:
        _check_scale_and_origin(self.scale, self.origin)
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0 and self.min_area >= 0):
            raise RequestError(
                f"Invalid min_area {self.min_area} or tolerance {self.tolerance}: expected 0 or more pixels."
            )
        if self.kind not in ("annotation", "detection"):
            raise RequestError(f"Invalid kind of objects {self.kind!r}: expected 'annotation' or 'detection'.")


class GeoJSONWriter:
    """Writes objects as they are found; the file is created atomically when the block ends without an error.

    ::

        with GeoJSONWriter(path, style) as writer:
            for strip in strips:
                writer.add(merger.add(strip))
            writer.add(merger.finish())

    Attributes:
        count: Number of objects written.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(self, path: StrPath, style: GeoJSONStyle) -> None:
        self.count = 0
        self._path = absolute(path)
        self._style = style
        self._exits = ExitStack()
        self._stream: TextIO | None = None

    def __enter__(self) -> GeoJSONWriter:
        with ExitStack() as exits:
            temporary = exits.enter_context(replacing(self._path))
            self._stream = exits.enter_context(temporary.open("w", encoding="utf-8"))
            self._write('{"type": "FeatureCollection", "features": [')
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self._write("\n]}\n")
            except OutputError as full:
                self._exits.__exit__(type(full), full, full.__traceback__)
                raise
        self._exits.__exit__(kind, error, trace)

    def add(self, items: Sequence[PixelObject]) -> None:
        """Write the objects returned by `ObjectMerger`."""
        large = [item for item in items if item.area >= self._style.min_area]
        for item, shapes in zip(large, self._simplified(polygons(large)), strict=True):
            self._write(("," if self.count else "") + "\n" + json.dumps(self._feature(item, shapes)))
            self.count += 1

    def _simplified(self, objects: list[list[Polygon]]) -> list[list[Polygon]]:
        if not self._style.tolerance:
            return objects
        rings = [ring for shapes in objects for polygon in shapes for ring in polygon]
        simple = iter(simplify(rings, self._style.tolerance))
        return [[[next(simple) for _ in polygon] for polygon in shapes] for shapes in objects]

    def _feature(self, item: PixelObject, shapes: list[Polygon]) -> dict[str, Any]:
        name = self._style.labels.get(item.value, f"Label {item.value}")
        properties: dict[str, Any] = {
            "objectType": self._style.kind,
            "classification": {"name": name, "color": list(default_color(item.value))},
        }
        if item.instance:
            properties["name"] = str(item.instance)
        coordinates = [[self._coordinates(ring) for ring in polygon] for polygon in shapes]
        single = len(coordinates) == 1
        geometry = {
            "type": "Polygon" if single else "MultiPolygon",
            "coordinates": coordinates[0] if single else coordinates,
        }
        return {"type": "Feature", "geometry": geometry, "properties": properties}

    def _coordinates(self, ring: Points) -> list[list[float]]:
        points = np.concatenate([ring, ring[:1]]) * self._style.scale + self._style.origin
        whole = np.rint(points)
        positions: list[list[float]]
        positions = (whole.astype(np.int64) if np.array_equal(whole, points) else points.round(_DECIMALS)).tolist()
        return positions

    def _write(self, text: str) -> None:
        if self._stream is None:
            raise RequestError("A GeoJSONWriter can only write in a `with` block.")
        try:
            self._stream.write(text)
        except OSError as error:
            raise OutputError(f"cannot write '{self._path}': {error.strerror or error}") from error


def write_geojson(
    labels: NDArray[Any],
    path: StrPath,
    style: GeoJSONStyle,
    *,
    instances: NDArray[Any] | None = None,
    connectivity: Literal[4, 8] = 4,
) -> int:
    """Write the objects of a label map; return their number.

    Args:
        labels: Integer label map `(x, y)`, 0 for background.
        path: File to write, created atomically.
        style: Class names, geometry and simplification.
        instances: Instance map `(x, y)`, which separates touching objects with the same label.
        connectivity: 4 (edges) or 8 (edges and corners).

    Raises:
        RequestError: Invalid shape or type.
        OutputError: The file cannot be written.
    """
    if labels.ndim != 2 or (instances is not None and instances.shape != labels.shape):
        shapes = labels.shape if instances is None else (labels.shape, instances.shape)
        raise RequestError(f"Invalid label maps of shape {shapes}: expected (x, y), the same for both.")
    merger = ObjectMerger(labels.shape[0], connectivity=connectivity)
    rows = max(1, _BAND_PIXELS // labels.shape[0])
    with GeoJSONWriter(path, style) as writer:
        for top in range(0, labels.shape[1], rows):
            band = slice(top, top + rows)
            writer.add(merger.add(labels[:, band], None if instances is None else instances[:, band]))
        writer.add(merger.finish())
    return writer.count


def read_geojson(
    path: StrPath,
    shape: tuple[int, int],
    *,
    labels: Mapping[int, str],
    scale: tuple[float, float] = (1.0, 1.0),
    origin: tuple[float, float] = (0.0, 0.0),
    instances: bool = False,
    others: Literal["refuse", "skip"] = "refuse",
) -> NDArray[np.int32]:
    """Read polygons as a label map: a pixel belongs to the polygons that contain its center.

    Of overlapping polygons, the later one in the file wins.

    Args:
        path: GeoJSON file with a FeatureCollection, a list of features or one feature, of type Polygon or MultiPolygon.
        shape: Number of pixels of the map along x and y.
        labels: Label value -> class name.
        scale: Pixels of the finest level per pixel of the map, along x and y (`Slide.scale`).
        origin: Position of the corner of the map's first pixel, in pixels of the finest level.
        instances: Whether each feature is labeled with its number in the file, from 1, instead of its class.
        others: Treatment of features with other classes, and of points and lines: "refuse" the file, or "skip" them.

    Returns:
        Label map `(x, y)`, 0 outside of polygons.

    Raises:
        CaseError: The file is missing, damaged or has other content; or a polygon is completely outside the map.
        RequestError: Invalid scale or origin.
    """
    _check_scale_and_origin(scale, origin)
    file = absolute(path)
    check_size(shape, f"The label map of {file}")
    values = {name: value for value, name in labels.items()}
    out = np.zeros(shape, dtype=np.int32)
    with _parsing_errors(file):
        for number, feature in enumerate(_features(json.loads(_text(file))), start=1):
            found = _outlines(feature, number, values, others, file)
            for rings in found[1]:
                points = [(ring - origin) / scale - 0.5 for ring in rings]
                _fill(out, points, number if instances else found[0], f"Feature {number} of {file}")
    return out


@contextmanager
def _parsing_errors(file: Path) -> Iterator[None]:
    """Convert exceptions from traversing unknown JSON to CaseErrors."""
    try:
        yield
    except OSError as error:
        raise CaseError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CaseError(f"{file} is not GeoJSON with polygons: {type(error).__name__}: {error}.") from error


def _text(file: Path) -> str:
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise CaseError(f"{file} is too large: {size:,} bytes, the limit is {_MAX_BYTES:,}. Split it.")
    return file.read_text(encoding="utf-8-sig")


def _features(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    if content["type"] == "FeatureCollection":
        return list(content["features"])
    return [content]


def _outlines(
    feature: Any, number: int, values: Mapping[str, int], others: str, file: Path
) -> tuple[int, list[Polygon]]:
    """Return the label and the polygons of a feature; no polygons if it is skipped."""
    name = _class_name(feature.get("properties") or {})
    form, coordinates = feature["geometry"]["type"], feature["geometry"]["coordinates"]
    known = form in ("Polygon", "MultiPolygon")
    if not known or name not in values:
        if others == "skip":
            return 0, []
        found = f"the class {name!r}" if name else "no class"
        expected = f"one of {', '.join(repr(name) for name in values)}" if known else "a Polygon or MultiPolygon"
        raise CaseError(
            f"Feature {number} of {file} is a {form} with {found}: expected {expected}. Rename its class, or "
            "skip others."
        )
    parts = [coordinates] if form == "Polygon" else coordinates
    return values[name], [[_ring(ring, number, file) for ring in part] for part in parts]


def _class_name(properties: Mapping[str, Any]) -> str:
    """Return the class name written by any version of QuPath: a name, or its parts."""
    given = properties.get("classification") or ""
    if isinstance(given, Mapping):
        return str(given["name"]) if "name" in given else ": ".join(given.get("names", []))
    return str(given)


def _ring(positions: Any, number: int, file: Path) -> Points:
    points: Points = np.array(positions, dtype=np.float64)
    if points.ndim != 2 or points.shape[0] < 3 or points.shape[1] < 2 or not (np.abs(points) <= _FARTHEST).all():
        raise CaseError(
            f"Feature {number} of {file} has an invalid ring: expected three or more points x, y in pixels."
        )
    return points[:, :2]


def _fill(out: NDArray[np.int32], rings: Polygon, value: int, source: str) -> None:
    """Fill the pixels whose centers are inside the rings, band by band."""
    points = np.concatenate(rings)
    low, high = np.floor(points.min(axis=0)), np.ceil(points.max(axis=0)) + 1
    if (high <= 0).any() or (low >= out.shape).any():
        raise CaseError(
            f"{source} is outside the image of {out.shape[0]} x {out.shape[1]} pixels: it belongs to another image, or "
            "the scale is wrong."
        )
    (x0, y0), (x1, y1) = (np.clip(corner, 0, out.shape).astype(int).tolist() for corner in (low, high))
    rows = max(1, _FILL_PIXELS // (x1 - x0))
    for top in range(y0, y1, rows):
        bottom = min(y1, top + rows)
        inside = fill_rings([ring - (x0, top) for ring in rings], (x1 - x0, bottom - top))
        out[x0:x1, top:bottom][inside] = value


def _check_scale_and_origin(scale: tuple[float, float], origin: tuple[float, float]) -> None:
    numbers = (*scale, *origin)
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)) or min(scale) <= 0:
        raise RequestError(
            f"Invalid scale {scale} or origin {origin}: expected two numbers each, with a scale above 0."
        )
