"""The frames of a segmentation object: where each lies, what it shows, and which voxels of a grid it covers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medseg.errors import CaseError, GeometryError
from medseg.io.geometry import GRID_TOLERANCE, Grid
from medseg.notices import warn

__all__ = ["Frame", "Pixels", "find_region", "read_frames", "span_grid"]

logger = logging.getLogger(__name__)

_NUMBER = "ReferencedSegmentNumber"
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# No coding packs a large segmentation tighter than this.
_MAX_PACKING = 10_000
_PACKING_FROM = 1 << 26
# In voxels: a slice may lie a tenth off the even grid of its series, and rounding must not add a refusal.
_OFF_GRID = 2 * GRID_TOLERANCE


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: the number of its segment (None in a label map), its size, and its place as an RAS+ affine."""

    index: int
    segment: int | None
    size: tuple[int, int]
    affine: NDArray[np.float64]


def read_frames(dataset: Dataset, file: Path) -> list[Frame]:
    """Return segment and place of every frame.

    Raises:
        GeometryError: a frame does not say where it lies.
    """
    shared = dataset.get("SharedFunctionalGroupsSequence") or [Dataset()]
    size = int(dataset.Columns), int(dataset.Rows)
    is_map = str(dataset.SegmentationType) == "LABELMAP"
    frames = []
    for index, own in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        groups = (own, shared[0])
        position = _macro(groups, "PlanePositionSequence", "ImagePositionPatient", file)
        orientation = _macro(groups, "PlaneOrientationSequence", "ImageOrientationPatient", file)
        spacing = _macro(groups, "PixelMeasuresSequence", "PixelSpacing", file)
        segment = None if is_map else int(_macro(groups, "SegmentIdentificationSequence", _NUMBER, file)[0])
        frames.append(Frame(index, segment, size, _frame_affine(position, orientation, spacing, file)))
    return frames


def _macro(groups: Sequence[Dataset], sequence: str, keyword: str, file: Path) -> NDArray[np.float64]:
    for group in groups:
        if group.get(sequence) and keyword in group[sequence][0]:
            return np.atleast_1d(np.array(group[sequence][0][keyword].value, dtype=np.float64))
    raise GeometryError(f"{file} has a frame without {keyword}: only segmentations that say where they lie are read.")


def _frame_affine(
    position: NDArray[np.float64], orientation: NDArray[np.float64], spacing: NDArray[np.float64], file: Path
) -> NDArray[np.float64]:
    """Return the affine of a frame; its third column is the unit normal, since a frame has no depth."""
    if position.shape != (3,) or orientation.shape != (6,) or spacing.shape != (2,):
        raise GeometryError(f"{file} has a frame whose place is incomplete: expected a position, two axes, a spacing.")
    affine = np.eye(4)
    along_row, along_column = orientation[:3], orientation[3:]
    affine[:3, 0], affine[:3, 1] = along_row * spacing[1], along_column * spacing[0]
    affine[:3, 2] = np.cross(along_row, along_column)
    affine[:3, 3] = position
    affine_ras: NDArray[np.float64] = _LPS @ affine
    Grid((1, 1, 1), affine_ras).check(file)
    return affine_ras


def span_grid(frames: Sequence[Frame], dataset: Dataset, file: Path) -> Grid:
    """Return the smallest grid that all frames lie on, in their own axes, slices along the normal."""
    base = frames[0].affine.copy()
    depth = np.array([frame.affine[:3, 3] @ base[:3, 2] for frame in frames])
    levels = np.unique(depth.round(4))
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    measures = (shared.get("PixelMeasuresSequence") or [Dataset()])[0]
    told = abs(float(measures.get("SpacingBetweenSlices") or 0))
    step = _step(levels, told or float(measures.get("SliceThickness") or 0), file)
    base[:3, 3] = frames[int(depth.argmin())].affine[:3, 3]
    base[:3, 2] *= step
    columns, rows = frames[0].size
    return Grid((columns, rows, round((levels[-1] - levels[0]) / step) + 1), base).check(file)


def _step(levels: NDArray[np.float64], told: float, file: Path) -> float:
    """Return the distance of slices: the one told if all levels fit to it, else the smallest between two of them."""
    gaps = np.diff(levels)
    for step in (told, gaps.min(initial=np.inf)):
        if 0 < step < np.inf:
            slices = np.maximum(np.rint(gaps / step), 1)  # a slice may be far thicker than slices are apart
            if np.abs(gaps / step - slices).max(initial=0) <= GRID_TOLERANCE:
                return float(step)
    raise GeometryError(
        f"{file} has {len(levels)} slices and does not say how far they are apart, or they lie at uneven distances: "
        "give the series that was segmented."
    )


