"""Whole-slide images, read on demand at the resolution that a model wants.

An array's first axis after the channels is x (columns, left to right) and its last is y (rows, top to bottom), as of
all pictures here. Pixel (i, j) of a slide at a coarser resolution covers the square from i * scale to (i + 1) * scale
of the finest level: its value is the mean over that square, weighted by how much of each stored pixel lies in it. It is
taken from the coarsest stored level that is fine enough. At a finer resolution than stored, values are interpolated
linearly. Where the stored level was cut by a few pixels at the right or the bottom, so is what is read from it.

A pixel has one value, whatever window it is read in: the windows of the file that are decoded, the weights and the
order of sums depend on the pixel alone. So an image read in pieces is the image read whole, bit for bit.

Colors are those that are stored: neither an ICC profile nor a stain normalization is applied. Places that the scanner
left out get the background color that the file names, otherwise white.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from medseg.errors import CaseError, RequestError
from medseg.io.names import StrPath, absolute
from medseg.io.slides.levels import Levels, open_levels

if TYPE_CHECKING:
    from medseg.io.slides.tissue import Tissue

__all__ = ["MAX_READ_PIXELS", "Slide", "open_slide"]

# Of one read: 768 MiB of color.
MAX_READ_PIXELS: Final = 1 << 28
# A resolution this near to a stored one means the stored one: 0.5 asked for, 0.499 found.
_SAME: Final = 0.02
# Finer than the scanner's own by more than this, no new detail comes.
_MAX_ENLARGEMENT: Final = 4.0
_BLOCK: Final = 512
_CACHE_BYTES: Final = 64 << 20
_PIECE: Final = 4096
# A slide of 180,000 x 180,000 pixels without a small level; decoding it takes minutes.
_MAX_OVERVIEW_PIXELS: Final = 1 << 35


def open_slide(
    path: StrPath,
    *,
    microns_per_pixel: float | None = None,
    level: int | None = None,
    default_mpp: float | None = None,
) -> Slide:
    """Open a whole-slide image at one resolution; by default at the finest that is stored.

    Args:
        path: a slide in a format of OpenSlide or tiffslide (SVS, tiled TIFF, OME-TIFF, NDPI, MRXS, SCN, ...), a file
            or the folder of a DICOM slide, or a plain picture.
        microns_per_pixel: the resolution. Within 2 % of a stored level that level is taken as it is; see `Slide.mpp`.
        level: a stored level instead, 0 being the finest.
        default_mpp: micrometers per pixel of the finest level, used only where the file does not say them.

    Raises:
        RequestError: both resolutions are given, or one that cannot be, or one more than 4 times finer than the file.
        CaseError: the file cannot be read, or `microns_per_pixel` is asked for and its pixels have no known size.
    """
    _check_resolution(microns_per_pixel, level, default_mpp)
    file = absolute(path)
    levels = open_levels(file)
    try:
        return Slide(file, levels, _target(file, levels, microns_per_pixel, level, default_mpp), default_mpp)
    except BaseException:
        levels.close()
        raise


class Slide:
    """A slide at one resolution. Made by `open_slide`; a context manager that closes the file.

    Several threads may read from it; they take turns.

    Attributes:
        path: the file.
        backend: the library that reads it: "openslide", "tiffslide" or "pillow".
        shape: `(3, x, y)` at this resolution.
        mpp: micrometers per pixel at this resolution along x and y; None where nothing says them.
        scale: pixels of the finest level per pixel of this resolution, along x and y. Pixel borders of this resolution
            times `scale` are coordinates of the finest level, such as annotations use.
        full_size: `(width, height)` of the finest level.
        level_sizes: `(width, height)` of every stored level.
    """

    def __init__(
        self, path: Path, levels: Levels, scale: tuple[float, float], default_mpp: float | None = None
    ) -> None:
        self.path = path
        self.backend = levels.backend
        self.scale = scale
        self.full_size = levels.sizes[0]
        self.level_sizes = levels.sizes
        finest = levels.mpp or (None if default_mpp is None else (default_mpp, default_mpp))
        self.mpp = None if finest is None else (finest[0] * scale[0], finest[1] * scale[1])
        self._levels = levels
        self._blocks = _Blocks(levels)
        self._sampler = _Sampler.fitting(levels.sizes, scale)
        self.shape = (3, *self._sampler.size)

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._blocks.clear()
        self._levels.close()

    def read(self, x0: int, x1: int, y0: int, y1: int) -> NDArray[np.uint8]:
        """Return the pixels from column `x0` to before `x1`, and row `y0` to before `y1`, as `(3, x, y)`.

        Raises:
            RequestError: the window is empty, reaches beyond the slide, or has more than 2**28 pixels.
            CaseError: the file turns out to be damaged there.
        """
        _, width, height = self.shape
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise RequestError(
                f"Window {x0}:{x1}, {y0}:{y1} of {self.path}: expected one with pixels, inside the slide's "
                f"{width} x {height}."
            )
        if (x1 - x0) * (y1 - y0) > MAX_READ_PIXELS:
            raise RequestError(
                f"Window {x0}:{x1}, {y0}:{y1} of {self.path} has {(x1 - x0) * (y1 - y0):,} pixels: at most "
                f"{MAX_READ_PIXELS:,} are read at a time. Read it in pieces, or at a coarser resolution."
            )
        return self._sampler.read(self._blocks, x0, x1, y0, y1)

    def thumbnail(self, max_size: int = 1024) -> NDArray[np.uint8]:
        """Return the whole slide as `(3, x, y)` with a longer side of at most `max_size` pixels, never enlarged.

        A slide that stores no small level is read through once, in bounded memory.
        """
        if not 1 <= max_size <= math.isqrt(MAX_READ_PIXELS):
            raise RequestError(f"A thumbnail of {max_size} pixels: expected 1 to {math.isqrt(MAX_READ_PIXELS)}.")
        factor = max(1.0, *(side / max_size for side in self.shape[1:]))
        sampler = _Sampler.fitting(self.level_sizes, (self.scale[0] * factor, self.scale[1] * factor))
        if math.prod(sampler.stored) > _MAX_OVERVIEW_PIXELS:
            raise CaseError(
                f"{self.path} stores no level smaller than {sampler.stored[0]:,} x {sampler.stored[1]:,} pixels: too "
                "many to look through for an overview. Check its header, or store it as a pyramid."
            )
        return sampler.read(self._blocks, 0, sampler.size[0], 0, sampler.size[1])

    def tissue(self, *, max_size: int = 2048, margin: int = 2, min_pixels: int = 64) -> Tissue:
        """Return where tissue is, at low resolution; see `find_tissue` for how and what it misses."""
        from medseg.io.slides.tissue import Tissue, find_tissue

        small = self.thumbnail(max_size)
        mask = find_tissue(small, margin=margin, min_pixels=min_pixels)
        # The last pixel of a thumbnail may stick out, so its scale is the factor, not the ratio of the shapes.
        factor = max(1.0, *(side / max_size for side in self.shape[1:]))
        return Tissue(mask, (factor, factor), (self.shape[1], self.shape[2]))


@dataclass(frozen=True)
class _Axis:
    """Which stored pixels each pixel of one axis is made of.

    Attributes:
        first: the first stored pixel of each.
        weights: `(n, taps)`, the share of that one and of those after it; float32.
        last: the last stored pixel there is.
    """

    first: NDArray[np.int64]
    weights: NDArray[np.float32]
    last: int

    @classmethod
    def between(cls, start: int, stop: int, factor: float, stored: int) -> _Axis:
        """Return pixels `start` to before `stop`, each `factor` of the `stored` pixels wide."""
        pixels = np.arange(start, stop, dtype=np.float64)
        if factor == 1:
            return cls(np.arange(start, stop), np.ones((stop - start, 1), np.float32), stored - 1)
        if factor < 1:
            center = np.clip((pixels + 0.5) * factor - 0.5, 0, stored - 1)
            first = np.floor(center)
            weights = np.stack([1 - (center - first), center - first], axis=1)
        else:
            begin = np.minimum(pixels * factor, stored - 1.0)
            end = np.minimum((pixels + 1) * factor, stored)
            first = np.floor(begin)
            borders = first[:, None] + np.arange(math.ceil(factor) + 2)
            covered = np.clip(borders, begin[:, None], end[:, None])
            weights = np.diff(covered, axis=1)
            weights /= weights.sum(axis=1, keepdims=True)
        return cls(first.astype(np.int64), weights.astype(np.float32), stored - 1)

    @property
    def window(self) -> tuple[int, int]:
        """The first stored pixel that is needed, and the one after the last."""
        return int(self.first[0]), min(int(self.first[-1]) + self.weights.shape[1], self.last + 1)

    def apply(self, pixels: NDArray[np.generic]) -> NDArray[np.float32]:
        """Weight the first axis of pixels that begin at `window[0]`; the order of the sum is always the same."""
        base = self.window[0]
        total: NDArray[np.float32] = np.zeros((len(self.first), *pixels.shape[1:]), np.float32)
        for tap in range(self.weights.shape[1]):
            rows = pixels[np.minimum(self.first + tap, self.last) - base]
            total += rows * self.weights[:, tap].reshape(-1, *[1] * (pixels.ndim - 1))
        return total


@dataclass(frozen=True)
class _Sampler:
    """Reads one resolution from the stored level that fits it.

    Attributes:
        level: the stored level.
        factors: stored pixels per pixel along x and y; 1 for pixels as they are stored.
        size: `(width, height)` at this resolution.
        stored: `(width, height)` of the stored level.
    """

    level: int
    factors: tuple[float, float]
    size: tuple[int, int]
    stored: tuple[int, int]

    @classmethod
    def fitting(cls, sizes: tuple[tuple[int, int], ...], scale: tuple[float, float]) -> _Sampler:
        """Take the coarsest level that is at least as fine as `scale`."""
        fits = [
            n
            for n in range(len(sizes))
            if all(f <= s * (1 + _SAME) for f, s in zip(_scale(sizes, n), scale, strict=True))
        ]
        level = fits[-1] if fits else 0
        stored = sizes[level]
        factors = tuple(wanted / found for wanted, found in zip(scale, _scale(sizes, level), strict=True))
        if all(abs(factor - 1) < 1e-9 for factor in factors):
            return cls(level, (1.0, 1.0), stored, stored)
        # A pixel that lies on the slide only by rounding is none.
        width, height = (max(1, math.ceil(n / f - 1e-6)) for n, f in zip(stored, factors, strict=True))
        return cls(level, (factors[0], factors[1]), (width, height), stored)

    def read(self, blocks: _Blocks, x0: int, x1: int, y0: int, y1: int) -> NDArray[np.uint8]:
        """Return `(3, x, y)`, put together from pieces so that a strong reduction needs little memory."""
        out = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        step_x, step_y = (max(1, int(_PIECE / max(1.0, factor))) for factor in self.factors)
        for top in range(y0, y1, step_y):
            bottom = min(y1, top + step_y)
            for left in range(x0, x1, step_x):
                right = min(x1, left + step_x)
                out[top - y0 : bottom - y0, left - x0 : right - x0] = self._piece(blocks, left, right, top, bottom)
        return out.transpose(2, 1, 0)

    def _piece(self, blocks: _Blocks, x0: int, x1: int, y0: int, y1: int) -> NDArray[np.uint8]:
        if self.factors == (1.0, 1.0):
            return blocks.window(self.level, x0, x1, y0, y1)
        columns = _Axis.between(x0, x1, self.factors[0], self.stored[0])
        rows = _Axis.between(y0, y1, self.factors[1], self.stored[1])
        pixels = rows.apply(blocks.window(self.level, *columns.window, *rows.window))
        # Rounded halves up: to even, as numpy does, would make a flat grey of .5 patchy.
        mixed = columns.apply(pixels.transpose(1, 0, 2)).transpose(1, 0, 2)
        rounded: NDArray[np.uint8] = np.floor(mixed + np.float32(0.5)).astype(np.uint8)
        return rounded


class _Blocks:
    """Windows of stored levels, from a cache of blocks that are always decoded at the same places.

    OpenSlide takes places in pixels of the finest level, which for most coarser levels are not whole pixels of their
    own: one pixel decoded from two places would differ.
    """

    def __init__(self, levels: Levels) -> None:
        self._levels = levels
        self._kept: OrderedDict[tuple[int, int, int], NDArray[np.uint8]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def window(self, level: int, x0: int, x1: int, y0: int, y1: int) -> NDArray[np.uint8]:
        """Return `(y1 - y0, x1 - x0, 3)` of a level."""
        out = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        for row in range(y0 // _BLOCK, (y1 - 1) // _BLOCK + 1):
            for column in range(x0 // _BLOCK, (x1 - 1) // _BLOCK + 1):
                left, top = column * _BLOCK, row * _BLOCK
                block = self._block(level, column, row)
                begin_x, begin_y = max(x0, left), max(y0, top)
                end_x, end_y = min(x1, left + block.shape[1]), min(y1, top + block.shape[0])
                part = block[begin_y - top : end_y - top, begin_x - left : end_x - left]
                out[begin_y - y0 : end_y - y0, begin_x - x0 : end_x - x0] = part
        return out

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _block(self, level: int, column: int, row: int) -> NDArray[np.uint8]:
        key = (level, column, row)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            width, height = self._levels.sizes[level]
            x, y = column * _BLOCK, row * _BLOCK
            block = self._levels.read(level, x, y, min(_BLOCK, width - x), min(_BLOCK, height - y))
            self._kept[key] = block
            self._bytes += block.nbytes
            while self._bytes > _CACHE_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
            return block


def _scale(sizes: tuple[tuple[int, int], ...], level: int) -> tuple[float, float]:
    """Return how many pixels of the finest level a pixel of `level` is wide and high.

    Levels are made by whole factors and the rest of a division is cut or filled up, so 300 / 37 means 8.
    """
    ratios = sizes[0][0] / sizes[level][0], sizes[0][1] / sizes[level][1]
    whole = round(min(ratios))
    both = zip(sizes[0], sizes[level], strict=True)
    if whole >= 1 and all(small in (full // whole, -(-full // whole)) for full, small in both):
        return float(whole), float(whole)
    return ratios


def _target(
    file: Path, levels: Levels, microns: float | None, level: int | None, default_mpp: float | None
) -> tuple[float, float]:
    """Return the wanted resolution as pixels of the finest level per pixel."""
    if level is not None and level >= len(levels.sizes):
        raise RequestError(f"{file} has the levels 0 to {len(levels.sizes) - 1}: there is no level {level}.")
    if microns is None:
        return _scale(levels.sizes, level or 0)
    if levels.mpp is None and default_mpp is None:
        raise CaseError(
            f"{file} {levels.note}, so {microns:g} micrometers per pixel cannot be had: give default_mpp, the "
            "micrometers per pixel of its finest level.",
            code="no-resolution",
            path=file,
            expected=microns,
            reason=levels.note,
        )
    found = levels.mpp or (default_mpp or 0.0, default_mpp or 0.0)
    wanted = microns / found[0], microns / found[1]
    for number in range(len(levels.sizes)):
        stored = _scale(levels.sizes, number)
        if all(abs(want / have - 1) <= _SAME for want, have in zip(wanted, stored, strict=True)):
            return stored
    if min(wanted) < 1 / _MAX_ENLARGEMENT:
        raise RequestError(
            f"{file} has {found[0]:.4g} x {found[1]:.4g} micrometers per pixel: {microns:g} is more than "
            f"{_MAX_ENLARGEMENT:g} times finer, where there is nothing to see."
        )
    return wanted


def _check_resolution(microns: float | None, level: int | None, default_mpp: float | None) -> None:
    if microns is not None and level is not None:
        raise RequestError("A slide is read at microns_per_pixel or at a level, not both.")
    if level is not None and level < 0:
        raise RequestError(f"Level {level} of a slide: expected 0, the finest, or more.")
    for name, value in (("microns_per_pixel", microns), ("default_mpp", default_mpp)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RequestError(f"{name} is {value}: expected micrometers above 0, such as 0.5.")
