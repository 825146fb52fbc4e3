"""Weights of the authors' and other public code, loaded into the networks of this package by name.

Each source is one function that reads widths, depth and dimensions off the tensors and maps each of their modules to
one of ours (`Reference`); everything else (missing, surplus and misshapen tensors) is checked here. The sources of a
network are named in its registry entry; their functions are in the file of the network's name.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medseg.errors import MedsegError, RequestError, WeightsError
from medseg.networks.convert.reading import NAMES_SHOWN, Reference
from medseg.networks.registry import SOURCES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from numpy.typing import NDArray

__all__ = ["SOURCES", "Converted", "Reference", "from_reference", "read_reference"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """A network with the weights of public code.

    Attributes:
        network: ours, in eval mode.
        arguments: what its class was called with, read off the tensors and given by the caller.
        left_out: names of tensors that the reference holds but never uses.
    """

    network: nn.Module
    arguments: dict[str, Any]
    left_out: tuple[str, ...]


def from_reference(source: str, state: Mapping[str, Tensor | NDArray[Any]], **config: Any) -> nn.Module:
    """Build our network for a state dict of public code, with its weights.

    Args:
        source: one of `SOURCES`, e.g. "unet-2015".
        state: names and tensors (or arrays); a "module." in front of every name is ignored.
        **config: arguments of the network that tensors cannot tell, e.g. `upconv_relu=True`.

    Returns:
        The network in eval mode.

    Raises:
        RequestError: the source is not known, or its network cannot be built with `config`.
        WeightsError: tensors are missing, surplus or of another shape; lists them.
    """
    return read_reference(source, state, **config).network


def read_reference(source: str, state: Mapping[str, Tensor | NDArray[Any]], **config: Any) -> Converted:
    """Do what `from_reference` does, and tell how the network can be built again; same arguments and errors."""
    if source not in SOURCES:
        raise RequestError(f"Weights of source {source!r} are not known; choose one of {', '.join(SOURCES)}.")
    reference = _read(source, state)
    arguments = {**reference.arguments, **config}
    network = _built(source, reference, arguments)
    own = network.state_dict()
    names = _names(own, reference.modules)
    _compare(source, own, names, reference.tensors, reference.dead)
    if reference.dead:
        logger.info("left out, because the reference never uses them: %s", ", ".join(sorted(reference.dead)))
    network.load_state_dict({ours: reference.tensors.get(theirs, own[ours]) for ours, theirs in names.items()})
    return Converted(network.eval(), arguments, tuple(sorted(reference.dead)))


def _read(source: str, state: Mapping[str, Tensor | NDArray[Any]]) -> Reference:
    try:
        return _reader(source)(_tensors(state))
    except MedsegError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise WeightsError(
            f"The weights do not fit source {source!r}: its tensors have other shapes and types ({error}). Check that "
            "the file belongs to this source."
        ) from error


def _reader(source: str) -> Callable[[Mapping[str, Tensor]], Reference]:
    found: Callable[[Mapping[str, Tensor]], Reference]
    found = importlib.import_module(SOURCES[source].converter).SOURCES[source]
    return found


def _built(source: str, reference: Reference, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return reference.network(**arguments)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise RequestError(
            f"The network of source {source!r} cannot be built with {given}: {error}. Correct the options you gave."
        ) from error


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


def _compare(
    source: str,
    own: Mapping[str, Tensor],
    names: Mapping[str, str],
    given: Mapping[str, Tensor],
    dead: Collection[str],
) -> None:
    wanted = {theirs: tuple(own[ours].shape) for ours, theirs in names.items()}
    # Counters of batches are often stripped from published files and change no result.
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    surplus = [n for n in given if n not in wanted and n not in dead]
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
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{title} ({len(names)}): {', '.join(names[:NAMES_SHOWN])}{rest}. "
