"""Entries of the network registry. Imports neither torch nor MONAI."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ByDims", "NetworkEntry", "Planning", "Sizing", "level_arguments"]

ByDims: TypeAlias = Mapping[int, Mapping[str, Any]]

# Wider levels dominate the number of weights with little benefit.
_WIDEST: Final = {2: 512, 3: 320}


@dataclass(frozen=True)
class Sizing:
    """Size of a network as chosen by a plan.

    Attributes:
        width: Channels at full resolution of a U-Net of equal cost; 16 can be trained on two CPU cores, 32 is the size
            in the papers.
        spatial_dims: Number of spatial dimensions, 2 or 3.
        patch: Spatial size of a training patch in voxels, a multiple of the total stride.
        strides: Stride of each pooling per axis, finest first.
        norm: Normalization, "batch" or "instance".
    """

    width: int
    spatial_dims: int
    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    norm: str


def level_arguments(sizing: Sizing) -> dict[str, Any]:
    """Return `features`, doubled at each level up to a maximum, and the `strides` unless all are 2."""
    widest = _WIDEST[sizing.spatial_dims]
    found: dict[str, Any] = {
        "features": [min(sizing.width * 2**level, widest) for level in range(len(sizing.strides) + 1)]
    }
    if any(len(set(stride)) > 1 or stride[0] != 2 for stride in sizing.strides):
        found["strides"] = [list(stride) for stride in sizing.strides]
    return found


@dataclass(frozen=True)
class Planning:
    """Sizing and training of a network in a plan.

    Attributes:
        arguments: Function from a sizing to the constructor arguments, without dimensions, channels and norm.
        poolings: Maximum number of poolings in 2D and 3D, the depth in the paper.
        strides_note: Description of the network's strides in the reasons of the plan.
        learning_rate: Learning rate of AdamW in 2D and 3D.
        training_loss: Config of the loss for networks with additional outputs; `{"block": "loss"}` is replaced by the
            loss of the plan. Empty for a loss of the logits only.
        loss_reason: Description of that loss in the reasons of the plan.
    """

    arguments: Callable[[Sizing], dict[str, Any]] = level_arguments
    poolings: Mapping[int, int] = field(default_factory=lambda: {2: 4, 3: 4})
    strides_note: str = "each pooling has one stride per axis"
    learning_rate: Mapping[int, float] = field(default_factory=lambda: {2: 0.001, 3: 0.001})
    training_loss: Mapping[str, Any] = field(default_factory=dict)
    loss_reason: str = ""


@dataclass(frozen=True)
class NetworkEntry:
    """Registry entry of a network, readable without importing its module.

    Attributes:
        name: Class name, as in configs and in the paper.
        module: Module that defines the class.
        small: Constructor arguments of the small configuration in 2D and 3D, trainable on two CPU cores, without
            dimensions, channels and norm. Widths and depths differ from the paper; other arguments keep its defaults.
        tiny: Constructor arguments of the configuration that shared tests build, train and export in seconds.
        planning: Sizing and training in `medseg plan`.
        sources: Public code whose weights can be converted, the values of `medseg convert --from`. The key maps are in
            `SOURCES` of the module of the same name in `medseg.networks.convert`.
        choices: Arguments restricted to the given values in a bundle that is not trusted.
        prunable: Whether the network can be pruned to heads of several depths (`medseg.types.PrunableNetwork`).
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
        """Value of `_target_` in configs."""
        return f"medseg.components.{self.name}"

    def load(self) -> type[nn.Module]:
        """Import and return the class."""
        found: Any = getattr(importlib.import_module(self.module), self.name)
        network: type[nn.Module] = found
        return network
