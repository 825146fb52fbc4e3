"""The `network_def` of a network for a given width, patch size and strides.

The *width* is the number of channels of a plain U-Net at full resolution; other networks are scaled to a similar cost.
Width 16 is small enough to train on two CPU cores, and 32 is the width in the papers.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from medseg.networks.entry import Sizing
from medseg.networks.registry import NETWORKS

if TYPE_CHECKING:
    from medseg.planning.geometry import Layout

__all__ = ["SIZE_LADDER", "max_poolings", "network_def", "strides_note"]

# (width, voxels of a patch) from the largest down, which a plan tries in this order until memory and time suffice.
# Width is reduced before the patch, except for the smallest sizes, because a wider network cannot make up for context.
# Powers of two only: kernels work on blocks of channels, so a step at width 12 takes longer than one at 16.
SIZE_LADDER: Final[dict[int, tuple[tuple[int, int], ...]]] = {
    3: (
        *((32, 96**3), (32, 96**3 // 2), (32, 96**3 // 4), (16, 96**3 // 2), (16, 96**3 // 4), (16, 48**3)),
        *((8, 48**3), (8, 40**3), (8, 32**3)),
    ),
    2: ((32, 320**2), (16, 320**2), (16, 226**2), (8, 226**2), (8, 160**2), (8, 113**2)),
}
_NORMS: Final[dict[str, Any]] = {"batch": "batch", "instance": ["instance", {"affine": True}]}


def max_poolings(network: str, spatial_dims: int) -> int:
    """Return the maximum number of poolings of a network in a plan: the depth in its paper."""
    return NETWORKS[network].planning.poolings[spatial_dims]


def network_def(
    network: str, spatial_dims: int, channels: int, classes: int, width: int, layout: Layout, norm: str
) -> Any:
    """Return the `network_def` of a bundle.

    Args:
        network: Name of the class in `medseg.networks`.
        spatial_dims: Number of spatial dimensions, 2 or 3.
        channels: Number of input channels.
        classes: Number of output channels, with the background.
        width: Number of channels of a plain U-Net at full resolution, as above.
        layout: Patch size and strides.
        norm: Normalization layers, "batch" or "instance".
    """
    entry = NETWORKS[network]
    common = {
        "_target_": entry.target,
        "spatial_dims": spatial_dims,
        "in_channels": channels,
        "out_channels": classes,
    }
    own = entry.planning.arguments(Sizing(width, spatial_dims, layout.patch, layout.strides, norm))
    return copy.deepcopy({**common, **own, "norm": _NORMS[norm]})


def strides_note(network: str) -> str:
    """Return how the network applies its strides, for the reason of the choice."""
    return NETWORKS[network].planning.strides_note
