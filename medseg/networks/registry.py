"""The networks there are: one entry each. No import of torch or MONAI."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NETWORKS", "NetworkEntry"]


@dataclass(frozen=True)
class NetworkEntry:
    """What is known of a network without importing it.

    Attributes:
        name: Class name, as configs and papers spell it.
        module: Module that defines the class.
    """

    name: str
    module: str

    def load(self) -> type[nn.Module]:
        """Import and return the class."""
        found: Any = getattr(importlib.import_module(self.module), self.name)
        network: type[nn.Module] = found
        return network


_ENTRIES: Final = (
    NetworkEntry("UNet", "medseg.networks.unet"),
    NetworkEntry("UNetPlusPlus", "medseg.networks.unetplusplus"),
    NetworkEntry("UCTransNet", "medseg.networks.uctransnet"),
    NetworkEntry("BANet", "medseg.networks.banet"),
)
NETWORKS: Final[Mapping[str, NetworkEntry]] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
