"""Weights of the authors' and other public code, loaded into the networks of this package by name.

Each source is one function that reads widths, depth and dimensions off the tensors and says which of our modules each
of theirs is; everything else (missing, surplus and misshapen tensors) is checked in one place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medseg.errors import RequestError, WeightsError
from medseg.networks.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["SOURCES", "Reference", "from_reference"]

# A list of names in a message is cut here: one wrong prefix makes hundreds of them.
_NAMES_SHOWN = 12


@dataclass(frozen=True)
class Reference:
    """How a foreign state dict is to be read.

    Attributes:
        network: class to build.
        arguments: its arguments, read off the tensors.
        modules: name of our module -> name of theirs; their tensors have the same last names (`weight`, ..).
        tensors: the state dict, changed only where a tensor itself needs rearranging.
    """

    network: Callable[..., nn.Module]
    arguments: dict[str, Any]
    modules: dict[str, str]
    tensors: Mapping[str, Tensor]


def from_reference(source: str, state: Mapping[str, Tensor | NDArray[Any]], **config: Any) -> nn.Module:
    """Build our network for a state dict of public code, with its weights.

    Args:
        source: one of `SOURCES`, e.g. "unet-2015".
        state: names and tensors (or arrays); a "module." in front of every name is ignored.
        **config: arguments of the network that tensors cannot tell, e.g. `upconv_relu=True`.

    Returns:
        The network in eval mode.

    Raises:
        RequestError: the source is not known.
        WeightsError: tensors are missing, surplus or of another shape; lists them.
    """
    if source not in SOURCES:
        raise RequestError(f"Weights of source {source!r} are not known; choose one of {', '.join(SOURCES)}.")
    reference = SOURCES[source](_tensors(state))
    network = reference.network(**{**reference.arguments, **config})
    own = network.state_dict()
    names = _names(own, reference.modules)
    _compare(source, own, names, reference.tensors)
    network.load_state_dict({ours: reference.tensors.get(theirs, own[ours]) for ours, theirs in names.items()})
    return network.eval()


def _tensors(state: Mapping[str, Tensor | NDArray[Any]]) -> dict[str, Tensor]:
    wrapped = bool(state) and all(name.startswith("module.") for name in state)
    return {
        name.removeprefix("module.") if wrapped else name: v.detach() if isinstance(v, Tensor) else torch.tensor(v)
        for name, v in state.items()
    }


def _names(own: Iterable[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Map each of our tensors to the name that it has in the reference."""
    names = {}
    for name in own:
        module, _, leaf = name.rpartition(".")
        names[name] = f"{modules[module]}.{leaf}" if module in modules else name
    return names


def _compare(source: str, own: Mapping[str, Tensor], names: Mapping[str, str], given: Mapping[str, Tensor]) -> None:
    wanted = {theirs: tuple(own[ours].shape) for ours, theirs in names.items()}
    # Counters of batches are often stripped from published files and change no result.
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    surplus = [n for n in given if n not in wanted]
    misshapen = [
        f"{n} {tuple(given[n].shape)} instead of {shape}"
        for n, shape in wanted.items()
        if n in given and tuple(given[n].shape) != shape
    ]
    if missing or surplus or misshapen:
        raise WeightsError(
            f"The weights do not fit source {source!r}. {_listed('Missing', missing)}{_listed('Surplus', surplus)}"
            f"{_listed('Of another shape', misshapen)}Check that the file belongs to this source (known: "
            f"{', '.join(SOURCES)}) and that extra options match the network it was trained with."
        )


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{title} ({len(names)}): {', '.join(names[:_NAMES_SHOWN])}{rest}. "


