"""Sliding windows and their blending as a stream, which holds only the planes that later windows still change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from medseg.errors import CaseError, RequestError

__all__ = [
    "Place",
    "Slab",
    "TensorWindows",
    "WindowSource",
    "Windows",
    "check_numbers",
    "count_windows",
    "cut_windows",
    "in_batches",
    "one_thread",
    "padded",
    "per_axis",
    "stream",
]

# Planes per slab; consumers copy this many at a time.
_PLANES = 16

Predict = Callable[[torch.Tensor], torch.Tensor]
# Index of an image in its batch, and first voxel of a window.
Place = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Windows:
    """Windows of one image, in the order of a stream along `axis`.

    Attributes:
        image_size: Spatial size of the image.
        size: Spatial size of the padded image; axes shorter than a window are padded to its size.
        padding: Voxels added before and after each axis.
        roi: Spatial size of a window.
        starts: First voxel of each window in the padded image, ascending along `axis`, other axes in raster order.
        axis: Spatial axis along which finished planes are yielded.
    """

    image_size: tuple[int, ...]
    size: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    roi: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    axis: int

    def slab_values(self, channels: int) -> int:
        """Return the number of values in the accumulators of a stream: `channels` of logits and one of weights."""
        return (channels + 1) * math.prod(self.size) // self.size[self.axis] * self.roi[self.axis]


def cut_windows(
    image_size: Sequence[int],
    roi_size: Sequence[int] | int,
    overlap: Sequence[float] | float,
    *,
    axis: int | None = 0,
) -> Windows:
    """Return the windows of MONAI's sliding window inference for one image.

    Args:
        image_size: Spatial size of the image.
        roi_size: Size of a window in voxels; 0 or less for the whole axis.
        overlap: Overlap between adjacent windows as a fraction of the window, in [0, 1).
        axis: Axis of the stream; None chooses the axis with the smallest slab.
    """
    image = tuple(int(size) for size in image_size)
    rois = per_axis(roi_size, len(image))
    roi = tuple(int(r) if r is not None and r > 0 else size for r, size in zip(rois, image, strict=True))
    size = tuple(max(pair) for pair in zip(image, roi, strict=True))
    missing = [whole - own for whole, own in zip(size, image, strict=True)]
    padding = tuple((total // 2, total - total // 2) for total in missing)
    along = [_starts(*each) for each in zip(size, roi, per_axis(overlap, len(image)), strict=True)]
    if axis is None:
        # A slab holds roi planes, so the axis with the smallest roi / size has the smallest slab.
        axis = min(range(len(size)), key=lambda a: roi[a] / size[a])
    starts = sorted(itertools.product(*along), key=lambda start: start[axis])
    return Windows(image, size, padding, roi, tuple(starts), axis)


def count_windows(image_size: Sequence[int], roi_size: Sequence[int] | int, overlap: Sequence[float] | float) -> int:
    """Return the number of windows of MONAI's sliding window inference; arguments as in `cut_windows`."""
    return len(cut_windows(image_size, roi_size, overlap).starts)


def per_axis(value: Sequence[float] | float | None, dims: int) -> tuple[float | None, ...]:
    """Return one value for each of `dims` axes, repeating a single value.

    Raises:
        RequestError: Number of values different from the number of axes.
    """
    if isinstance(value, Sequence) and len(value) != dims:
        raise RequestError(f"{tuple(value)} has {len(value)} values, expected 1 or {dims} for {dims} spatial axes")
    return tuple(value) if isinstance(value, Sequence) else (value,) * dims


def _starts(size: int, roi: int, overlap: float | None) -> list[int]:
    if roi >= size:
        return [0]
    step = max(int(roi * (1 - (overlap or 0.0))), 1)
    return [min(step * k, size - roi) for k in range(math.ceil((size - roi) / step) + 1)]


