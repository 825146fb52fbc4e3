"""What one entry of the registry holds. No import of torch or MONAI."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ByDims", "NetworkEntry", "Planning", "Sizing", "level_arguments"]

ByDims: TypeAlias = Mapping[int, Mapping[str, Any]]

# Wider levels cost most of the memory for weights and gain little.
_WIDEST: Final = {2: 512, 3: 320}


@dataclass(frozen=True)
class Sizing:
    """What a plan has decided about a network.

    Attributes:
        width: Channels at full resolution of a plain U-Net of the same cost: 16 trains on two processor cores, 32 is
            the papers' size.
        spatial_dims: 2 or 3.
        patch: Voxels of a training patch along each axis, a multiple of the total stride.
        strides: One entry per pooling, finest first, each a number per axis.
        norm: "batch" or "instance".
    """

    width: int
    spatial_dims: int
    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    norm: str


def level_arguments(sizing: Sizing) -> dict[str, Any]:
    """Return `features`, doubled from level to level, and where they are not all 2 the `strides`."""
    widest = _WIDEST[sizing.spatial_dims]
    found: dict[str, Any] = {
        "features": [min(sizing.width * 2**level, widest) for level in range(len(sizing.strides) + 1)]
    }
    if any(len(set(stride)) > 1 or stride[0] != 2 for stride in sizing.strides):
        found["strides"] = [list(stride) for stride in sizing.strides]
    return found


@dataclass(frozen=True)
class Planning:
    """How a plan sizes and trains a network.

    Attributes:
        arguments: Returns the constructor's arguments for a sizing, without dimensions, channels and norm.
        poolings: Most poolings a plan uses, in 2D and 3D: the paper's depth.
        strides_note: How the network uses its strides, for the plan's reasons.
        learning_rate: Learning rate of AdamW, in 2D and 3D.
        training_loss: Config of the loss for networks with outputs besides the logits; `{"block": "loss"}` stands for
            the loss that the plan chose. Empty for a loss of the logits alone.
        loss_reason: What that loss adds, for the plan's reasons.
    """

    arguments: Callable[[Sizing], dict[str, Any]] = level_arguments
    poolings: Mapping[int, int] = field(default_factory=lambda: {2: 4, 3: 4})
    strides_note: str = "each pooling has one stride per axis"
    learning_rate: Mapping[int, float] = field(default_factory=lambda: {2: 0.001, 3: 0.001})
    training_loss: Mapping[str, Any] = field(default_factory=dict)
    loss_reason: str = ""


@dataclass(frozen=True)
class NetworkEntry:
    """What medseg knows about a network without importing it.

    Attributes:
        name: Class name, as configs and papers spell it.
        module: Module that defines the class.
        small: Arguments of the form that two processor cores can train, in 2D and 3D, without dimensions, channels and
            norm. Widths and depths are ours; what is not named keeps the paper's default.
        tiny: The same for the form that the shared tests build, train and export in seconds.
        planning: How `medseg plan` sizes and trains it.
        sources: Public code whose weights can be converted, as `medseg convert --from` names it. The key maps are in
            `SOURCES` of the module of the same name in `medseg.networks.convert`.
        choices: Arguments that must not be free text in a bundle that runs without trust, with their allowed values.
        prunable: Whether the network can be cut at heads of several depths (`medseg.types.PrunableNetwork`).
    """

    name: str
    module: str
    small: ByDims
    tiny: ByDims
    planning: Planning = field(default_factory=Planning)
    sources: Sequence[str] = ()
    choices: Mapping[str, tuple[bool | str | None, ...]] = field(default_factory=dict)
    prunable: bool = False

    @property
    def converter(self) -> str:
        """Module with the key maps of `sources`."""
        return f"medseg.networks.convert.{self.module.rpartition('.')[2]}"

    @property
    def target(self) -> str:
        """The class as configs name it."""
        return f"medseg.components.{self.name}"

    def load(self) -> type[nn.Module]:
        """Import and return the class."""
        found: Any = getattr(importlib.import_module(self.module), self.name)
        network: type[nn.Module] = found
        return network
