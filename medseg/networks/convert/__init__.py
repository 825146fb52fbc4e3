"""Conversion of weights from the authors' and other public code to the networks of medseg.

Each source has one function that infers widths, depth and dimensions from the tensors and maps the modules of medseg to
those of the source (`Reference`); missing, unexpected and mismatched tensors are checked here. The sources of a network
are listed in its registry entry; their functions are in the module of the same name.
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
    """Network with converted weights.

    Attributes:
        network: Network in evaluation mode.
        arguments: Constructor arguments, inferred from the tensors or set by the caller.
        left_out: Names of tensors that the source contains but does not use.
    """

    network: nn.Module
    arguments: dict[str, Any]
    left_out: tuple[str, ...]


def from_reference(source: str, state: Mapping[str, Tensor | NDArray[Any]], **config: Any) -> nn.Module:
    """Build a network with the converted weights of a state dict of public code.

    Args:
        source: One of `SOURCES`, e.g. "unet-2015".
        state: Tensors (or arrays) by name; a "module." prefix of all names is removed.
        **config: Arguments of the network that cannot be inferred from the tensors, e.g. `upconv_relu=True`.

    Returns:
        Network in evaluation mode.

    Raises:
        RequestError: Unknown source, or a network that cannot be built with `config`.
        WeightsError: Missing, unexpected or mismatched tensors, which are listed.
    """
    return read_reference(source, state, **config).network


def read_reference(source: str, state: Mapping[str, Tensor | NDArray[Any]], **config: Any) -> Converted:
    """Convert weights like `from_reference`, and return the constructor arguments too; same arguments and errors."""
    if source not in SOURCES:
        raise RequestError(f"unknown source {source!r}; choose one of {', '.join(SOURCES)}.")
    reference = _read(source, state)
    arguments = {**reference.arguments, **config}
    network = _built(source, reference, arguments)
    own = network.state_dict()
    names = _names(own, reference.modules)
    _compare(source, own, names, reference.tensors, reference.dead)
    if reference.dead:
        logger.info("tensors skipped, since the source does not use them: %s", ", ".join(sorted(reference.dead)))
    network.load_state_dict({ours: reference.tensors.get(theirs, own[ours]) for ours, theirs in names.items()})
    return Converted(network.eval(), arguments, tuple(sorted(reference.dead)))


def _read(source: str, state: Mapping[str, Tensor | NDArray[Any]]) -> Reference:
    try:
        return _reader(source)(_tensors(state))
    except MedsegError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise WeightsError(
            f"The weights do not match source {source!r}: unexpected shapes or types ({error}). Check that the file "
            "belongs to this source."
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
            f"The network of source {source!r} cannot be built with {given}: {error}. Correct these options."
        ) from error


def _tensors(state: Mapping[str, Tensor | NDArray[Any]]) -> dict[str, Tensor]:
    wrapped = bool(state) and all(name.startswith("module.") for name in state)
    return {
        name.removeprefix("module.") if wrapped else name: v.detach() if isinstance(v, Tensor) else torch.tensor(v)
        for name, v in state.items()
    }


def _names(own: Iterable[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Return the name in the source of each tensor."""
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
    # Batch counters are often missing in published files and do not affect the result.
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    surplus = [n for n in given if n not in wanted and n not in dead]
    misshapen = [
        f"{n} {tuple(given[n].shape)}, expected {shape}"
        for n, shape in wanted.items()
        if n in given and tuple(given[n].shape) != shape
    ]
    if missing or surplus or misshapen:
        raise WeightsError(
            f"The weights do not match source {source!r}. {_listed('Missing', missing)}"
            f"{_listed('Unexpected', surplus)}{_listed('Shape mismatch', misshapen)}Check that the file belongs to "
            f"this source (known: {', '.join(SOURCES)}) and that additional options match the trained network."
        )


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{title} ({len(names)}): {', '.join(names[:NAMES_SHOWN])}{rest}. "
