"""Outlines of objects along the edges of their pixels, from the objects' runs.

Pixel (i, j) is the square from (i, j) to (i + 1, j + 1). Rings are closed without repeating the first vertex. The outer
ring of an object has a positive area (x right, y down: clockwise on the screen; with y up, counter-clockwise, as
required by RFC 7946), rings around its holes a negative one. Rings touch each other at single vertices at most, and
never themselves: such polygons are valid OGC simple features, which QuPath requires.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from medseg.io.slides.components import PixelObject, split_runs

__all__ = ["Points", "Polygon", "polygons", "ring_areas", "simplify"]

# Array `(N, 2)` of x and y in pixels.
Points = NDArray[np.float64]
# The outer ring, then those of the holes.
Polygon = list[Points]

_START, _STOP = 0, 1
_MIN_CORNERS: Final = 3


def polygons(items: Sequence[PixelObject]) -> list[list[Polygon]]:
    """Return the polygons of each object, one for each of its 4-connected parts."""
    found: list[list[Polygon]] = [[] for _ in items]
    if not items:
        return found
    owner = np.repeat(np.arange(len(items)), [len(item.runs) for item in items])
    runs = np.concatenate([item.runs for item in items])
    parts = split_runs(_separated(runs, owner))
    rings, run = _rings(runs, _separated(runs, parts))
    shapes: list[Polygon] = [[] for _ in range(int(parts.max()) + 1)]
    for ring, area, part in zip(rings, ring_areas(rings), parts[run].tolist(), strict=True):
        shapes[part].insert(0 if area > 0 else len(shapes[part]), ring)
    # Parts are numbered by their first run, hence in the order of their objects.
    _, first_run = np.unique(parts, return_index=True)
    for polygon, item in zip(shapes, owner[first_run].tolist(), strict=True):
        found[item].append(polygon)
    return found


def ring_areas(rings: Sequence[Points]) -> list[float]:
    """Return the signed area of each ring, positive around pixels and negative around holes."""
    if not rings:
        return []
    points, starts = np.concatenate(rings), _starts(rings)
    # Relative to a vertex of the ring: far from the origin precision would be lost.
    x, y = (points - np.repeat(points[starts], [len(ring) for ring in rings], axis=0)).T
    following = _following(starts, len(points))
    areas: list[float] = (0.5 * np.add.reduceat(x * y[following] - x[following] * y, starts)).tolist()
    return areas


def simplify(rings: Sequence[Points], tolerance: float) -> list[Points]:
    """Remove vertices of rings so that none is farther than `tolerance` pixels from the simplified line.

    This is the Ramer-Douglas-Peucker algorithm (1972, 1973) on all rings at once. A ring that would collapse is kept.
    Rings closer to each other than the tolerance may intersect.
    """
    if tolerance <= 0 or not rings:
        return list(rings)
    closed = [np.concatenate([ring, ring[:1]]) for ring in rings]
    points, starts = np.concatenate(closed), _starts(closed)
    ends = starts + np.array([len(ring) for ring in rings])
    # Each ring is split into two lines at the vertex farthest from its first.
    _, far = _farthest(
        points, starts, ends, around=np.repeat(points[starts], [len(ring) - 1 for ring in rings], axis=0)
    )
    keep = np.zeros(len(points), dtype=np.bool_)
    keep[starts], keep[far] = True, True
    first, last = np.concatenate([starts, far]), np.concatenate([far, ends])
    while len(first := first[open_ := last - first > 1]):
        last = last[open_]
        distance, corner = _farthest(points, first, last)
        bent = distance > tolerance
        first, last, corner = first[bent], last[bent], corner[bent]
        keep[corner] = True
        first, last = np.concatenate([first, corner]), np.concatenate([corner, last])
    simple = [points[start:end][keep[start:end]] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    areas = zip(ring_areas(simple), ring_areas(rings), strict=True)
    sound = [len(ring) >= _MIN_CORNERS and new * old > 0 for ring, (new, old) in zip(simple, areas, strict=True)]
    return [new if good else old for new, old, good in zip(simple, rings, sound, strict=True)]


def _farthest(
    points: Points, first: NDArray[np.int64], last: NDArray[np.int64], *, around: Points | None = None
) -> tuple[Points, NDArray[np.int64]]:
    """Return, for each polyline, the distance and the index of its farthest inner point.

    The distance is measured to the line between its ends, or to the points `around`.
    """
    counts = last - first - 1
    begins = np.cumsum(counts) - counts
    inner = np.arange(counts.sum()) - np.repeat(begins - first - 1, counts)
    start = points[np.repeat(first, counts)] if around is None else around
    offset = points[inner] - start
    if around is None:
        along = points[np.repeat(last, counts)] - start
        length = (along**2).sum(axis=1)
        share = np.divide((offset * along).sum(axis=1), length, out=np.zeros_like(length), where=length > 0)
        offset -= np.clip(share, 0, 1)[:, None] * along
    distances: Points = np.hypot(*offset.T)
    largest = np.maximum.reduceat(distances, begins)
    at = np.flatnonzero(distances == np.repeat(largest, counts))
    # The first of several equally far ones.
    return largest, inner[at[np.searchsorted(at, begins)]]


def _separated(runs: NDArray[np.int64], group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Move groups of runs below each other, with one empty row in between."""
    tops, bottoms = np.full((2, int(group.max()) + 1), runs[:, 0].max())
    np.minimum.at(tops, group, runs[:, 0])
    bottoms[:] = tops
    np.maximum.at(bottoms, group, runs[:, 0])
    heights = bottoms - tops + 2
    moved = runs.copy()
    moved[:, 0] += (np.cumsum(heights) - heights - tops)[group]
    return moved