def _shape(state: Mapping[str, Tensor], source: str, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor from which the network's size is read."""
    if name not in state:
        found = f"It holds {', '.join(list(state)[:_NAMES_SHOWN])}, .." if state else "It is empty"
        raise WeightsError(
            f"The weights do not fit source {source!r}: {name} is missing, which tells the network's size. {found}. "
            f"Check that the file belongs to this source (known: {', '.join(SOURCES)})."
        )
    return tuple(state[name].shape)


def _deepest(state: Iterable[str], pattern: str) -> int:
    """Return the highest number that the group of `pattern` takes among the names; 0 if it takes none."""
    return max((int(found[1]) for name in state if (found := re.fullmatch(pattern, name))), default=0)


def _unet_arguments(state: Mapping[str, Tensor], source: str, encoder: list[str], head: str) -> dict[str, Any]:
    """Read off a U-Net's dimensions and widths from the first convolution of each level and the head."""
    shapes = [_shape(state, source, f"{name}.weight") for name in encoder]
    return {
        "spatial_dims": len(shapes[0]) - 2,
        "in_channels": shapes[0][1],
        "out_channels": _shape(state, source, f"{head}.weight")[0],
        "features": tuple(shape[0] for shape in shapes),
    }


def _unet_blocks(depth: int) -> Iterator[tuple[str, int, bool]]:
    """Yield name, level and "is it in the decoder" of every pair of convolutions of a `UNet` with `depth` poolings."""
    for level in range(depth):
        yield f"encoder.{level}", level, False
    yield "bottleneck", depth, False
    for place in range(depth):
        yield f"decoder.{place}.convs", depth - 1 - place, True


def _unet_port(state: Mapping[str, Tensor]) -> Reference:
    """Read the U-Net of the common PyTorch port of UNet++: batch norm, linear up-sampling, `conv{row}_{column}`."""
    source = "unet-port"
    depth = _deepest(state, r"conv(\d+)_0\.conv1\.weight")
    arguments = _unet_arguments(state, source, [f"conv{i}_0.conv1" for i in range(depth + 1)], "final")
    modules = {"head": "final"}
    for ours, level, up in _unet_blocks(depth):
        for n in (0, 1):
            theirs = f"conv{level}_{depth - level if up else 0}"
            modules[f"{ours}.{n}.conv"] = f"{theirs}.conv{n + 1}"
            modules[f"{ours}.{n}.norm"] = f"{theirs}.bn{n + 1}"
    style = {"norm": "batch", "upsample": "interp", "cat_order": "skip_first"}
    return Reference(UNet, arguments | style, modules, state)


def _unet_2018(state: Mapping[str, Tensor]) -> Reference:
    """Read the U-Net baseline of the UNet++ papers: no norm, up-convolutions, 1-based `conv{row}{column}_{n}`."""
    source = "unet-2018"
    depth = _deepest(state, r"conv(\d+)1_1\.weight") - 1
    arguments = _unet_arguments(state, source, [f"conv{i + 1}1_1" for i in range(max(depth, 0) + 1)], "output")
    modules = {"head": "output"}
    for ours, level, up in _unet_blocks(depth):
        theirs = f"{level + 1}{depth - level + 1 if up else 1}"
        for n in (0, 1):
            modules[f"{ours}.{n}.conv"] = f"conv{theirs}_{n + 1}"
        if up:
            modules[ours.replace("convs", "up.0")] = f"up{theirs}"
    return Reference(UNet, arguments, modules, state)


def _unet_2015(state: Mapping[str, Tensor]) -> Reference:
    """Read the unpadded U-Net of 2015: `down{level}_conv{n}`, `up{level}_deconv`, `up{level}_conv{n}`, `score`."""
    source = "unet-2015"
    depth = _deepest(state, r"down(\d+)_conv1\.weight")
    arguments = _unet_arguments(state, source, [f"down{i}_conv1" for i in range(depth + 1)], "score")
    last = _shape(state, source, "up0_deconv.weight")[1]
    modules = {"head": "score"}
    for ours, level, up in _unet_blocks(depth):
        theirs = f"{'up' if up else 'down'}{level}"
        for n in (0, 1):
            modules[f"{ours}.{n}.conv"] = f"{theirs}_conv{n + 1}"
        if up:
            modules[ours.replace("convs", "up.0")] = f"{theirs}_deconv"
    return Reference(UNet, arguments | {"padding": "valid", "last_upconv_channels": last}, modules, state)


SOURCES: dict[str, Callable[[Mapping[str, Tensor]], Reference]] = {
    "unet-port": _unet_port,
    "unet-2018": _unet_2018,
    "unet-2015": _unet_2015,
}
