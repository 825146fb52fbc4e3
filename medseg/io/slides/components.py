"""Streaming connected components of a label map that arrives in strips and is never in memory as a whole.

A strip is a band of rows over the full width; strips arrive from top to bottom. An object is returned as soon as no
later strip can extend it. Only the runs (rows of equal pixels) of objects that reach the last row are kept, so memory
grows with the outline of the open objects, not with the image. The objects do not depend on the height of the strips.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import RequestError

__all__ = ["ObjectMerger", "PixelObject", "find_objects", "split_runs"]

_BAND_PIXELS: Final = 1 << 22
Runs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PixelObject:
    """The pixels of one object.

    Attributes:
        value: Label value.
        instance: Number in the instance map; 0 without one.
        runs: Array `(n, 3)` of row, first column and column after the last, sorted by row and column.
    """

    value: int
    instance: int
    runs: Runs

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int((self.runs[:, 2] - self.runs[:, 1]).sum())

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """First column, column after the last, first row, row after the last."""
        return (
            int(self.runs[:, 1].min()),
            int(self.runs[:, 2].max()),
            int(self.runs[0, 0]),
            int(self.runs[-1, 0]) + 1,
        )

    def mask(self) -> NDArray[np.bool_]:
        """Return the binary mask `(x, y)` within `bounds`."""
        x0, x1, y0, y1 = self.bounds
        rows: NDArray[np.bool_] = np.zeros((y1 - y0, x1 - x0), dtype=np.bool_)
        for row, start, stop in self.runs - (y0, x0, x0):
            rows[row, start:stop] = True
        return rows.T


class ObjectMerger:
    """Finds the connected components of a label map that arrives in strips.

    An object is a connected component of pixels with the same label and, if given, the same instance number. Zero is
    background.

    Args:
        width: Number of pixels along x of every strip.
        connectivity: 4 (edges) or 8 (edges and corners).

    Raises:
        RequestError: Invalid connectivity or width.
    """

    def __init__(self, width: int, *, connectivity: Literal[4, 8] = 4) -> None:
        if connectivity not in (4, 8):
            raise RequestError(f"Invalid connectivity {connectivity}: expected 4 or 8.")
        if width < 1:
            raise RequestError(f"Invalid width {width} of strips: expected at least 1 pixel.")
        self._width = width
        self._reach = connectivity == 8
        self._rows = 0
        self._open: dict[int, tuple[int, int, list[Runs]]] = {}
        # Runs of the last row: row, start, stop, value, instance; and the open object that each belongs to.
        self._tail: Runs = np.empty((0, 5), np.int64)
        self._owners: NDArray[np.int64] = np.empty(0, np.int64)

    def add(self, labels: NDArray[Any], instances: NDArray[Any] | None = None) -> list[PixelObject]:
        """Add the next rows and return the objects that are now complete, sorted by their first pixel.

        Args:
            labels: Integer label map `(width, rows)`.
            instances: Instance map of the same shape, which separates touching objects with the same label. An object
                has the same number in all strips.

        Raises:
            RequestError: Invalid shape or type.
        """
        for array in (labels,) if instances is None else (labels, instances):
            self._check(array, labels.shape)
        new = self._runs(labels, instances)
        self._rows += labels.shape[1]
        return self._merge(new) if labels.shape[1] else []

    def finish(self) -> list[PixelObject]:
        """Return the objects that reach the last row, and reset the merger."""
        done = [_object(*parts) for parts in self._open.values()]
        self._open, self._rows = {}, 0
        self._tail, self._owners = self._tail[:0], self._owners[:0]
        return done

    def _check(self, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        if array.ndim != 2 or array.shape[0] != self._width or array.shape != shape:
            raise RequestError(
                f"Invalid strip of shape {array.shape}: expected ({self._width}, rows), the same for labels and "
                "instances."
            )
        if array.dtype.kind not in "bui":
            raise RequestError(f"Invalid strip of type {array.dtype}: expected integers.")

    def _runs(self, labels: NDArray[Any], instances: NDArray[Any] | None) -> Runs:
        height = max(1, _BAND_PIXELS // self._width)
        parts = [np.empty((0, 5), np.int64)]
        for top in range(0, labels.shape[1], height):
            band = slice(top, top + height)
            numbers = None if instances is None else instances[:, band].T
            parts.append(_row_runs(labels[:, band].T, numbers, self._rows + top))
        return np.concatenate(parts)

    def _merge(self, new: Runs) -> list[PixelObject]:
        nodes = np.concatenate([self._tail, new])
        begun = len(self._tail)
        pairs = _touching(nodes, self._reach)
        # Runs of an open object in the last row belong together, even if connected only through earlier rows.
        order = np.argsort(self._owners, kind="stable")
        same = self._owners[order][1:] == self._owners[order][:-1]
        known = np.stack([order[:-1][same], order[1:][same]])
        _, groups = np.unique(_roots(len(nodes), np.concatenate([pairs, known], axis=1)), return_inverse=True)

        earlier: defaultdict[int, list[Runs]] = defaultdict(list)
        for owner, group in dict(zip(self._owners.tolist(), groups[:begun].tolist(), strict=True)).items():
            earlier[group].extend(self._open[owner][2])
        return self._sort_out(nodes, groups, begun, earlier)

    def _sort_out(
        self, nodes: Runs, groups: NDArray[np.int64], begun: int, earlier: defaultdict[int, list[Runs]]
    ) -> list[PixelObject]:
        """Assign the runs to their objects; keep the open ones and return the others."""
        last = nodes[:, 0] == self._rows - 1
        count = int(groups.max()) + 1 if len(groups) else 0
        still_open = np.zeros(count, dtype=np.bool_)
        still_open[groups[last]] = True
        _, first = np.unique(groups, return_index=True)
        kinds = nodes[first, 3:].tolist()
        order = np.argsort(groups[begun:], kind="stable") + begun
        borders = np.searchsorted(groups[order], np.arange(count + 1))
        self._open, done = {}, []
        for group, (value, instance) in enumerate(kinds):
            mine = nodes[order[borders[group] : borders[group + 1]], :3]
            parts = (value, instance, [*earlier[group], mine])
            if still_open[group]:
                self._open[group] = parts
            else:
                done.append(_object(*parts))
        self._tail, self._owners = nodes[last], groups[last]
        return done


def find_objects(
    labels: NDArray[Any], instances: NDArray[Any] | None = None, *, connectivity: Literal[4, 8] = 4
) -> list[PixelObject]:
    """Return the connected components of a complete label map `(x, y)`; see `ObjectMerger`."""
    if labels.ndim != 2:
        raise RequestError(f"Invalid label map of shape {labels.shape}: expected (x, y).")
    merger = ObjectMerger(labels.shape[0], connectivity=connectivity)
    return merger.add(labels, instances) + merger.finish()


def split_runs(runs: Runs) -> NDArray[np.int64]:
    """Number the 4-connected parts of an object from 0, one number per run `(row, start, stop)`."""
    parts: NDArray[np.int64]
    _, parts = np.unique(_roots(len(runs), _touching(np.pad(runs, ((0, 0), (0, 2))), False)), return_inverse=True)
    return parts


def _object(value: int, instance: int, chunks: list[Runs]) -> PixelObject:
    runs = np.concatenate(chunks)
    return PixelObject(value, instance, runs[np.lexsort((runs[:, 1], runs[:, 0]))])


def _row_runs(labels: NDArray[Any], instances: NDArray[Any] | None, first_row: int) -> Runs:
    """Return row, start, stop, value and instance of each foreground run of `(rows, columns)`."""
    width = labels.shape[1]
    starts = np.ones(labels.shape, dtype=np.bool_)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=starts[:, 1:])
    if instances is not None:
        starts[:, 1:] |= instances[:, 1:] != instances[:, :-1]
    flat = np.flatnonzero(starts)
    row, start = np.divmod(flat, width)
    stop = np.append(flat[1:], labels.size) - row * width
    value = labels[row, start].astype(np.int64)
    instance = np.zeros_like(value) if instances is None else instances[row, start].astype(np.int64)
    runs: NDArray[np.int64] = np.stack([row + first_row, start, stop, value, instance], axis=1)
    inside: NDArray[np.int64] = runs[value != 0]
    return inside


def _touching(runs: Runs, reach: bool) -> NDArray[np.int64]:
    """Return the pairs `(2, n)` of equal runs in neighboring rows that touch; with `reach` also by corners."""
    if not len(runs):
        return np.empty((2, 0), np.int64)
    row, start, stop = runs[:, 0] - runs[0, 0], runs[:, 1], runs[:, 2]
    # Positions along one line, with gaps between the rows so that row ends do not touch.
    pitch = int(stop.max()) + 2
    begin, end = row * pitch + start, row * pitch + stop
    low = np.searchsorted(end, begin + pitch - reach, side="right")
    high = np.searchsorted(begin, end + pitch + reach, side="left")
    counts: NDArray[np.int64] = np.maximum(high - low, 0)
    upper = np.repeat(np.arange(len(runs)), counts)
    lower = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - low, counts)
    alike = (runs[upper, 3:] == runs[lower, 3:]).all(axis=1)
    pairs: NDArray[np.int64] = np.stack([upper[alike], lower[alike]])
    return pairs


def _roots(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of `count` nodes the smallest node connected to it."""
    root = np.arange(count)
    while True:
        a, b = root[pairs[0]], root[pairs[1]]
        apart = a != b
        if not apart.any():
            return root
        np.minimum.at(root, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
        while not np.array_equal(flat := root[root], root):
            root = flat
