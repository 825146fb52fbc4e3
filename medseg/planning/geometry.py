"""Target spacing, patch size and strides: pure arithmetic on voxel counts and millimeters.

The rules and their reasons:

* The target spacing is the median of the training cases, so that half of them are downsampled and half upsampled.
  Where slices are much thicker than pixels and their thickness varies, the slice axis takes its 10th percentile:
  upsampling thick slices costs only time, while downsampling thin ones loses small structures for good.
* A patch is as close to a cube in millimeters as possible, because anatomy has no preferred axis, and never larger
  than the median image.
* An axis is pooled as long as its voxels are at most twice as long as the finest ones at that level and 4 voxels remain
  at the bottom: pooling coarse axes early would discard the little detail they have.
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
    """Patch size and strides of a network.

    Attributes:
        patch: Patch size in voxels, a multiple of `step`.
        strides: One entry per pooling, from full resolution down, with a stride per axis.
        whole: Whether a patch covers the median image.
    """

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    whole: bool

    @property
    def step(self) -> tuple[int, ...]:
        """Total stride of each axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))

    @property
    def bottom(self) -> tuple[int, ...]:
        """Shape of the feature map at the deepest level, in voxels."""
        return tuple(n // s for n, s in zip(self.patch, self.step, strict=True))

    @property
    def voxels(self) -> int:
        """Number of voxels of a patch."""
        return math.prod(self.patch)


def target_spacing(fingerprint: Fingerprint) -> tuple[tuple[float, ...], str]:
    """Return the spacing in mm to which images are resampled, and the reason."""
    median = fingerprint.median_spacing
    low, high = fingerprint.spacing_at(0.0), fingerprint.spacing_at(1.0)
    if low == high:
        return median, f"the spacing of all {len(fingerprint.cases)} training cases, {shown(median)} mm: no resampling"
    text = (
        f"median of {len(fingerprint.cases)} training cases, whose spacing ranges from {shown(low)} to {shown(high)} "
        "mm, so that as many are downsampled as upsampled"
    )
    coarse = max(range(len(median)), key=lambda axis: median[axis])
    if median[coarse] < _ANISOTROPIC * min(median):
        return median, text
    tenth = fingerprint.spacing_at(0.1)[coarse]
    spacing = tuple(tenth if axis == coarse else step for axis, step in enumerate(median))
    return spacing, (
        f"{text}; axis {coarse} is {median[coarse] / min(median):.1f} times as coarse as the finest axis and takes its "
        f"10th percentile, {tenth:.4g} mm instead of {median[coarse]:.4g} mm, so that thin slices are kept"
    )


def lay_out(shape: Sequence[int], spacing: Sequence[float], limit: int, poolings: int) -> Layout:
    """Return the largest patch of up to `limit` voxels, and its strides.

    Args:
        shape: Median shape of the images at the target spacing, in voxels.
        spacing: Target spacing in mm; ones for 2D images.
        limit: Maximum number of voxels of a patch; rounding to multiples of the strides may slightly exceed it.
        poolings: Maximum number of poolings of the network.
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
    """Return the cube in mm, clipped to the image, that has `limit` voxels; the whole image if it has fewer."""
    if math.prod(shape) <= limit:
        return [float(n) for n in shape]
    low, high = 0.0, max(n * step for n, step in zip(shape, spacing, strict=True))
    for _ in range(60):
        side = (low + high) / 2
        box = [min(float(n), side / step) for n, step in zip(shape, spacing, strict=True)]
        low, high = (side, high) if math.prod(box) <= limit else (low, side)
    return [min(float(n), low / step) for n, step in zip(shape, spacing, strict=True)]


def _strides(extent: Sequence[float], spacing: Sequence[float], poolings: int) -> tuple[tuple[int, ...], ...]:
    """Return the strides, level by level; at least one pooling, because the networks need one."""
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
    """Round to a multiple of the stride: up where the patch covers the whole axis, otherwise to the nearest."""
    least = 2 * step if deep else step
    if wanted >= shape:
        return max(least, -(-shape // step) * step)
    return max(least, round(wanted / step) * step)
