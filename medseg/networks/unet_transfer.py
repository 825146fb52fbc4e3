"""Initialization of UCTransNet from a trained U-Net, the pre-training of its paper (arXiv 2109.04335)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from medseg.errors import WeightsError
from medseg.networks.options import check_choice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


__all__ = ["LeveledNetwork", "Transfer", "transfer_unet"]


@dataclass(frozen=True)
class Transfer:
    """Report of `transfer_unet`; `str()` returns a summary.

    Attributes:
        copied: Tensors of the network copied from the U-Net.
        swapped: Copied tensors whose two halves of input channels were swapped.
        left_out: Tensors of the U-Net that the network does not have.
        fresh: Tensors of the network that the U-Net does not have, which keep their values.
    """

    copied: tuple[str, ...]
    swapped: tuple[str, ...]
    left_out: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.copied)} of {len(self.copied) + len(self.left_out)} tensors copied from the U-Net, "
            f"{len(self.swapped)} of them with swapped halves of their input channels; "
            f"skipped: {_shortly(self.left_out)}; new in this network: {_shortly(self.fresh)}"
        )


class LeveledNetwork(Protocol):
    """A network whose encoder levels match those of a U-Net, such as `UCTransNet`."""

    features: Any
    strides: Any

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters and buffers by name."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Load parameters and buffers by name."""


def transfer_unet(network: LeveledNetwork, state: Mapping[str, Tensor], *, cat_order: str | None = None) -> Transfer:
    """Initialize a `UCTransNet` from a trained U-Net, the pre-training of the paper; all weights stay trainable.

    The U-Net is a `medseg.components.UNet` (for a network with `backbone="unet"`, the same `features` and `strides`,
    and `upsample="deconv"` if it has transposed convolutions), or a `UCTransNet` without CCT and CCA, as converted from
    the authors' U-Net by `medseg.networks.convert`. `UCTransNet` concatenates [skip, up], `UNet` by default [up, skip].
    Both halves have the same width in the paper, so a plain copy would swap them silently; here the kernels are
    reordered.

    Args:
        network: Network to initialize, modified in place.
        state: State dict of the U-Net.
        cat_order: Order of concatenation in the U-Net, "up_first" or "skip_first"; by default "up_first" for `UNet` and
            "skip_first" for `UCTransNet`.

    Returns:
        Report of the copied, swapped, skipped and new tensors.

    Raises:
        WeightsError: No matching tensors, or a shape mismatch; the network is unchanged.
    """
    bottom = f"encoder.{len(network.strides)}."
    is_unet = any(name.startswith("bottleneck.") for name in state)
    order = cat_order or ("up_first" if is_unet else "skip_first")
    check_choice("cat_order", order, ("up_first", "skip_first"))
    places = {name.replace("bottleneck.", bottom, 1) if is_unet else name: name for name in state}
    own = network.state_dict()
    copied = [name for name in own if name in places]
    _check_fit(own, {name: state[places[name]] for name in copied})
    swapped = []
    for name in copied:
        own[name] = state[places[name]].detach()
        if order == "up_first" and name.endswith(".convs.0.conv.weight"):
            skip = network.features[-2 - int(name.split(".")[1])]
            own[name] = torch.cat([own[name][:, -skip:], own[name][:, :-skip]], dim=1)
            swapped.append(name)
    network.load_state_dict(own)
    return Transfer(
        copied=tuple(copied),
        swapped=tuple(swapped),
        left_out=tuple(theirs for name, theirs in places.items() if name not in own),
        fresh=tuple(name for name in own if name not in places),
    )


def _check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    unlike = [
        f"{name} is {tuple(tensor.shape)} in the U-Net and {tuple(own[name].shape)} here"
        for name, tensor in given.items()
        if tensor.shape != own[name].shape
    ]
    if given and not unlike:
        return
    found = f"shape mismatch of {len(unlike)} tensors ({'; '.join(unlike[:3])})" if unlike else "no matching tensors"
    raise WeightsError(
        f"The weights of the U-Net do not match the UCTransNet: {found}. Use the features and strides of the U-Net; "
        'for a medseg.networks.UNet also backbone="unet", and upsample="deconv" if it has transposed convolutions; for '
        "another U-Net, use a UCTransNet with use_cct=False and use_cca=False. Convert weights of the authors' code "
        "with medseg.networks.convert, source uctransnet-unet."
    )


def _shortly(names: Sequence[str]) -> str:
    """Return the number of tensors and the modules they belong to."""
    parts = dict.fromkeys("cct" if name.startswith("cct.") else ".".join(name.split(".")[:3]) for name in names)
    return f"{len(names)} ({', '.join(parts)})" if names else "none"