class Pixels:
    """The frames of a segmentation, unpacked one at a time where they are stored uncompressed."""

    def __init__(self, dataset: Dataset, names: Mapping[int, str], file: Path) -> None:
        self.kind = str(dataset.SegmentationType)
        self.names = names
        # Voxels outside of what was segmented hold this value; like 0 it is nobody's.
        self._blank = {0, int(dataset.get("PixelPaddingValue", 0))} - set(names)
        self._shape = int(dataset.Rows), int(dataset.Columns)
        self._bits = int(dataset.BitsAllocated)
        allowed = {"BINARY": (1, 8), "FRACTIONAL": (8,), "LABELMAP": (8, 16)}.get(self.kind, ())
        if self._bits not in allowed or int(dataset.get("SamplesPerPixel", 1)) != 1:
            raise CaseError(f"{file} is a segmentation of type {self.kind!r} with {self._bits} bits: not known.")
        self._half = 0.5 * int(dataset.get("MaximumFractionalValue", 255))
        if self.kind == "FRACTIONAL":
            text = f"fractional segments are thresholded at {self._half:g}, half of their maximum"
            warn(logger, "fraction-thresholded", text, file)
        self._decoded: NDArray[Any] | None = None
        self._stored: bytes = dataset.PixelData
        values = int(dataset.NumberOfFrames) * self._shape[0] * self._shape[1]
        expected = -(-values * self._bits // 8)
        if dataset.file_meta.TransferSyntaxUID.is_compressed:
            if values > _PACKING_FROM and values > len(self._stored) * _MAX_PACKING:
                raise CaseError(f"{file} claims {values:,} pixels in {len(self._stored):,} bytes. It is damaged.")
            self._decoded = dataset.pixel_array.reshape(-1, *self._shape)
            return
        if len(self._stored) not in (expected, expected + 1):
            raise CaseError(f"{file} has {len(self._stored):,} bytes of pixels: expected {expected:,}. It is damaged.")

    def inside(self, index: int, number: int) -> NDArray[np.bool_]:
        """Return where a frame shows a segment, `(columns, rows)`."""
        plane = self.plane(index)
        inside: NDArray[np.bool_]
        if self.kind == "FRACTIONAL":
            inside = plane >= self._half
        else:
            inside = plane == number if self.kind == "LABELMAP" else plane != 0
        return inside.T

    def numbers(self, index: int) -> set[int]:
        """Return the numbers of the segments in a frame of a label map."""
        return set(np.unique(self.plane(index)).tolist()) - self._blank

    def plane(self, index: int) -> NDArray[Any]:
        """Return the stored values of a frame, `(rows, columns)`."""
        if self._decoded is not None:
            plane: NDArray[Any] = self._decoded[index]
            return plane
        size = self._shape[0] * self._shape[1]
        if self._bits > 1:
            kind = np.dtype(f"<u{self._bits // 8}")
            return np.frombuffer(self._stored, kind, size, index * size * kind.itemsize).reshape(self._shape)
        start, end = index * size // 8, -(-(index + 1) * size // 8)
        bits = np.unpackbits(np.frombuffer(self._stored[start:end], np.uint8), bitorder="little")
        first = index * size - start * 8
        return bits[first : first + size].reshape(self._shape)


def find_region(labels: NDArray[np.int32], grid: Grid, frame: Frame, file: Path) -> NDArray[np.int32]:
    """Return the part of a label map that a frame covers, as a view `(columns, rows)` in the frame's own directions."""
    to_grid = np.linalg.inv(grid.affine) @ frame.affine
    first, steps = np.rint(to_grid[:3, 3]), np.rint(to_grid[:3, :2])
    columns, rows = frame.size
    corners = np.array([(column, row) for column in (0, columns - 1) for row in (0, rows - 1)], dtype=np.float64)
    places = first + corners @ steps.T
    apart = np.abs(to_grid[:3, 3] + corners @ to_grid[:3, :2].T - places).max()
    along = np.abs(steps).argmax(axis=0)
    if apart > _OFF_GRID or along[0] == along[1] or np.abs(steps).sum() != 2:
        raise GeometryError(
            f"Frame {frame.index + 1} of {file} lies {apart:.2g} voxels off the grid (limit {_OFF_GRID}), or has "
            f"another spacing: the grid has {grid.describe()}. Give the series that was segmented."
        )
    low, high = places.min(axis=0).astype(int), places.max(axis=0).astype(int)
    if (low < 0).any() or (high >= grid.shape).any():
        raise GeometryError(
            f"Frame {frame.index + 1} of {file} covers the voxels {low.tolist()} to {high.tolist()}: the grid has "
            f"{grid.describe()}. Give the series that was segmented."
        )
    whole = labels[tuple(slice(start, end + 1) for start, end in zip(low, high, strict=True))]
    depth = 3 - int(along.sum())
    plane = whole.transpose(along[0], along[1], depth)[:, :, 0]
    return plane[:: int(steps[along[0], 0]), :: int(steps[along[1], 1])]
