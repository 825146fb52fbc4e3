"""Shared helpers for reading state dicts of public code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medseg.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor, nn

__all__ = ["NAMES_SHOWN", "Reference", "deepest", "shape"]

# Maximum number of names in a message, since a wrong prefix affects hundreds.
NAMES_SHOWN = 12


@dataclass(frozen=True)
class Reference:
    """Mapping of a state dict of public code to a network.

    Attributes:
        network: Class of the network.
        arguments: Constructor arguments inferred from the tensors.
        modules: Name of each module in the source, by its name in medseg; leaf names (`weight`, ..) are equal.
        tensors: State dict of the source, with rearranged tensors where necessary.
        dead: Names of tensors that the source contains but does not use.
    """

    network: Callable[..., nn.Module]
    arguments: dict[str, Any]
    modules: dict[str, str]
    tensors: Mapping[str, Tensor]
    dead: Collection[str] = ()


def shape(state: Mapping[str, Tensor], source: str, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor that determines the size of the network.

    Raises:
        WeightsError: Missing tensor.
    """
    if name not in state:
        found = f"Found {', '.join(list(state)[:NAMES_SHOWN])}, .." if state else "The file is empty"
        raise WeightsError(
            f"The weights do not match source {source!r}: missing tensor {name}, which determines the size of the "
            f"network. {found}. Check that the file belongs to this source."
        )
    return tuple(state[name].shape)


def deepest(state: Collection[str], pattern: str) -> int:
    """Return the highest number matched by the group of `pattern` among the names; 0 without a match.

    Raises:
        WeightsError: Number higher than the number of tensors, so that some are missing.
    """
    highest = max((int(found[1]) for name in state if (found := re.fullmatch(pattern, name))), default=0)
    if highest > len(state):
        raise WeightsError(
            f"missing tensors: the names number a module {highest}, but there are only {len(state)} tensors."
        )
    return highest
