"""Tissue detection on a thumbnail of a slide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from medseg.errors import RequestError

__all__ = ["Tissue", "find_tissue"]

# Glass is bright and nearly gray, even with a yellowish lamp or dust.
_GLASS_BRIGHT: Final = 180
_GLASS_CHROMA: Final = 40
# Below this nothing was scanned: black borders and gaps between fields of view.
_BLACK: Final = 24
# Bounds of Otsu's threshold: the noise of glass is below, any useful stain above.
_THRESHOLDS: Final = (10.0, 40.0)
_MIN_GLASS: Final = 1e-3


@dataclass(frozen=True)
class Tissue:
    """A mask of tissue at low resolution.

    Attributes:
        mask: Binary mask `(x, y)`, True on tissue.
        scale: Pixels of the slide, at its selected resolution, per pixel of the mask along x and y.
        size: Size `(x, y)` of the slide at its selected resolution.
    """

    mask: NDArray[np.bool_]
    scale: tuple[float, float]
    size: tuple[int, int]

    def touches(self, x0: int, x1: int, y0: int, y1: int) -> bool:
        """Return whether a window of the slide contains tissue."""
        last = self.mask.shape[0] - 1, self.mask.shape[1] - 1
        left, top = (min(int(start / f), end) for start, f, end in zip((x0, y0), self.scale, last, strict=True))
        right, bottom = (math.ceil(stop / factor) for stop, factor in zip((x1, y1), self.scale, strict=True))
        return bool(self.mask[left:right, top:bottom].any())

    @property
    def fraction(self) -> float:
        """Fraction of the slide that is tissue, 0 to 1."""
        return float(self.mask.mean())


def find_tissue(thumbnail: NDArray[np.uint8], *, margin: int = 2, min_pixels: int = 64) -> NDArray[np.bool_]:
    """Return the tissue mask of a thumbnail.

    The color of the glass is the median of bright, nearly gray pixels; tissue differs from it in some channel by more
    than Otsu's threshold, clipped to 10 to 40 of 255. Black is never tissue. Gaps of up to two pixels are closed,
    components smaller than `min_pixels` removed, and the rest is dilated by `margin`, since missing tissue is worse
    than processing glass.

    Limits: large pen marks, dark dust, air bubbles and cover slip edges count as tissue; fat and pale mucus as bright
    as the glass do not. An image with hardly any glass is all tissue. Fluorescence (bright on black) is not supported.

    Args:
        thumbnail: RGB image `(3, x, y)`.
        margin: Dilation in pixels.
        min_pixels: Minimum size of a component in pixels.

    Returns:
        Binary mask `(x, y)`, True on tissue.

    Raises:
        RequestError: `margin` or `min_pixels` is negative.
    """
    if margin < 0 or min_pixels < 0:
        raise RequestError(f"Invalid margin {margin} or min_pixels {min_pixels}: expected 0 or more.")
    lit = thumbnail.max(axis=0) > _BLACK
    mask = lit & _differs_from_glass(thumbnail, lit)
    found: NDArray[np.bool_] = _cleaned(mask, margin, min_pixels) & lit
    return found


def _differs_from_glass(thumbnail: NDArray[np.uint8], lit: NDArray[np.bool_]) -> NDArray[np.bool_]:
    low, high = thumbnail.min(axis=0), thumbnail.max(axis=0)
    glass = (low >= _GLASS_BRIGHT) & (high - low <= _GLASS_CHROMA)
    if glass.sum() < max(1.0, _MIN_GLASS * lit.sum()):
        return np.ones(lit.shape, dtype=np.bool_)
    color = np.median(thumbnail[:, glass], axis=1).astype(np.int16)
    distance = np.abs(thumbnail - color[:, None, None]).max(axis=0)
    threshold = float(np.clip(_otsu(distance[lit]), *_THRESHOLDS))
    different: NDArray[np.bool_] = distance > threshold
    return different


def _otsu(values: NDArray[np.int16]) -> float:
    """Return the threshold with the largest variance between both classes (Otsu 1979)."""
    counts = np.bincount(values, minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * np.arange(len(counts)))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(np.argmax(np.nan_to_num(between)))


def _cleaned(mask: NDArray[np.bool_], margin: int, min_pixels: int) -> NDArray[np.bool_]:
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image = sitk.BinaryMorphologicalClosing(image, (1, 1))
    objects = sitk.RelabelComponent(sitk.ConnectedComponent(image, True), min_pixels)
    kept = sitk.Cast(objects > 0, sitk.sitkUInt8)
    if margin:
        kept = sitk.BinaryDilate(kept, (margin, margin))
    found: NDArray[np.bool_] = sitk.GetArrayFromImage(kept).astype(np.bool_)
    return found
