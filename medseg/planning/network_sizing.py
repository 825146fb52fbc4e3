"""What the networks look like at a width, for a layout: arguments as a `network_def` holds them.

A *width* is the number of channels at full resolution of a plain U-Net; the other networks are scaled to cost about as
much. 16 is the size that two processor cores train, 32 that of the papers.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from medseg.networks.entry import Sizing
from medseg.networks.registry import NETWORKS

if TYPE_CHECKING:
    from medseg.planning.geometry import Layout

__all__ = ["SIZE_LADDER", "max_poolings", "network_def", "strides_note"]

# (width, voxels of a patch), from the most expensive down: what a plan steps through until memory and time suffice.
# Width is given up before the patch, down to the small forms, because context is what a wider network cannot replace.
# Powers of two only: a step at width 12 takes longer than one at 16, since kernels work on blocks of channels.
SIZE_LADDER: Final[dict[int, tuple[tuple[int, int], ...]]] = {
    3: (
        *((32, 96**3), (32, 96**3 // 2), (32, 96**3 // 4), (16, 96**3 // 2), (16, 96**3 // 4), (16, 48**3)),
        *((8, 48**3), (8, 40**3), (8, 32**3)),
    ),
    2: ((32, 320**2), (16, 320**2), (16, 226**2), (8, 226**2), (8, 160**2), (8, 113**2)),
}
_NORMS: Final[dict[str, Any]] = {"batch": "batch", "instance": ["instance", {"affine": True}]}


def max_poolings(network: str, spatial_dims: int) -> int:
    """Return how many poolings a plan gives a network at most: the depth of its paper."""
    return NETWORKS[network].planning.poolings[spatial_dims]


def network_def(
    network: str, spatial_dims: int, channels: int, classes: int, width: int, layout: Layout, norm: str
) -> Any:
    """Return the `network_def` of a bundle.

    Args:
        network: class in `medseg.networks`.
        spatial_dims: 2 or 3.
        channels: values per voxel of the image.
        classes: channels of the logits.
        width: see above.
        layout: patch and strides.
        norm: "batch" or "instance".
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
    """Return how the network uses its strides."""
    return NETWORKS[network].planning.strides_note
