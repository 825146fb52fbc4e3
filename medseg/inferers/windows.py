"""Where the windows of a sliding window lie: MONAI's positions, sorted for a stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.errors import RequestError

__all__ = ["Windows", "count_windows", "cut_windows", "per_axis"]


@dataclass(frozen=True)
class Windows:
    """The windows of one image, in the order in which a stream along `axis` runs them.

    Attributes:
        image_size: spatial size of the image.
        size: spatial size of the image with the padding of axes that are shorter than a window.
        padding: voxels added before and after each axis.
        roi: spatial size of a window.
        starts: first voxel of each window in the padded image; ascending along `axis`, the other axes in raster order.
        axis: the spatial axis along which finished planes are handed on.
    """

    image_size: tuple[int, ...]
    size: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    roi: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    axis: int

    def slab_values(self, channels: int) -> int:
        """Return how many numbers the accumulators of a stream hold: `channels` of logits and one of weights."""
        return (channels + 1) * math.prod(self.size) // self.size[self.axis] * self.roi[self.axis]


def cut_windows(
    image_size: Sequence[int],
    roi_size: Sequence[int] | int,
    overlap: Sequence[float] | float,
    *,
    axis: int | None = 0,
) -> Windows:
    """Return the windows that MONAI's sliding window cuts from one image.

    Args:
        image_size: spatial size of the image.
        roi_size: size of a window; 0 or less stands for the whole axis.
        overlap: share of a window that its neighbor covers, at least 0 and below 1.
        axis: where the stream goes; None takes the axis whose slab is the smallest.
    """
    image = tuple(int(size) for size in image_size)
    rois = per_axis(roi_size, len(image))
    roi = tuple(int(r) if r is not None and r > 0 else size for r, size in zip(rois, image, strict=True))
    size = tuple(max(pair) for pair in zip(image, roi, strict=True))
    missing = [whole - own for whole, own in zip(size, image, strict=True)]
    padding = tuple((total // 2, total - total // 2) for total in missing)
    along = [_starts(*each) for each in zip(size, roi, per_axis(overlap, len(image)), strict=True)]
    if axis is None:
        # The slab holds roi planes of the other axes: the smaller roi / size, the smaller the slab.
        axis = min(range(len(size)), key=lambda a: roi[a] / size[a])
    starts = sorted(itertools.product(*along), key=lambda start: start[axis])
    return Windows(image, size, padding, roi, tuple(starts), axis)


def count_windows(image_size: Sequence[int], roi_size: Sequence[int] | int, overlap: Sequence[float] | float) -> int:
    """Return the number of windows that MONAI's sliding window cuts from one image; arguments as in `cut_windows`."""
    return len(cut_windows(image_size, roi_size, overlap).starts)


def per_axis(value: Sequence[float] | float | None, dims: int) -> tuple[float | None, ...]:
    """Return one value for each of `dims` axes: a single one stands for all.

    Raises:
        RequestError: there are more or fewer values than axes.
    """
    if isinstance(value, Sequence) and len(value) != dims:
        raise RequestError(f"{tuple(value)} are {len(value)} values for {dims} spatial axes: give one, or {dims}")
    return tuple(value) if isinstance(value, Sequence) else (value,) * dims


def _starts(size: int, roi: int, overlap: float | None) -> list[int]:
    if roi >= size:
        return [0]
    step = max(int(roi * (1 - (overlap or 0.0))), 1)
    return [min(step * k, size - roi) for k in range(math.ceil((size - roi) / step) + 1)]
