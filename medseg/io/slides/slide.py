"""Whole-slide images, read region by region at the resolution of a model.

Arrays are `(3, x, y)`: x are columns, left to right, and y are rows, top to bottom, as for all 2D images. At a coarser
resolution, pixel (i, j) covers the square from i * scale to (i + 1) * scale of the finest level: its value is the
area-weighted mean over that square, computed from the coarsest stored level that is fine enough. At a finer resolution
than stored, values are interpolated linearly. If the stored level is cropped by a few pixels at the right or bottom, so
is the result.

The value of a pixel does not depend on the window it is read in: the decoded blocks of the file, the weights and the
order of sums depend on the pixel alone. Therefore an image read in windows equals the image read as a whole, bit for
bit.

Colors are returned as stored: neither an ICC profile nor stain normalization is applied. Unscanned regions have the
background color of the file, by default white.
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

# Limit of one read: 768 MiB of color.
MAX_READ_PIXELS: Final = 1 << 28
# Relative tolerance within which a stored level is used as it is: 0.5 requested, 0.499 stored.
_SAME: Final = 0.02
# Largest upsampling: beyond this there is no additional detail.
_MAX_UPSAMPLING: Final = 4.0
_BLOCK: Final = 512
_CACHE_BYTES: Final = 64 << 20
_PIECE: Final = 4096
# A slide of 180,000 x 180,000 pixels without a small level, which takes minutes to decode.
_MAX_OVERVIEW_PIXELS: Final = 1 << 35


def open_slide(
    path: StrPath,
    *,
    microns_per_pixel: float | None = None,
    level: int | None = None,
    default_mpp: float | None = None,
) -> Slide:
    """Open a whole-slide image at one resolution, by default the finest stored one.

    Args:
        path: Slide in a format of OpenSlide or tiffslide (SVS, tiled TIFF, OME-TIFF, NDPI, MRXS, SCN, ...), a file or
            the folder of a DICOM slide, or an ordinary 2D image.
        microns_per_pixel: Resolution in µm/px. A stored level within 2 % of it is used as it is; see `Slide.mpp`.
        level: Stored level to read instead, 0 for the finest.
        default_mpp: Resolution of the finest level in µm/px, used only if the file has none.

    Raises:
        RequestError: Both resolution and level are given, one of them is invalid, or the resolution is more than 4
            times finer than that of the file.
        CaseError: The file cannot be read, or `microns_per_pixel` is given and the file has no pixel size.
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
    """A slide at one resolution, returned by `open_slide`; a context manager that closes the file.

    It is thread-safe; reads are serialized.

    Attributes:
        path: Path of the file.
        backend: Library that reads the file: "openslide", "tiffslide" or "pillow".
        shape: Shape `(3, x, y)` at this resolution.
        mpp: Resolution in µm/px along x and y; None if unknown.
        scale: Pixels of the finest level per pixel of this resolution, along x and y. Pixel borders times `scale` are
            coordinates of the finest level, as used by annotations.
        full_size: Size `(width, height)` of the finest level.
        level_sizes: Size `(width, height)` of every stored level.
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
        """Return the pixels `(3, x, y)` of columns `x0` to `x1` and rows `y0` to `y1`, both ends exclusive.

        Raises:
            RequestError: The window is empty, extends beyond the slide, or has more than 2**28 pixels.
            CaseError: The file is damaged in that region.
        """
        _, width, height = self.shape
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise RequestError(
                f"Invalid window {x0}:{x1}, {y0}:{y1} of {self.path}: expected a non-empty window inside "
                f"{width} x {height} pixels."
            )
        if (x1 - x0) * (y1 - y0) > MAX_READ_PIXELS:
            raise RequestError(
                f"Window {x0}:{x1}, {y0}:{y1} of {self.path} is too large: {(x1 - x0) * (y1 - y0):,} pixels, the limit "
                f"is {MAX_READ_PIXELS:,}. Read smaller windows, or at a coarser resolution."
            )
        return self._sampler.read(self._blocks, x0, x1, y0, y1)

    def thumbnail(self, max_size: int = 1024) -> NDArray[np.uint8]:
        """Return the whole slide as `(3, x, y)`, downsampled to at most `max_size` pixels along the longer side.

        A slide without a small level is decoded completely, in bounded memory.
        """
        if not 1 <= max_size <= math.isqrt(MAX_READ_PIXELS):
            raise RequestError(
                f"Invalid size {max_size} of a thumbnail: expected 1 to {math.isqrt(MAX_READ_PIXELS)} pixels."
            )
        factor = max(1.0, *(side / max_size for side in self.shape[1:]))
        sampler = _Sampler.fitting(self.level_sizes, (self.scale[0] * factor, self.scale[1] * factor))
        if math.prod(sampler.stored) > _MAX_OVERVIEW_PIXELS:
            raise CaseError(
                f"{self.path} has no level smaller than {sampler.stored[0]:,} x {sampler.stored[1]:,} pixels: too many "
                "for an overview. Check its header, or store it as a pyramid."
            )
        return sampler.read(self._blocks, 0, sampler.size[0], 0, sampler.size[1])

    def tissue(self, *, max_size: int = 2048, margin: int = 2, min_pixels: int = 64) -> Tissue:
        """Return the tissue mask at low resolution; see `find_tissue` for the method and its limits."""
        from medseg.io.slides.tissue import Tissue, find_tissue

        small = self.thumbnail(max_size)
        mask = find_tissue(small, margin=margin, min_pixels=min_pixels)
        # The last pixel of a thumbnail may extend beyond the slide, so its scale is not the ratio of the shapes.
        factor = max(1.0, *(side / max_size for side in self.shape[1:]))
        return Tissue(mask, (factor, factor), (self.shape[1], self.shape[2]))


@dataclass(frozen=True)
class _Axis:
    """Resampling weights along one axis.

    Attributes:
        first: Index of the first stored pixel of each pixel.
        weights: Weights `(n, taps)` of that stored pixel and the following ones; float32.
        last: Index of the last stored pixel.
    """

    first: NDArray[np.int64]
    weights: NDArray[np.float32]
    last: int

    @classmethod
    def between(cls, start: int, stop: int, factor: float, stored: int) -> _Axis:
        """Return the weights of pixels `start` to `stop` (exclusive), each `factor` stored pixels wide."""
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
        """Range of stored pixels needed, end exclusive."""
        return int(self.first[0]), min(int(self.first[-1]) + self.weights.shape[1], self.last + 1)

    def apply(self, pixels: NDArray[np.generic]) -> NDArray[np.float32]:
        """Resample the first axis of pixels that start at `window[0]`, in a fixed order of summation."""
        base = self.window[0]
        total: NDArray[np.float32] = np.zeros((len(self.first), *pixels.shape[1:]), np.float32)
        for tap in range(self.weights.shape[1]):
            rows = pixels[np.minimum(self.first + tap, self.last) - base]
            total += rows * self.weights[:, tap].reshape(-1, *[1] * (pixels.ndim - 1))
        return total


@dataclass(frozen=True)
class _Sampler:
    """Resamples the best stored level to one resolution.

    Attributes:
        level: Index of the stored level.
        factors: Stored pixels per pixel along x and y; 1 without resampling.
        size: Size `(width, height)` at this resolution.
        stored: Size `(width, height)` of the stored level.
    """

    level: int
    factors: tuple[float, float]
    size: tuple[int, int]
    stored: tuple[int, int]

    @classmethod
    def fitting(cls, sizes: tuple[tuple[int, int], ...], scale: tuple[float, float]) -> _Sampler:
        """Select the coarsest level that is at least as fine as `scale`."""
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
        # A pixel inside the slide only by rounding does not count.
        width, height = (max(1, math.ceil(n / f - 1e-6)) for n, f in zip(stored, factors, strict=True))
        return cls(level, (factors[0], factors[1]), (width, height), stored)

    def read(self, blocks: _Blocks, x0: int, x1: int, y0: int, y1: int) -> NDArray[np.uint8]:
        """Return `(3, x, y)`, resampled piece by piece so that strong downsampling needs little memory."""
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
        # Rounds half up: NumPy's half to even would make constant regions with .5 patchy.
        mixed = columns.apply(pixels.transpose(1, 0, 2)).transpose(1, 0, 2)
        rounded: NDArray[np.uint8] = np.floor(mixed + np.float32(0.5)).astype(np.uint8)
        return rounded


class _Blocks:
    """Windows of stored levels, from a cache of blocks at fixed positions.

    OpenSlide expects positions in pixels of the finest level, which are not integer pixels of most coarser levels: a
    pixel decoded from two positions would differ.
    """

    def __init__(self, levels: Levels) -> None:
        self._levels = levels
        self._kept: OrderedDict[tuple[int, int, int], NDArray[np.uint8]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def window(self, level: int, x0: int, x1: int, y0: int, y1: int) -> NDArray[np.uint8]:
        """Return the window `(y1 - y0, x1 - x0, 3)` of a level."""
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
        """Empty the cache."""
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
    """Return the width and height of a pixel of `level` in pixels of the finest level.

    Downsampling factors are integers, and the remainder of a division is cropped or padded, so 300 / 37 means 8.
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
    """Return the requested resolution as pixels of the finest level per pixel."""
    if level is not None and level >= len(levels.sizes):
        raise RequestError(f"{file} has no level {level}: expected 0 to {len(levels.sizes) - 1}.")
    if microns is None:
        return _scale(levels.sizes, level or 0)
    if levels.mpp is None and default_mpp is None:
        raise CaseError(
            f"{file} {levels.note}, so it cannot be read at {microns:g} µm/px: give default_mpp, the resolution of its "
            "finest level in µm/px.",
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
    if min(wanted) < 1 / _MAX_UPSAMPLING:
        raise RequestError(
            f"{file} has a resolution of {found[0]:.4g} x {found[1]:.4g} µm/px, too coarse for {microns:g} µm/px: the "
            f"limit of upsampling is {_MAX_UPSAMPLING:g} times."
        )
    return wanted


def _check_resolution(microns: float | None, level: int | None, default_mpp: float | None) -> None:
    if microns is not None and level is not None:
        raise RequestError("Invalid resolution: give microns_per_pixel or level, not both.")
    if level is not None and level < 0:
        raise RequestError(f"Invalid level {level} of a slide: expected 0 (the finest) or more.")
    for name, value in (("microns_per_pixel", microns), ("default_mpp", default_mpp)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RequestError(f"Invalid {name} {value}: expected a positive number of µm/px, such as 0.5.")
