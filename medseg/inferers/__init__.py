"""Inferers: from an image and a network to logits on the model grid."""

from medseg.inferers.sliding_window import SlidingWindowInferer, count_windows

__all__ = ["SlidingWindowInferer", "count_windows"]
