"""MONAI's sliding window, which tells how far it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import monai.inferers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["SlidingWindowInferer", "count_windows"]


class SlidingWindowInferer(monai.inferers.SlidingWindowInferer):  # type: ignore[misc]
    """MONAI's `SlidingWindowInferer` with a listener for progress.

    Attributes:
        on_progress: called with (windows done, windows in all) of the current image after each forward pass.
    """

    on_progress: Callable[[int, int], None] | None = None

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return blended logits `(B, C, *spatial)` for an image `(B, in_channels, *spatial)`."""
        predictor = network if self.on_progress is None else self._counted(inputs, network, self.on_progress)
        logits: torch.Tensor = super().__call__(inputs, predictor, *args, **kwargs)
        return logits

    def _counted(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], report: Callable[[int, int], None]
    ) -> Callable[..., torch.Tensor]:
        total = len(inputs) * count_windows(inputs.shape[2:], self.roi_size, self.overlap)
        done = 0

        def counted(windows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal done
            result = network(windows, *args, **kwargs)
            done += len(windows)
            report(done, total)
            return result

        return counted


def count_windows(image_size: Sequence[int], roi_size: Sequence[int] | int, overlap: Sequence[float] | float) -> int:
    """Return the number of windows that MONAI's sliding window cuts from one image.

    Args:
        image_size: spatial size of the image.
        roi_size: size of a window; 0 or less stands for the whole axis.
        overlap: share of a window that its neighbor covers, at least 0 and below 1.
    """
    dims = len(image_size)
    rois = [roi_size] * dims if isinstance(roi_size, int) else roi_size
    overlaps = [overlap] * dims if isinstance(overlap, (int, float)) else overlap
    return math.prod(_along_axis(*axis) for axis in zip(image_size, rois, overlaps, strict=True))


def _along_axis(size: int, roi: int, overlap: float) -> int:
    if roi <= 0 or roi >= size:
        return 1
    step = max(int(roi * (1 - overlap)), 1)
    return math.ceil((size - roi) / step) + 1
