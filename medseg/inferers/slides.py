"""Sliding window inference on slides that are read on demand; labels are returned in strips from top to bottom.

Windows, weights and order are those of `SlidingWindowInferer`, so the strips are its labels for the same image. Memory
holds one row of windows: their pixels, prefetched by a thread, and the accumulators.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.errors import CaseError, RequestError
from medseg.inferers.blend import Place, Slab, Windows, WindowSource, cut_windows, in_batches, padded, per_axis, stream
from medseg.inferers.results import activate, top_class
from medseg.inferers.sliding_window import SlidingWindowInferer
from medseg.inferers.window_runner import NotStreamableError, WindowRunner, no_room_for_a_window

__all__ = ["PixelSource", "label_strips"]

# The stream axis is y.
_AXIS: Final = 1
_AHEAD_BYTES: Final = 64 << 20
_EMPTY_ROWS: Final = 64

Prepare = Callable[[torch.Tensor], torch.Tensor]
# Whether to run a window with the pixels [x0, x1) and [y0, y1).
Wanted = Callable[[int, int, int, int], bool]
Labels = NDArray[np.integer[Any]]


class PixelSource(Protocol):
    """Image `(C, x, y)` that is read by region, such as a `medseg.io.slides.slide.Slide`."""

    shape: tuple[int, int, int]

    def read(self, x0: int, x1: int, y0: int, y1: int) -> NDArray[np.uint8]:
        """Return the pixels `(C, x, y)` of the columns [x0, x1) and the rows [y0, y1)."""


def label_strips(
    slide: PixelSource,
    network: nn.Module,
    inferer: SlidingWindowInferer,
    *,
    prepare: Prepare | None = None,
    wanted: Wanted | None = None,
) -> Iterator[Labels]:
    """Yield the labels of an image in strips `(x, rows)`, from top to bottom, without gaps.

    If no window with tissue is skipped, the labels of tissue are the same as when all windows are run; only the
    background around the tissue may differ.

    Args:
        slide: Image to segment.
        network: Network in evaluation mode, on the device of inference.
        inferer: Inferer whose windows, weights, backend, memory limit and callbacks are used.
        prepare: Pixelwise preprocessing of uint8 pixels `(C, x, y)`, called in another thread; converts to float by
            default.
        wanted: Predicate that selects the windows to run, all by default. Pixels without a window are background.

    Raises:
        RequestError: Inferer with `activation="sigmoid"` or `foreground`.
        CaseError: Network output that is not finite logits of the window size, a damaged image, or an image that
            does not fit into `max_memory`.
    """
    if inferer.native.activation == "sigmoid" or inferer.foreground is not None:
        raise RequestError(
            "Slides do not support activation='sigmoid' or 'foreground': they have one label per pixel, and their "
            "windows are selected by tissue. Remove these settings."
        )
    run = _Run(slide, network, inferer, prepare or torch.Tensor.float, wanted or _everywhere)
    return _without_gaps(run.slabs(), run.windows, inferer.native.activation)


def _everywhere(x0: int, x1: int, y0: int, y1: int) -> bool:
    return True


def _without_gaps(slabs: Iterable[Slab], windows: Windows, activation: str) -> Iterator[Labels]:
    """Yield the labels of the slabs, and background for skipped rows."""
    width, height = windows.image_size
    row = 0
    for slab in slabs:
        yield from _background(width, slab.start - row)
        # Copied, since a slab is valid only until the next one.
        labels: Labels = top_class(activate(slab.logits, slab.covered, activation)).cpu().numpy()
        row = slab.start + len(labels)
        yield labels.T
    yield from _background(width, height - row)


def _background(width: int, rows: int) -> Iterator[Labels]:
    for first in range(0, rows, _EMPTY_ROWS):
        yield np.zeros((width, min(_EMPTY_ROWS, rows - first)), np.uint8)


class _Run:
    """Windows of one image and the forward passes over them."""

    def __init__(
        self, slide: PixelSource, network: nn.Module, inferer: SlidingWindowInferer, prepare: Prepare, wanted: Wanted
    ) -> None:
        self.inferer = inferer
        self.wanted = wanted
        parameter = next(network.parameters(), None)
        self.device = torch.device(inferer.sw_device or ("cpu" if parameter is None else parameter.device))
        self.windows, self.columns, self.rows = _cut(slide.shape[1:], inferer)
        self.source = _SlideWindows(slide, self.windows, prepare, inferer.padding_mode, inferer.cval)
        self.passes = WindowRunner(
            inferer,
            network,
            self.windows,
            channels=slide.shape[0],
            total=sum(1 for _ in self._places()),
            device=self.device,
            result_bytes=lambda classes: 0,
        )

    def slabs(self) -> Iterator[Slab]:
        """Run the windows and yield finished rows."""
        if not self.passes.total:
            return
        if self.inferer.max_memory:
            with torch.no_grad():
                self.passes.fit(self.source.read(*next(self._places())), read_ahead=_AHEAD_BYTES)
        weights = self.inferer.weights(self.windows.roi, torch.float32, self.device)
        ahead = max(1, min(len(self.columns), _AHEAD_BYTES // (12 * math.prod(self.windows.roi))))
        with _reading_ahead(self.source, self._places(), ahead) as source:
            batches = in_batches(self._places(), self.passes.batch)
            yield from stream(source, self.windows, self._pass, weights=weights, batches=batches)

    def _places(self) -> Iterator[Place]:
        roi, size = self.windows.roi, self.windows.image_size
        for y in self.rows:
            for x in self.columns:
                if self.wanted(x, min(x + roi[0], size[0]), y, min(y + roi[1], size[1])):
                    yield 0, (x, y)

    def _pass(self, windows: torch.Tensor) -> torch.Tensor:
        try:
            with torch.no_grad():
                return self.passes(windows)
        except torch.OutOfMemoryError as error:
            raise no_room_for_a_window(self.windows.roi) from error
        except NotStreamableError as error:
            said = str(error)
            raise CaseError(f"{said[0].upper()}{said[1:]}: expected logits of the window size.") from None


def _cut(shape: Sequence[int], inferer: SlidingWindowInferer) -> tuple[Windows, list[int], list[int]]:
    """Return the windows without their starts, and the starts along x and y, since a slide has too many windows."""
    axes = [
        cut_windows((size,), (int(roi or 0),), (float(overlap or 0.0),))
        for size, roi, overlap in zip(shape, per_axis(inferer.roi_size, 2), per_axis(inferer.overlap, 2), strict=True)
    ]
    windows = Windows(
        image_size=(axes[0].image_size[0], axes[1].image_size[0]),
        size=(axes[0].size[0], axes[1].size[0]),
        padding=(axes[0].padding[0], axes[1].padding[0]),
        roi=(axes[0].roi[0], axes[1].roi[0]),
        starts=(),
        axis=_AXIS,
    )
    columns, rows = ([start for (start,) in axis.starts] for axis in axes)
    return windows, columns, rows


class _SlideWindows:
    """Preprocessed windows of an image, padded along axes shorter than a window."""

    def __init__(self, slide: PixelSource, windows: Windows, prepare: Prepare, padding_mode: str, cval: float) -> None:
        self.slide = slide
        self.windows = windows
        self.prepare = prepare
        self.padding_mode = padding_mode
        self.cval = cval

    def read(self, image: int, start: Sequence[int]) -> torch.Tensor:
        """Return one window `(1, C, *roi)`."""
        (x0, x1), (y0, y1) = (
            (first, first + min(roi, size))
            for first, roi, size in zip(start, self.windows.roi, self.windows.image_size, strict=True)
        )
        window = self.prepare(torch.from_numpy(np.ascontiguousarray(self.slide.read(x0, x1, y0, y1))))[None]
        return padded(window, self.windows, self.padding_mode, self.cval)


@contextmanager
def _reading_ahead(source: WindowSource, places: Iterator[Place], ahead: int) -> Iterator[WindowSource]:
    """Return a source that prefetches windows in the order of `places` in a thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="windows")
    try:
        yield _ReadAhead(source, places, ahead, pool)
    finally:
        pool.shutdown(cancel_futures=True)


class _ReadAhead:
    """Queue of prefetched windows."""

    def __init__(self, source: WindowSource, places: Iterator[Place], ahead: int, pool: ThreadPoolExecutor) -> None:
        self.source = source
        self.places = places
        self.pool = pool
        self.waiting: deque[tuple[Place, Future[torch.Tensor]]] = deque()
        for _ in range(ahead):
            self._order()

    def read(self, image: int, start: Sequence[int]) -> torch.Tensor:
        """Return the next window `(1, C, *roi)`."""
        place, window = self.waiting.popleft()
        if place != (image, tuple(start)):
            raise RuntimeError(f"windows requested out of order: expected {place}, found {start}")
        self._order()
        return window.result()

    def _order(self) -> None:
        place = next(self.places, None)
        if place is not None:
            self.waiting.append((place, self.pool.submit(self.source.read, *place)))