def _starts(rings: Sequence[Points]) -> NDArray[np.int64]:
    lengths = np.array([len(ring) for ring in rings])
    starts: NDArray[np.int64] = np.cumsum(lengths) - lengths
    return starts


def _following(starts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return for each vertex of concatenated rings the next one of its ring."""
    following = np.arange(1, count + 1)
    following[np.append(starts[1:], count) - 1] = starts
    return following


def _rings(runs: NDArray[np.int64], apart: NDArray[np.int64]) -> tuple[list[Points], NDArray[np.int64]]:
    """Return all rings around runs, traced on the separated parts, and for each ring a run that it touches."""
    line, x, kind, below, run = _corners(apart)
    along = _partners(np.lexsort((kind, x, line)))
    across = _partners(np.lexsort((line, kind, x)))
    # An edge along x runs to the right if the object is below it, else to the left.
    rightward = (kind == _START) == below
    begins = np.where(x < x[along], rightward, ~rightward[along])
    following, partner = across[along].tolist(), along.tolist()
    steps: list[int] = []
    starts: list[int] = []
    waiting = begins.tolist()
    for start in np.flatnonzero(begins).tolist():
        if waiting[start]:
            starts.append(len(steps))
        at = start
        while waiting[at]:
            waiting[at] = False
            steps += (at, partner[at])
            at = following[at]
    home = line + (runs[:, 0] - apart[:, 0])[run]
    points = np.stack([x, home], axis=1).astype(np.float64)[steps]
    return np.split(points, starts[1:]), run[np.array(steps)[starts]]


def _corners(
    runs: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Return the corners of the outline: line, x, end of a run, whether that run is below the line, and its index.

    Every run has two ends on the line above it and two on the line below it. If two runs, one above the other, have the
    same end on the line between them, the outline is straight there and has no corner.
    """
    row, start, stop = runs.T
    line = np.concatenate([row, row, row + 1, row + 1])
    x = np.concatenate([start, stop, start, stop])
    kind = np.tile(np.repeat([_START, _STOP], len(runs)), 2)
    below = np.repeat([True, False], 2 * len(runs))
    key = (line * (int(stop.max()) + 1) + x) * 2 + kind
    _, group, counts = np.unique(key, return_inverse=True, return_counts=True)
    single = counts[group] == 1
    return line[single], x[single], kind[single], below[single], np.tile(np.arange(len(runs)), 4)[single]


def _partners(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pair the corners of a sorted line two by two: each pair bounds an edge."""
    partner = np.empty_like(order)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    return partner
