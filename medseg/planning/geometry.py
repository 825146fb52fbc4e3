"""Grid, patch and strides: pure arithmetic on voxel counts and millimeters.

Rules, with their reasons:

* The grid's spacing is the median of the training cases, so that half of them are thinned and half are interpolated.
  Where slices are far thicker than pixels, and differ, the slice axis takes its 10th percentile: interpolating a thick
  slice costs only time, while dropping every second thin one loses structures for good.
* A patch is as near to a cube in millimeters as it can be, since anatomy has no preferred axis, and never larger than
  the median image.
* An axis is halved as long as its voxels are not more than twice as long as the finest ones at that level, and 4 remain
  at the bottom: pooling coarse axes first would blur what little they hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medseg.planning.case_stats import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.planning.case_stats import Fingerprint

__all__ = ["Layout", "lay_out", "target_spacing"]

_ANISOTROPIC = 3.0
_COARSER = 2.0
_SMALLEST_BOTTOM = 4


@dataclass(frozen=True)
class Layout:
    """Patch and strides of a network.

    Attributes:
        patch: voxels per axis, a multiple of `step`.
        strides: one entry per pooling, finest first, each a number per axis.
        whole: whether the patch holds the median image.
    """

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    whole: bool

    @property
    def step(self) -> tuple[int, ...]:
        """Total stride per axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))

    @property
    def bottom(self) -> tuple[int, ...]:
        """Voxels per axis at the deepest level."""
        return tuple(n // s for n, s in zip(self.patch, self.step, strict=True))

    @property
    def voxels(self) -> int:
        """Voxels of a patch."""
        return math.prod(self.patch)


def target_spacing(fingerprint: Fingerprint) -> tuple[tuple[float, ...], str]:
    """Return the spacing of the model's grid in mm, and why."""
    median = fingerprint.median_spacing
    low, high = fingerprint.spacing_at(0.0), fingerprint.spacing_at(1.0)
    if low == high:
        return median, f"all {len(fingerprint.cases)} training cases have {shown(median)} mm: nothing is resampled"
    text = (
        f"median of {len(fingerprint.cases)} training cases, from {shown(low)} to {shown(high)} mm: as many are"
        " thinned as are interpolated"
    )
    coarse = max(range(len(median)), key=lambda axis: median[axis])
    if median[coarse] < _ANISOTROPIC * min(median):
        return median, text
    tenth = fingerprint.spacing_at(0.1)[coarse]
    spacing = tuple(tenth if axis == coarse else step for axis, step in enumerate(median))
    return spacing, (
        f"{text}; axis {coarse} is {median[coarse] / min(median):.1f} times as coarse as the finest and takes its 10th "
        f"percentile, {tenth:.4g} instead of {median[coarse]:.4g} mm, so that cases with thin slices lose none"
    )


def lay_out(shape: Sequence[int], spacing: Sequence[float], limit: int, poolings: int) -> Layout:
    """Return the largest patch up to `limit` voxels, and the strides that suit it.

    Args:
        shape: the median image on the model's grid, voxels.
        spacing: of the grid in mm; ones for pictures.
        limit: voxels that a patch may have; rounding to strides may exceed it a little.
        poolings: the most that the network has places for.
    """
    extent = _extent(shape, spacing, limit)
    strides = _strides(extent, spacing, poolings)
    step = [math.prod(axis) for axis in zip(*strides, strict=True)]
    patch = tuple(
        _rounded(wanted, n, s, deep=any(stride[axis] > 1 for stride in strides))
        for axis, (wanted, n, s) in enumerate(zip(extent, shape, step, strict=True))
    )
    return Layout(patch, strides, all(p >= n for p, n in zip(patch, shape, strict=True)))


def _extent(shape: Sequence[int], spacing: Sequence[float], limit: int) -> list[float]:
    """Return the box of equal sides in mm, cut to the image, that has `limit` voxels; the image if it has fewer."""
    if math.prod(shape) <= limit:
        return [float(n) for n in shape]
    low, high = 0.0, max(n * step for n, step in zip(shape, spacing, strict=True))
    for _ in range(60):
        side = (low + high) / 2
        box = [min(float(n), side / step) for n, step in zip(shape, spacing, strict=True)]
        low, high = (side, high) if math.prod(box) <= limit else (low, side)
    return [min(float(n), low / step) for n, step in zip(shape, spacing, strict=True)]


def _strides(extent: Sequence[float], spacing: Sequence[float], poolings: int) -> tuple[tuple[int, ...], ...]:
    """Halve axes level by level; at least one pooling, because the networks need one."""
    size, step = list(extent), list(spacing)
    strides: list[tuple[int, ...]] = []
    while len(strides) < poolings:
        able = [n / 2 >= _SMALLEST_BOTTOM for n in size]
        if not any(able):
            break
        finest = min(mm for mm, yes in zip(step, able, strict=True) if yes)
        stride = tuple(2 if yes and mm <= _COARSER * finest else 1 for mm, yes in zip(step, able, strict=True))
        strides.append(stride)
        size = [n / s for n, s in zip(size, stride, strict=True)]
        step = [mm * s for mm, s in zip(step, stride, strict=True)]
    return tuple(strides) or (tuple(2 for _ in extent),)


def _rounded(wanted: float, shape: int, step: int, *, deep: bool) -> int:
    """Round to a multiple of the stride: up where the whole axis is meant, else to the nearest."""
    least = 2 * step if deep else step
    if wanted >= shape:
        return max(least, -(-shape // step) * step)
    return max(least, round(wanted / step) * step)
