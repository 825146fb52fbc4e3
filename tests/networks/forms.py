"""Forms of the networks that are small enough to be tested in seconds: those of the registry's entries."""

from __future__ import annotations

from typing import Any

from medseg.networks import NETWORKS

# Input sizes of the tests, for 2D and 3D.
SIZES = {2: (32, 48), 3: (16, 32, 24)}


def tiny_options(name: str, dims: int, **changes: Any) -> dict[str, Any]:
    """Return the arguments of that form, without `spatial_dims`, `in_channels` and `out_channels`."""
    return {**NETWORKS[name].tiny[dims], **changes}
