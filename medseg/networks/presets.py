"""Forms of the networks that two processor cores can train."""

from __future__ import annotations

import copy
import difflib
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["small"]

# Batches of volumes are small, so in 3D each image is normalized by itself. Three poolings there, so that crops of 16
# voxels still leave more than one to normalize over.
_NORM: Final[Mapping[int, Any]] = {2: "batch", 3: ["instance", {"affine": True}]}
_SMALL: Final[Mapping[str, Mapping[int, Mapping[str, Any]]]] = {
    "UNet": {
        2: {"features": [16, 32, 64, 128, 256], "dropout": 0.0},
        3: {"features": [16, 32, 64, 128], "dropout": 0.0},
    },
    "UNetPlusPlus": {
        2: {"features": [16, 32, 64, 128, 256]},
        3: {"features": [8, 16, 32, 64]},
    },
    "UCTransNet": {
        2: {"features": [16, 32, 64, 128, 128], "num_heads": 2, "num_layers": 2},
        3: {"features": [16, 32, 64, 64], "img_size": 64, "patch_size": 8, "num_heads": 2, "num_layers": 2},
    },
    "BANet": {
        2: {"blocks": [2, 2, 2, 2], "base_width": 16, "reduce_dim": 32, "aspp_dim": 64},
        3: {
            "blocks": [2, 2, 2, 2],
            "base_width": 8,
            "strides": [1, 2, 1, 2, 1, 1],
            "reduce_dim": 16,
            "aspp_dim": 32,
        },
    },
}


def small(name: str, spatial_dims: int) -> dict[str, Any]:
    """Return the arguments of a network's small form, for the class or for a bundle's `network_def`.

    Widths and depths are ours, not the papers'; everything that is not named keeps the paper's default. Batch norm in
    2D, instance norm in 3D.

    Args:
        name: class name of one of `medseg.networks.NETWORKS`.
        spatial_dims: 2 or 3.

    Returns:
        Constructor arguments as JSON holds them, without `spatial_dims`, `in_channels` and `out_channels`; free to
        change.

    Raises:
        RequestError: an unknown network (names the nearest), or neither 2D nor 3D.
    """
    if name not in _SMALL:
        close = difflib.get_close_matches(name, _SMALL, n=1, cutoff=0.4)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise RequestError(f"There is no small form of '{name}'.{hint} Choose one of {', '.join(_SMALL)}.")
    if spatial_dims not in (2, 3):
        raise RequestError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
    return copy.deepcopy({**_SMALL[name][spatial_dims], "norm": _NORM[spatial_dims]})
