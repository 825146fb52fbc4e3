"""Segmentation networks: MONAI-style `nn.Module` classes with a common interface (`medseg.types.SegmentationNetwork`).

The classes are imported on first use, so that the registry can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medseg.networks.presets import small
from medseg.networks.registry import NETWORKS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NETWORKS", "small", *NETWORKS]


def __getattr__(name: str) -> type[nn.Module] | Any:
    if name not in NETWORKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return NETWORKS[name].load()


def __dir__() -> list[str]:
    return __all__
