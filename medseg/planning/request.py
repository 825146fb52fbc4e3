"""Options of a plan and their parsing. Imports neither torch nor MONAI."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import RequestError
from medseg.networks.registry import NETWORKS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULT_MEMORY", "NETWORK_NAMES", "PlanRequest", "parse_duration", "parse_network", "parse_size"]

# Class in medseg.networks by its name on the command line.
NETWORK_NAMES: Final = {name.lower(): name for name in NETWORKS}
# Free memory of a typical laptop; a constant, so that plans without --memory are the same on every machine.
DEFAULT_MEMORY: Final = 8 << 30

_SELFREG = "+selfreg"
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class PlanRequest:
    """Options of a plan.

    Attributes:
        network: Name of the network's class in `medseg.networks`.
        selfreg: Whether SelfReg regularizes the features.
        dims: Required number of spatial dimensions, 2 or 3; None for that of the images.
        memory: Limit of the device memory for training, in bytes.
        memory_given: Whether the user set that limit.
        budget: Limit of the time for training and validation, in seconds; None for no limit.
        name: Name of the bundle; empty for one made from data set, modality and network.
        settings: Settings that the user fixed; the others are planned around them.
    """

    network: str = next(iter(NETWORKS))
    selfreg: bool = False
    dims: int | None = None
    memory: int = DEFAULT_MEMORY
    memory_given: bool = False
    budget: float | None = None
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def network_name(self) -> str:
        """Name of the network as in the suffix of a bundle's name, such as "unet" or "banet_selfreg"."""
        plain = next(name for name, kind in NETWORK_NAMES.items() if kind == self.network)
        return f"{plain}_selfreg" if self.selfreg else plain


def parse_network(text: str) -> tuple[str, bool]:
    """Return the class of a network and whether to add SelfReg, from a text such as "unet" or "banet+selfreg".

    Raises:
        RequestError: Unknown network; the message names the closest one.
    """
    plain = text.strip().lower().removesuffix(_SELFREG).replace("++", "plusplus")
    if plain not in NETWORK_NAMES:
        close = difflib.get_close_matches(plain, NETWORK_NAMES, n=1, cutoff=0.4)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        known = ", ".join(NETWORK_NAMES)
        raise RequestError(f"Unknown network '{text}'.{hint} Choose one of {known}, optionally with '{_SELFREG}'.")
    return NETWORK_NAMES[plain], text.strip().lower().endswith(_SELFREG)


def parse_size(text: str) -> int:
    """Return an amount of memory such as "8G" or "1500M" in bytes.

    Raises:
        RequestError: Invalid or zero amount.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _SIZES[match[2].upper()]) if match else 0
    if size <= 0:
        raise RequestError(
            f"Invalid amount of memory '{text}': expected a number above 0 with K, M, G or T, such as 8G or 1500M."
        )
    return size


def parse_duration(text: str) -> float:
    """Return a duration such as "30m", "2h", "1h30m" or "90" (seconds) in seconds.

    Raises:
        RequestError: Invalid or zero duration.
    """
    compact = text.strip().lower().replace(" ", "")
    parts = re.findall(r"(\d+(?:\.\d+)?)(min|[smhd]|)", compact)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != compact or seconds <= 0:
        raise RequestError(
            f"Invalid duration '{text}': expected a time above 0 in s, m, h or d, such as 30m, 2h or 1h30m."
        )
    return seconds
