"""Forms of the networks that two processor cores can train."""

from __future__ import annotations

import copy
import difflib
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import RequestError
from medseg.networks.registry import NETWORKS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["small"]

# Batches of volumes are small, so in 3D each image is normalized by itself.
_NORM: Final[Mapping[int, Any]] = {2: "batch", 3: ["instance", {"affine": True}]}


def small(name: str, spatial_dims: int) -> dict[str, Any]:
    """Return the arguments of a network's small form, for the class or for a bundle's `network_def`.

    Widths and depths are ours, not the papers'; everything that is not named keeps the paper's default. Batch norm in
    2D, instance norm in 3D.

    Args:
        name: Class name of one of `medseg.networks.NETWORKS`.
        spatial_dims: 2 or 3.

    Returns:
        Constructor arguments as JSON holds them, without `spatial_dims`, `in_channels` and `out_channels`; free to
        change.

    Raises:
        RequestError: The network is unknown (names the nearest), or `spatial_dims` is neither 2 nor 3.
    """
    if name not in NETWORKS:
        close = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.4)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise RequestError(f"There is no small form of '{name}'.{hint} Choose one of {', '.join(NETWORKS)}.")
    if spatial_dims not in (2, 3):
        raise RequestError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
    return copy.deepcopy({**NETWORKS[name].small[spatial_dims], "norm": _NORM[spatial_dims]})
