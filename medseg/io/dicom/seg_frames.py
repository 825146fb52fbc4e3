"""Frames of a DICOM SEG: their geometry, segments and pixels, and the voxels of a grid that they cover."""

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
# No compression of a large segmentation has a higher ratio than this.
_MAX_PACKING = 10_000
_PACKING_FROM = 1 << 26
# In voxels: a slice may be a tenth off the regular grid of its series, plus rounding.
_OFF_GRID = 2 * GRID_TOLERANCE


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: index, segment number (None in a label map), size (columns, rows), and RAS+ affine."""

    index: int
    segment: int | None
    size: tuple[int, int]
    affine: NDArray[np.float64]


def read_frames(dataset: Dataset, file: Path) -> list[Frame]:
    """Return segment and geometry of every frame.

    Raises:
        GeometryError: A frame has no valid geometry.
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
    raise GeometryError(f"{file} has no valid geometry: a frame has no {keyword}. Export it again with its geometry.")


def _frame_affine(
    position: NDArray[np.float64], orientation: NDArray[np.float64], spacing: NDArray[np.float64], file: Path
) -> NDArray[np.float64]:
    """Return the affine of a frame; its third column is the unit normal, since a frame has no thickness."""
    if position.shape != (3,) or orientation.shape != (6,) or spacing.shape != (2,):
        raise GeometryError(
            f"{file} has no valid geometry: a frame has an incomplete position, orientation or spacing. Export it "
            "again."
        )
    affine = np.eye(4)
    along_row, along_column = orientation[:3], orientation[3:]
    affine[:3, 0], affine[:3, 1] = along_row * spacing[1], along_column * spacing[0]
    affine[:3, 2] = np.cross(along_row, along_column)
    affine[:3, 3] = position
    affine_ras: NDArray[np.float64] = _LPS @ affine
    Grid((1, 1, 1), affine_ras).check(file)
    return affine_ras


def span_grid(frames: Sequence[Frame], dataset: Dataset, file: Path) -> Grid:
    """Return the smallest grid that contains all frames, with their axes and slices along the normal."""
    base = frames[0].affine.copy()
    depth = np.array([frame.affine[:3, 3] @ base[:3, 2] for frame in frames])
    levels = np.unique(depth.round(4))
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    measures = (shared.get("PixelMeasuresSequence") or [Dataset()])[0]
    stated = abs(float(measures.get("SpacingBetweenSlices") or 0))
    step = _step(levels, stated or float(measures.get("SliceThickness") or 0), file)
    base[:3, 3] = frames[int(depth.argmin())].affine[:3, 3]
    base[:3, 2] *= step
    columns, rows = frames[0].size
    return Grid((columns, rows, round((levels[-1] - levels[0]) / step) + 1), base).check(file)


def _step(levels: NDArray[np.float64], stated: float, file: Path) -> float:
    """Return the slice distance: the stated one if all positions match it, else the smallest between two positions."""
    gaps = np.diff(levels)
    for step in (stated, gaps.min(initial=np.inf)):
        if 0 < step < np.inf:
            slices = np.maximum(np.rint(gaps / step), 1)  # a slice may be much thicker than the slice distance
            if np.abs(gaps / step - slices).max(initial=0) <= GRID_TOLERANCE:
                return float(step)
    raise GeometryError(
        f"{file} has {len(levels)} slices that are unevenly spaced or of unknown distance: give the series that was "
        "segmented."
    )


class Pixels:
    """The pixels of a segmentation; uncompressed frames are unpacked one at a time."""

    def __init__(self, dataset: Dataset, names: Mapping[int, str], file: Path) -> None:
        self.kind = str(dataset.SegmentationType)
        self.names = names
        # Padding outside the segmented region; like 0 it belongs to no segment.
        self._blank = {0, int(dataset.get("PixelPaddingValue", 0))} - set(names)
        self._shape = int(dataset.Rows), int(dataset.Columns)
        self._bits = int(dataset.BitsAllocated)
        allowed = {"BINARY": (1, 8), "FRACTIONAL": (8,), "LABELMAP": (8, 16)}.get(self.kind, ())
        if self._bits not in allowed or int(dataset.get("SamplesPerPixel", 1)) != 1:
            raise CaseError(f"{file} is an unsupported segmentation of type {self.kind!r} with {self._bits} bits.")
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
                raise CaseError(f"{file} is damaged: {values:,} pixels in {len(self._stored):,} bytes of pixel data.")
            self._decoded = dataset.pixel_array.reshape(-1, *self._shape)
            return
        if len(self._stored) not in (expected, expected + 1):
            raise CaseError(f"{file} is damaged: {len(self._stored):,} bytes of pixel data, expected {expected:,}.")

    def inside(self, index: int, number: int) -> NDArray[np.bool_]:
        """Return the binary mask `(columns, rows)` of a segment in a frame."""
        plane = self.plane(index)
        inside: NDArray[np.bool_]
        if self.kind == "FRACTIONAL":
            inside = plane >= self._half
        else:
            inside = plane == number if self.kind == "LABELMAP" else plane != 0
        return inside.T

    def numbers(self, index: int) -> set[int]:
        """Return the segment numbers in a frame of a label map."""
        return set(np.unique(self.plane(index)).tolist()) - self._blank

    def plane(self, index: int) -> NDArray[Any]:
        """Return the stored values `(rows, columns)` of a frame."""
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
    """Return the part of a label map covered by a frame, as a view `(columns, rows)` in the frame's directions."""
    to_grid = np.linalg.inv(grid.affine) @ frame.affine
    first, steps = np.rint(to_grid[:3, 3]), np.rint(to_grid[:3, :2])
    columns, rows = frame.size
    corners = np.array([(column, row) for column in (0, columns - 1) for row in (0, rows - 1)], dtype=np.float64)
    corner_voxels = first + corners @ steps.T
    apart = np.abs(to_grid[:3, 3] + corners @ to_grid[:3, :2].T - corner_voxels).max()
    along = np.abs(steps).argmax(axis=0)
    if apart > _OFF_GRID or along[0] == along[1] or np.abs(steps).sum() != 2:
        raise GeometryError(
            f"Geometry mismatch: frame {frame.index + 1} of {file} is {apart:.2g} voxels off the grid (limit "
            f"{_OFF_GRID}), or has another spacing: the grid has {grid.describe()}. Give the series that was segmented."
        )
    low, high = corner_voxels.min(axis=0).astype(int), corner_voxels.max(axis=0).astype(int)
    if (low < 0).any() or (high >= grid.shape).any():
        raise GeometryError(
            f"Geometry mismatch: frame {frame.index + 1} of {file} covers voxels {low.tolist()} to {high.tolist()}: "
            f"the grid has {grid.describe()}. Give the series that was segmented."
        )
    whole = labels[tuple(slice(start, end + 1) for start, end in zip(low, high, strict=True))]
    depth = 3 - int(along.sum())
    plane = whole.transpose(along[0], along[1], depth)[:, :, 0]
    return plane[:: int(steps[along[0], 0]), :: int(steps[along[1], 1])]
