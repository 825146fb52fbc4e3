"""Registry of the networks. Imports neither torch nor MONAI."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from medseg.networks.entry import ByDims, NetworkEntry, Planning, Sizing, level_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NETWORKS", "SOURCES", "NetworkEntry"]

_LEAKY: Final = ["leakyrelu", {"negative_slope": 0.01, "inplace": True}]
_LOSS: Final = {"block": "loss"}


def _unet(sizing: Sizing) -> dict[str, Any]:
    return {**level_arguments(sizing), **_activation(sizing), "dropout": 0.0}


def _unetplusplus(sizing: Sizing) -> dict[str, Any]:
    """Halve the width in 3D, where the nodes at full resolution dominate the cost."""
    arguments = level_arguments(sizing)
    if sizing.spatial_dims == 3:
        half = Sizing(sizing.width // 2, 3, sizing.patch, sizing.strides, sizing.norm)
        arguments["features"] = level_arguments(half)["features"]
    return {**arguments, **_activation(sizing), "head_activation": "softmax"}


def _activation(sizing: Sizing) -> dict[str, Any]:
    return {"act": _LEAKY} if sizing.norm == "instance" else {}


def _uctransnet(sizing: Sizing) -> dict[str, Any]:
    arguments = level_arguments(sizing)
    *levels, _ = arguments["features"]
    step = [1] * sizing.spatial_dims
    for stride in sizing.strides:
        step = [total * factor for total, factor in zip(step, stride, strict=True)]
    tables = {"img_size": list(sizing.patch), "patch_size": step, "num_heads": 2, "num_layers": 2}
    return {**arguments, "features": [*levels, levels[-1]], **tables}


def _banet(sizing: Sizing) -> dict[str, Any]:
    scale = 2 if sizing.spatial_dims == 2 else 1
    arguments: dict[str, Any] = {
        "base_width": max(4, sizing.width * scale // 2),
        "reduce_dim": sizing.width * scale,
        "aspp_dim": 2 * sizing.width * scale,
        # Batches of one image have no variance in the pooled branch.
        "aspp_pool_norm": None,
        "strides": _resnet_strides(sizing.strides),
    }
    if sizing.width < 32:
        arguments["blocks"] = [2, 2, 2, 2]
    return arguments


def _resnet_strides(strides: Sequence[Sequence[int]]) -> list[Any]:
    """Return the strides of stem convolution, stem pooling and stages 1 to 4; stage 2 has the last one."""
    places: list[Any] = [1] * 6
    order = (3, 1, 0)
    for place, stride in zip(order, reversed(strides), strict=False):
        places[place] = stride[0] if len(set(stride)) == 1 else list(stride)
    return places


def _in_2d_and_3d(arguments: Mapping[str, Any]) -> ByDims:
    return {2: arguments, 3: arguments}


_ENTRIES: Final = (
    NetworkEntry(
        "UNet",
        "medseg.networks.unet",
        # Three poolings in 3D, so that patches of 16 voxels have more than one voxel to normalize over.
        small={
            2: {"features": [16, 32, 64, 128, 256], "dropout": 0.0},
            3: {"features": [16, 32, 64, 128], "dropout": 0.0},
        },
        tiny=_in_2d_and_3d({"features": (8, 12, 16), "norm": "batch", "dropout": 0.1}),
        planning=Planning(_unet, learning_rate={2: 0.001, 3: 0.002}),
        sources=("unet-port", "unet-2018", "unet-2015"),
    ),
    NetworkEntry(
        "UNetPlusPlus",
        "medseg.networks.unetplusplus",
        small={2: {"features": [16, 32, 64, 128, 256]}, 3: {"features": [8, 16, 32, 64]}},
        tiny=_in_2d_and_3d(
            {
                "features": (6, 8, 12),
                "norm": "batch",
                "dropout": 0.1,
                "upsample": "interp",
                "output_mode": "mean",
                "head_activation": "softmax",
            }
        ),
        planning=Planning(
            _unetplusplus,
            learning_rate={2: 0.001, 3: 0.002},
            training_loss={"_target_": "medseg.components.DeepSupervision", "loss": _LOSS},
            loss_reason="it is computed at each head of the UNet++, as in its paper",
        ),
        sources=("unetpp-port", "unetpp-2018", "unetpp-nnunet"),
        prunable=True,
    ),
    NetworkEntry(
        "UCTransNet",
        "medseg.networks.uctransnet",
        small={
            2: {"features": [16, 32, 64, 128, 128], "num_heads": 2, "num_layers": 2},
            3: {"features": [16, 32, 64, 64], "img_size": 64, "patch_size": 8, "num_heads": 2, "num_layers": 2},
        },
        tiny={
            2: {"features": (8, 12, 16), "img_size": (32, 48), "patch_size": 4, "num_heads": 2, "num_layers": 2},
            3: {
                "features": (8, 12, 16),
                "img_size": (16, 32, 24),
                "patch_size": 4,
                "num_heads": 2,
                "num_layers": 2,
                "embed_dropout": 0.0,
                "attn_dropout": 0.0,
            },
        },
        planning=Planning(_uctransnet),
        sources=("uctransnet", "uctransnet-unet"),
        choices={"backbone": ("paper", "unet")},
    ),
    NetworkEntry(
        "BANet",
        "medseg.networks.banet",
        small={
            2: {"blocks": [2, 2, 2, 2], "base_width": 16, "reduce_dim": 32, "aspp_dim": 64},
            3: {
                "blocks": [2, 2, 2, 2],
                "base_width": 8,
                "strides": [1, 2, 1, 2, 1, 1],
                "reduce_dim": 16,
                "aspp_dim": 32,
            },
        },
        tiny=_in_2d_and_3d(
            {
                "blocks": (1, 1, 1, 1),
                "base_width": 4,
                "strides": (1, 2, 1, 2, 1, 1),
                "reduce_dim": 8,
                "aspp_dim": 8,
                "aspp_rates": (1, 2),
            }
        ),
        planning=Planning(
            _banet,
            poolings={2: 3, 3: 2},
            strides_note="applied by the stem, the max pooling and the second stage of the ResNet",
            training_loss={
                "_target_": "medseg.components.BoundaryMultiTaskLoss",
                "preset": "paper",
                "main_loss": _LOSS,
                "seg_loss": _LOSS,
            },
            loss_reason="it is also computed on the stages' outputs, with binary cross-entropy on their edges",
        ),
        sources=("banet",),
        choices={"backbone": ("resnet50", "resnet101", "resnet152")},
    ),
)
NETWORKS: Final[Mapping[str, NetworkEntry]] = MappingProxyType({entry.name: entry for entry in _ENTRIES})

# Network of each public code whose weights can be converted.
SOURCES: Final[Mapping[str, NetworkEntry]] = MappingProxyType(
    {source: entry for entry in _ENTRIES for source in entry.sources}
)