@dataclass(frozen=True)
class Slab:
    """Finished planes of one image.

    Attributes:
        image: Index of the image in its batch.
        start: Index of the first plane on the stream axis.
        logits: Logits `(K, planes, *others)`, the stream axis before the other spatial axes; valid until the next slab.
        covered: Mask `(planes, *others)`, False where no window was run; None if all voxels are covered.
    """

    image: int
    start: int
    logits: torch.Tensor
    covered: torch.Tensor | None


class WindowSource(Protocol):
    """Source of the voxels of windows: a tensor, or a slide that is read on demand."""

    def read(self, image: int, start: Sequence[int]) -> torch.Tensor:
        """Return one window `(1, C, *roi)` of an image."""


class TensorWindows:
    """Windows of a tensor, padded one by one to avoid a padded copy of the image.

    Args:
        images: Images `(B, C, *spatial)`.
        windows: Positions of the windows.
        padding_mode: Mode of `torch.nn.functional.pad`.
        cval: Value of constant padding.
    """

    def __init__(self, images: torch.Tensor, windows: Windows, padding_mode: str, cval: float) -> None:
        self.images = images
        self.windows = windows
        self.padding_mode = padding_mode
        self.cval = cval

    def read(self, image: int, start: Sequence[int]) -> torch.Tensor:
        """Return one window `(1, C, *roi)`."""
        where = [
            slice(first, first + min(roi, size))
            for first, roi, size in zip(start, self.windows.roi, self.windows.image_size, strict=True)
        ]
        window = self.images[(slice(image, image + 1), slice(None), *where)]
        return padded(window, self.windows, self.padding_mode, self.cval)


def padded(window: torch.Tensor, windows: Windows, padding_mode: str, cval: float) -> torch.Tensor:
    """Pad a window `(1, C, *spatial)` along axes that are shorter than a window."""
    # torch lists the last axis first
    sides = [side for pair in reversed(windows.padding) for side in pair]
    if not any(sides):
        return window
    return F.pad(window, sides, mode=padding_mode, value=cval if padding_mode == "constant" else None)


def stream(
    source: WindowSource,
    windows: Windows,
    predict: Predict,
    *,
    weights: torch.Tensor,
    batches: Iterable[Sequence[Place]],
    device: torch.device | None = None,
) -> Iterator[Slab]:
    """Run all windows and yield finished planes as weighted averages.

    With the same batches, the float32 values equal those of MONAI's sliding window inference: bit for bit along axis 0,
    and up to rounding along other axes, where windows are added in a different order.

    Args:
        source: Source of the voxels.
        windows: Positions of the windows.
        predict: Function from windows `(N, C, *roi)` to logits `(N, K, *roi)`.
        weights: Importance map `(*roi)` of a window.
        batches: Batches of (image, start) of the windows to run, in the order of `windows`, image by image.
        device: Device of the accumulators; by default that of the logits.

    Raises:
        CaseError: Non-finite logits.
    """
    accumulators: _Accumulators | None = None
    for batch in batches:
        logits = predict(_joined([source.read(*place) for place in batch]))
        with one_thread():
            for (image, start), own in zip(batch, logits, strict=True):
                if accumulators is None or accumulators.image != image:
                    if accumulators is not None:
                        yield from accumulators.finish(windows.size[windows.axis])
                    accumulators = _Accumulators(image, windows, weights, own, device)
                yield from accumulators.finish(start[windows.axis])
                accumulators.add(own, start)
    if accumulators is not None:
        yield from accumulators.finish(windows.size[windows.axis])


