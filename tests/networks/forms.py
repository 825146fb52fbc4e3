"""Forms of the networks that are small enough to be tested in seconds; every network has its entry in `SMALL`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Small:
    """A network small enough to be tested in seconds.

    `sizes` are input sizes for 2D and 3D; exported graphs are dynamic in multiples of `multiple` voxels.
    """

    options: dict[str, Any]
    options_3d: dict[str, Any] = field(default_factory=dict)
    sizes: dict[int, tuple[int, ...]] = field(default_factory=lambda: {2: (32, 48), 3: (16, 32, 24)})
    multiple: int = 1


SMALL = {
    "UNet": Small({"features": (8, 12, 16), "norm": "batch", "dropout": 0.1}),
    "UNetPlusPlus": Small(
        {
            "features": (6, 8, 12),
            "norm": "batch",
            "dropout": 0.1,
            "upsample": "interp",
            "output_mode": "mean",
            "head_activation": "softmax",
        }
    ),
    "BANet": Small(
        {
            "blocks": (1, 1, 1, 1),
            "base_width": 4,
            "strides": (1, 2, 1, 2, 1, 1),
            "reduce_dim": 8,
            "aspp_dim": 8,
            "aspp_rates": (1, 2),
        },
    ),
    "UCTransNet": Small(
        {"features": (8, 12, 16), "img_size": (32, 48), "patch_size": 4, "num_heads": 2, "num_layers": 2},
        {"img_size": (16, 32, 24), "embed_dropout": 0.0, "attn_dropout": 0.0},
    ),
}


def tiny_options(name: str, dims: int, **changes: Any) -> dict[str, Any]:
    """Return the arguments of that form, without `spatial_dims`, `in_channels` and `out_channels`."""
    return {**SMALL[name].options, **(SMALL[name].options_3d if dims == 3 else {}), **changes}
