"""Inferers: from an image and a network to logits on the model grid."""

from medseg.inferers.allocator import reuse_memory
from medseg.inferers.backends import accelerate
from medseg.inferers.ensemble import Ensemble, MirrorTTA
from medseg.inferers.native import NativeInferer
from medseg.inferers.overlap_tile import OverlapTileInferer
from medseg.inferers.rotations import RotationTTAInferer
from medseg.inferers.sliding_window import SlidingWindowInferer
from medseg.inferers.windows import count_windows

__all__ = [
    "Ensemble",
    "MirrorTTA",
    "NativeInferer",
    "OverlapTileInferer",
    "RotationTTAInferer",
    "SlidingWindowInferer",
    "accelerate",
    "count_windows",
    "reuse_memory",
]
