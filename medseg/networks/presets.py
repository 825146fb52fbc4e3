"""Small configurations of the networks, trainable on two CPU cores."""

from __future__ import annotations

import copy
import difflib
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import RequestError
from medseg.networks.registry import NETWORKS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["small"]

# Batches of volumes are small, so instance norm is used in 3D.
_NORM: Final[Mapping[int, Any]] = {2: "batch", 3: ["instance", {"affine": True}]}


def small(name: str, spatial_dims: int) -> dict[str, Any]:
    """Return the arguments of the small configuration of a network, for its class or the `network_def` of a bundle.

    Widths and depths differ from the papers; other arguments keep the defaults of the paper. The configuration uses
    batch norm in 2D and instance norm in 3D.

    Args:
        name: Class name of one of `medseg.networks.NETWORKS`.
        spatial_dims: Number of spatial dimensions, 2 or 3.

    Returns:
        JSON-compatible constructor arguments without `spatial_dims`, `in_channels` and `out_channels`, as a new
        dictionary.

    Raises:
        RequestError: Unknown network (the message suggests the closest name), or invalid `spatial_dims`.
    """
    if name not in NETWORKS:
        close = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.4)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise RequestError(f"Unknown network '{name}'.{hint} Choose one of {', '.join(NETWORKS)}.")
    if spatial_dims not in (2, 3):
        raise RequestError(f"invalid spatial_dims={spatial_dims!r}; expected 2 or 3.")
    return copy.deepcopy({**NETWORKS[name].small[spatial_dims], "norm": _NORM[spatial_dims]})
