"""Conversion of 2D masks to polygons and of polygons to masks.

A pixel is a unit square around its center; pixel (0, 0) extends from -0.5 to 0.5 along both axes. The vertices of
rings are pixel corners, so the enclosed area equals that of the pixels, and every pixel center is at least half a pixel
away from a ring: neither rounded coordinates nor another program's border rule can change the mask.

Holes are separate rings. Filling uses the even-odd rule, so a ring inside another one cuts a hole, whatever their order
and direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["fill_rings", "trace_rings"]

Points = NDArray[np.float64]
# Crossings of edges with pixel rows processed at a time: 64 MiB.
_CHUNK = 1 << 20


def trace_rings(mask: NDArray[np.bool_]) -> list[Points]:
    """Return the rings around the pixels of a mask.

    Args:
        mask: Binary mask `(x, y)`.

    Returns:
        One `(N, 2)` array of x and y in pixels per ring: vertices only, the first not repeated at the end. With x to
        the right and y up, outer rings are counter-clockwise (positive area) and holes clockwise. No ring crosses or
        touches itself; two rings may touch at a corner. Rings are sorted by y, then x, of their lowest vertex.
    """
    used = [np.nonzero(mask.any(axis=1 - axis))[0] for axis in (0, 1)]
    if not len(used[0]):
        return []
    low = np.array([places[0] for places in used])
    mask = mask[low[0] : used[0][-1] + 1, low[1] : used[1][-1] + 1]
    corners, along, across = _corners(mask)
    # From every corner a ring continues `along` x to its partner, then `across` y to the next corner.
    following = across[along]
    rings = []
    for start in range(len(corners)):
        if following[start] < 0:
            continue
        steps = []
        at = start
        while following[at] >= 0:
            steps += [at, int(along[at])]
            here, at = at, int(following[at])
            following[here] = -1
        # Both ends of an x-step are on the ring: the opposite direction is not another ring.
        following[along[steps[::2]]] = -1
        rings += [_directed(ring, mask) + low for ring in _split_ring(corners[steps])]
    return sorted(rings, key=lambda ring: (ring[0, 1], ring[0, 0]))


def fill_rings(rings: Iterable[Points], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask of the pixels whose centers are inside an odd number of rings.

    Args:
        rings: Arrays `(N, 2)` of finite x and y in pixels, closed without repeating the first point. Parts outside the
            mask are clipped.
        shape: Number of pixels of the mask along x and y.

    Returns:
        Mask `(x, y)`. A center on a ring counts as inside if the interior is to its right or above it (larger x or y),
        so that exactly one of two adjacent polygons contains it.
    """
    width, height = shape
    # The last column collects the crossings beyond the right border.
    crossed = np.zeros((width + 1) * height, dtype=np.bool_)
    for x, y in _crossings(rings, height):
        column = np.clip(np.ceil(x), 0, width).astype(np.int64)
        counts = np.bincount(column * height + y, minlength=crossed.size)
        crossed ^= (counts & 1).astype(np.bool_)
    inside: NDArray[np.bool_] = np.bitwise_xor.accumulate(crossed.reshape(width + 1, height)[:width], axis=0)
    return inside


def _corners(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the corners `(N, 2)` of all rings, and each corner's partner along x and along y.

    Along a sorted line of corners, every second interval is a border, so sorting pairs the partners. Where two pixels
    touch diagonally, the corner occurs twice, once for each pixel.
    """
    full = np.pad(mask.astype(np.int8), 1)
    lower_left, lower_right = full[:-1, :-1], full[1:, :-1]
    upper_left, upper_right = full[:-1, 1:], full[1:, 1:]
    touching = (lower_left == upper_right) & (lower_right == upper_left) & (lower_left != lower_right)
    turning = (lower_left + lower_right + upper_left + upper_right) % 2 == 1
    x, y = np.nonzero(turning | touching)
    double = touching[x, y]
    rising = double & (lower_left[x, y] == 1)
    # A shared corner occurs twice: first for the left pixel, then for the right one.
    x, y = np.concatenate([x, x[double]]), np.concatenate([y, y[double]])
    right = np.concatenate([np.zeros(len(double), bool), np.ones(int(double.sum()), bool)])
    rising = np.concatenate([rising, rising[double]])
    upper = right == rising
    return (
        np.stack([x, y], axis=1) - 1,
        _partners(np.lexsort((right, x, y))),
        _partners(np.lexsort((upper, y, x))),
    )


def _partners(order: NDArray[np.int64]) -> NDArray[np.int64]:
    partner = np.empty_like(order)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    return partner


def _split_ring(ring: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Split a ring where it touches itself."""
    parts: list[NDArray[np.int64]] = []
    path: list[tuple[int, ...]] = []
    seen: dict[tuple[int, ...], int] = {}
    for point in map(tuple, ring.tolist()):
        if point in seen:
            loop = path[seen[point] :]
            del path[seen[point] :]
            for passed in loop:
                del seen[passed]
            parts.append(np.array(loop))
        seen[point] = len(path)
        path.append(point)
    return [*parts, np.array(path)]


def _directed(corners: NDArray[np.int64], mask: NDArray[np.bool_]) -> Points:
    """Orient a ring so that the mask is to its left, and start it at its lowest, then leftmost, corner."""
    first = int(np.lexsort((corners[:, 0], corners[:, 1]))[0])
    ring = np.roll(corners, -first, axis=0)
    (x, y), following = ring[0], ring[1]
    # The interior is above and to the right of this corner, in pixel (x + 1, y + 1): a hole, if not in the mask.
    around = bool(mask[x + 1, y + 1])
    counterclockwise = following[1] == y
    if around != counterclockwise:
        ring = np.concatenate([ring[:1], ring[:0:-1]])
    return ring.astype(np.float64) + 0.5


def _crossings(rings: Iterable[Points], height: int) -> Iterator[tuple[Points, NDArray[np.int64]]]:
    """Yield, in bounded chunks, the crossings of edges with the rows of pixel centers: x, and the row y."""
    closed = [(ring, np.roll(ring, -1, axis=0)) for ring in rings if len(ring)]
    if not closed:
        return
    start, end = (np.concatenate(points) for points in zip(*closed, strict=True))
    # Half-open, [lower, upper): a vertex on a row counts for one of its two edges.
    low = np.clip(np.ceil(np.minimum(start[:, 1], end[:, 1])), 0, height).astype(np.int64)
    high = np.clip(np.ceil(np.maximum(start[:, 1], end[:, 1])), 0, height).astype(np.int64)
    cut = np.nonzero(high > low)[0]
    portions = np.cumsum(high[cut] - low[cut]) // _CHUNK
    for edges in np.split(cut, np.nonzero(np.diff(portions))[0] + 1):
        yield _cross(start[edges], end[edges], low[edges], high[edges])


def _cross(
    start: Points, end: Points, low: NDArray[np.int64], high: NDArray[np.int64]
) -> tuple[Points, NDArray[np.int64]]:
    rows = high - low
    edge = np.repeat(np.arange(len(rows)), rows)
    y = np.arange(len(edge)) - np.repeat(np.cumsum(rows) - rows, rows) + low[edge]
    # Computed from the lower end, so that x is the same for both directions of an edge.
    swap = (start[:, 1] > end[:, 1])[:, None]
    bottom, top = np.where(swap, end, start), np.where(swap, start, end)
    slope = (top[:, 0] - bottom[:, 0]) / (top[:, 1] - bottom[:, 1])
    return bottom[edge, 0] + (y - bottom[edge, 1]) * slope[edge], y
