"""What the functions that read foreign state dicts share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medseg.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor, nn

__all__ = ["NAMES_SHOWN", "Reference", "deepest", "shape"]

# A list of names in a message is cut here: one wrong prefix makes hundreds of them.
NAMES_SHOWN = 12


@dataclass(frozen=True)
class Reference:
    """How a foreign state dict is to be read.

    Attributes:
        network: class to build.
        arguments: its arguments, read off the tensors.
        modules: name of our module -> name of theirs; their tensors have the same last names (`weight`, ..).
        tensors: the state dict, changed only where a tensor itself needs rearranging.
        dead: names of tensors that the reference holds but never uses.
    """

    network: Callable[..., nn.Module]
    arguments: dict[str, Any]
    modules: dict[str, str]
    tensors: Mapping[str, Tensor]
    dead: Collection[str] = ()


def shape(state: Mapping[str, Tensor], source: str, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor from which the network's size is read."""
    if name not in state:
        found = f"It holds {', '.join(list(state)[:NAMES_SHOWN])}, .." if state else "It is empty"
        raise WeightsError(
            f"The weights do not fit source {source!r}: {name} is missing, which tells the network's size. {found}. "
            "Check that the file belongs to this source."
        )
    return tuple(state[name].shape)


def deepest(state: Collection[str], pattern: str) -> int:
    """Return the highest number that the group of `pattern` takes among the names; 0 if it takes none.

    Raises:
        WeightsError: it is higher than there are names, so that some numbers below it are missing.
    """
    highest = max((int(found[1]) for name in state if (found := re.fullmatch(pattern, name))), default=0)
    if highest > len(state):
        raise WeightsError(f"The weights number a part {highest} but hold {len(state)} tensors: some are missing.")
    return highest
