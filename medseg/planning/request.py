"""What a user asks of a plan, read off the command line. No import of torch or MONAI."""

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

# As typed -> class in medseg.networks.
NETWORK_NAMES: Final = {name.lower(): name for name in NETWORKS}
# What a laptop can spare; a plan that nobody gave a limit is the same everywhere.
DEFAULT_MEMORY: Final = 8 << 30

_SELFREG = "+selfreg"
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is to be made for.

    Attributes:
        network: class in `medseg.networks`.
        selfreg: whether SelfReg regularizes the features.
        dims: 2 or 3 where the user insists; None takes what the images are.
        memory: bytes that training may take on the device it runs on.
        memory_given: whether the user set that limit.
        budget: seconds that training with its validations may take; None for no limit.
        name: of the bundle; empty for one made of data set, modality and network.
        settings: knobs that the user sets; these are not planned.
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
        """The network as it is typed and as a bundle's name ends."""
        plain = next(name for name, kind in NETWORK_NAMES.items() if kind == self.network)
        return f"{plain}_selfreg" if self.selfreg else plain


def parse_network(text: str) -> tuple[str, bool]:
    """Return the class of a network, and whether SelfReg was asked for, from such as "unet" or "banet+selfreg".

    Raises:
        RequestError: there is no such network; names the nearest.
    """
    plain = text.strip().lower().removesuffix(_SELFREG).replace("++", "plusplus")
    if plain not in NETWORK_NAMES:
        close = difflib.get_close_matches(plain, NETWORK_NAMES, n=1, cutoff=0.4)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        known = ", ".join(NETWORK_NAMES)
        raise RequestError(f"There is no network '{text}'.{hint} Known are {known}, each also with '{_SELFREG}'.")
    return NETWORK_NAMES[plain], text.strip().lower().endswith(_SELFREG)


def parse_size(text: str) -> int:
    """Return the bytes of a text such as "8G" or "1500M".

    Raises:
        RequestError: it is no amount of memory above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _SIZES[match[2].upper()]) if match else 0
    if size <= 0:
        raise RequestError(f"'{text}' is no amount of memory: write for instance 8G or 1500M.")
    return size


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as "30m", "2h", "1h30m" or "90" (seconds).

    Raises:
        RequestError: it is no time above 0.
    """
    compact = text.strip().lower().replace(" ", "")
    parts = re.findall(r"(\d+(?:\.\d+)?)(min|[smhd]|)", compact)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != compact or seconds <= 0:
        raise RequestError(f"'{text}' is no time: write for instance 30m, 2h or 1h30m.")
    return seconds
