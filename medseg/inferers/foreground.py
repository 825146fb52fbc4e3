"""Selection of the windows that contain foreground."""

from __future__ import annotations

import torch

from medseg.inferers.blend import Windows, cut_windows

__all__ = ["windows_with_foreground"]


def windows_with_foreground(
    image: torch.Tensor, windows: Windows, overlap: tuple[float, ...], above: float
) -> list[tuple[int, ...]]:
    """Return the start of each window within the bounding box of the foreground that contains foreground voxels.

    Foreground voxels have at least one channel above a threshold. Their bounding box is enlarged to at least the size
    of a window, and at least one window is returned.

    Args:
        image: Image `(C, *spatial)`.
        windows: All windows of the image.
        overlap: Overlap between adjacent windows as a fraction of the window, per axis.
        above: Foreground threshold.
    """
    found = (image > above).any(0)
    box = [_range(found, axis, windows.roi[axis]) for axis in range(found.ndim)]
    inner = cut_windows([high - low for low, high in box], windows.roi, overlap, axis=windows.axis)
    starts = [tuple(first + low for first, (low, _) in zip(start, box, strict=True)) for start in inner.starts]
    kept = [start for start in starts if _window(found, start, windows.roi).any()]
    return kept or starts[:1]


def _range(found: torch.Tensor, axis: int, roi: int) -> tuple[int, int]:
    """Return the half-open range of the foreground on one axis, enlarged to a window if the image allows it."""
    size = found.shape[axis]
    hits = torch.nonzero(found.movedim(axis, 0).flatten(1).any(1))
    low, high = (int(hits[0]), int(hits[-1]) + 1) if len(hits) else (0, 0)
    missing = max(min(roi, size) - (high - low), 0)
    low = max(min(low - missing // 2, size - max(high - low, min(roi, size))), 0)
    return low, max(high, min(low + roi, size))


def _window(found: torch.Tensor, start: tuple[int, ...], roi: tuple[int, ...]) -> torch.Tensor:
    return found[tuple(slice(first, first + size) for first, size in zip(start, roi, strict=True))]
