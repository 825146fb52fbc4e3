"""Starting a UCTransNet from a trained U-Net, the pre-training of its paper (arXiv 2109.04335)."""

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
    """What `transfer_unet` did; as text, a summary for people.

    Attributes:
        copied: tensors of the network taken over from the U-Net.
        swapped: those of them whose two halves of input channels changed places.
        left_out: tensors of the U-Net that have no place in the network.
        fresh: tensors of the network that the U-Net does not have; they keep the values they had.
    """

    copied: tuple[str, ...]
    swapped: tuple[str, ...]
    left_out: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.copied)} of {len(self.copied) + len(self.left_out)} tensors taken over from the U-Net, "
            f"{len(self.swapped)} of them with the halves of their input channels exchanged; "
            f"left out: {_shortly(self.left_out)}; new in this network: {_shortly(self.fresh)}"
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
    """Start a `UCTransNet` from a trained U-Net, the paper's pre-training; everything stays trainable.

    The U-Net is a `medseg.components.UNet` (for a network built with `backbone="unet"`, its `features`, `strides` and,
    where it has up-convolutions, `upsample="deconv"`), or a `UCTransNet` without CCT and CCA, as made from the
    authors' U-Net by `medseg.networks.convert`. This network joins [skip, enlarged], a `UNet` by default
    [enlarged, skip]: both halves are equally wide in the paper's widths, so that a plain copy would go unnoticed and
    exchange them. Here the kernels are brought in order.

    Args:
        network: changed in place.
        state: state dict of the U-Net.
        cat_order: how the U-Net joins, "up_first" or "skip_first"; by default "up_first" for a `UNet` (its default) and
            "skip_first" for a `UCTransNet`.

    Returns:
        Which tensors were taken over, exchanged, left out, and which are new.

    Raises:
        WeightsError: nothing fits, or a tensor of the same name has another shape; the network is unchanged.
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
    found = f"{len(unlike)} tensors have another shape ({'; '.join(unlike[:3])})" if unlike else "no tensor has a place"
    raise WeightsError(
        f"This U-Net does not fit into the UCTransNet: {found}. Use the features and strides of the U-Net; for a "
        'medseg.networks.UNet also backbone="unet", and upsample="deconv" where it has up-convolutions; for another '
        "U-Net, a UCTransNet with use_cct=False and use_cca=False has the matching form. Weights of the authors' code "
        "come into that form by medseg.networks.convert, source uctransnet-unet."
    )


def _shortly(names: Sequence[str]) -> str:
    """Name the parts of the network that tensors belong to: the CCT, or one of a level's parts."""
    parts = dict.fromkeys("cct" if name.startswith("cct.") else ".".join(name.split(".")[:3]) for name in names)
    return f"{len(names)} ({', '.join(parts)})" if names else "none"