class _Accumulators:
    """Weighted sums of the unfinished planes, and sums of their weights."""

    def __init__(
        self, image: int, windows: Windows, weights: torch.Tensor, logits: torch.Tensor, device: torch.device | None
    ) -> None:
        self.image = image
        self.windows = windows
        axis = windows.axis
        self.device = device or logits.device
        self.others = [a for a in range(len(windows.size)) if a != axis]
        shape = (windows.roi[axis], *(windows.size[a] for a in self.others))
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.sums = torch.zeros((len(logits), *shape), dtype=dtype, device=self.device)
        self.totals = torch.zeros(shape, dtype=dtype, device=self.device)
        self.weights = weights.to(device=self.device, dtype=dtype).movedim(axis, 0)
        self.start = 0

    def add(self, logits: torch.Tensor, start: Sequence[int]) -> None:
        """Add the logits `(K, *roi)` of one window."""
        axis = self.windows.axis
        offset = start[axis] - self.start
        ranges = [slice(start[a], start[a] + self.windows.roi[a]) for a in self.others]
        where = (slice(offset, offset + self.windows.roi[axis]), *ranges)
        values = logits.to(self.device, self.sums.dtype).movedim(axis + 1, 1)
        # Not addcmul, which rounds once where MONAI rounds twice.
        self.sums[(slice(None), *where)] += values * self.weights
        self.totals[where] += self.weights

    def finish(self, end: int) -> Iterator[Slab]:
        """Yield the planes before `end` and free their space for new planes."""
        count = min(end - self.start, self.totals.shape[0])
        if count <= 0:
            return
        yield from self._slab(count)
        self._shift(count)
        # If no window was run for longer than a slab, the planes in between were never accumulated.
        self.start = end

    def _slab(self, count: int) -> Iterator[Slab]:
        low, high = self._inside(count)
        if low >= high:
            return
        crop = [slice(pad[0], pad[0] + size) for pad, size in self._others()]
        sums = self.sums[(slice(None), slice(low, high), *crop)]
        totals = self.totals[(slice(low, high), *crop)]
        covered = totals > 0
        everywhere = bool(covered.all())
        if not everywhere:
            totals.masked_fill_(~covered, 1.0)
        sums /= totals
        check_numbers(sums)
        first = self.start + low - self.windows.padding[self.windows.axis][0]
        for at in range(0, high - low, _PLANES):
            part = slice(at, at + _PLANES)
            yield Slab(self.image, first + at, sums[:, part], None if everywhere else covered[part])

    def _inside(self, count: int) -> tuple[int, int]:
        """Return the range of the next `count` planes that belong to the image rather than its padding."""
        axis = self.windows.axis
        before = self.windows.padding[axis][0]
        return max(before - self.start, 0), min(before + self.windows.image_size[axis] - self.start, count)

    def _others(self) -> Iterator[tuple[tuple[int, int], int]]:
        return ((self.windows.padding[a], self.windows.image_size[a]) for a in self.others)

    def _shift(self, count: int) -> None:
        kept = self.totals.shape[0] - count
        # Source and target overlap if more than half is kept, so move block by block.
        for low in range(0, kept, count):
            high = min(low + count, kept)
            self.sums[:, low:high] = self.sums[:, low + count : high + count]
            self.totals[low:high] = self.totals[low + count : high + count]
        self.sums[:, kept:] = 0
        self.totals[kept:] = 0


def check_numbers(logits: torch.Tensor) -> None:
    """Check that all logits are finite, since a class with NaN would silently lose to every other class.

    Raises:
        CaseError: Non-finite logits.
    """
    if not bool(torch.isfinite(logits.sum())) and not bool(torch.isfinite(logits).all()):
        raise CaseError(
            "The network output contains non-finite values (NaN or Inf), possibly from an overflow in float16 or "
            "bfloat16: run again with precision float32, and check the intensities of the image."
        )


def _joined(windows: list[torch.Tensor]) -> torch.Tensor:
    return windows[0].contiguous() if len(windows) == 1 else torch.cat(windows)


def in_batches(places: Iterable[Place], size: int) -> Iterator[list[Place]]:
    """Yield batches of up to `size` places."""
    rest = iter(places)
    while batch := list(itertools.islice(rest, size)):
        yield batch


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread inside the context: on a busy machine, synchronizing threads slows small operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
