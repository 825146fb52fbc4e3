"""What the networks look like at a width, for a layout: arguments as a `network_def` holds them.

A *width* is the number of channels at full resolution of a plain U-Net; the other networks are scaled to cost about as
much. 16 is the size that two processor cores train, 32 that of the papers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

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
# Wider levels cost most of the memory for weights and gain little.
_WIDEST = {2: 512, 3: 320}
_NORMS: Final[dict[str, Any]] = {"batch": "batch", "instance": ["instance", {"affine": True}]}
_LEAKY = ["leakyrelu", {"negative_slope": 0.01, "inplace": True}]


def max_poolings(network: str, spatial_dims: int) -> int:
    """Return how many poolings a plan gives a network: the papers' depth, and for BA-Net the places that it has."""
    return (3 if spatial_dims == 2 else 2) if network == "BANet" else 4


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
    common = {
        "_target_": f"medseg.components.{network}",
        "spatial_dims": spatial_dims,
        "in_channels": channels,
        "out_channels": classes,
    }
    if network == "BANet":
        own = _banet(width, spatial_dims, layout)
    else:
        own = _levels(network, width, spatial_dims, layout, norm)
    return {**common, **own, "norm": _NORMS[norm]}


def strides_note(network: str) -> str:
    """Return how the network takes strides."""
    if network == "BANet":
        return "the stem, its pooling and the second stage of the ResNet take them"
    return "its poolings take one number per axis"


def _levels(network: str, width: int, spatial_dims: int, layout: Layout, norm: str) -> dict[str, Any]:
    first = width // 2 if network == "UNetPlusPlus" and spatial_dims == 3 else width
    depth = len(layout.strides)
    features = [min(first * 2**level, _WIDEST[spatial_dims]) for level in range(depth + 1)]
    own: dict[str, Any] = {"features": features}
    if any(len(set(stride)) > 1 or stride[0] != 2 for stride in layout.strides):
        own["strides"] = [list(stride) for stride in layout.strides]
    if network == "UCTransNet":
        features[-1] = features[-2]
        own |= {"img_size": list(layout.patch), "patch_size": list(layout.step), "num_heads": 2, "num_layers": 2}
        return own
    if norm == "instance":
        own["act"] = _LEAKY
    own |= {"dropout": 0.0} if network == "UNet" else {"head_activation": "softmax"}
    return own


def _banet(width: int, spatial_dims: int, layout: Layout) -> dict[str, Any]:
    scale = 2 if spatial_dims == 2 else 1
    own: dict[str, Any] = {
        "base_width": max(4, width * scale // 2),
        "reduce_dim": width * scale,
        "aspp_dim": 2 * width * scale,
        # The last batch of an epoch may hold one image, and one voxel has no variance to be divided by.
        "aspp_pool_norm": None,
        "strides": _stages(layout.strides, spatial_dims),
    }
    if width < 32:
        own["blocks"] = [2, 2, 2, 2]
    return own


def _stages(strides: Sequence[Sequence[int]], spatial_dims: int) -> list[Any]:
    """Return stem convolution, pooling and stages 1 to 4: the last pooling goes to stage 2, others to the stem."""
    places: list[Any] = [1] * 6
    order = (3, 1, 0)
    for place, stride in zip(order, reversed(strides), strict=False):
        places[place] = stride[0] if len(set(stride)) == 1 else list(stride)
    return places
