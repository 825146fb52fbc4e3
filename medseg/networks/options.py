"""Shared checks of constructor arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_choice", "check_numbers", "chosen_levels", "per_axis"]


def per_axis(
    strides: Sequence[int | Sequence[int]] | None, poolings: int, spatial_dims: int
) -> tuple[tuple[int, ...], ...]:
    """Return one stride per pooling and axis.

    Raises:
        RequestError: Wrong number of strides, or a stride below 1.
    """
    given = [2] * poolings if strides is None else strides
    spelled = tuple((s,) * spatial_dims if isinstance(s, int) else tuple(s) for s in given)
    if len(spelled) != poolings or any(len(s) != spatial_dims or min(s) < 1 for s in spelled):
        raise RequestError(
            f"invalid strides={strides}; expected {poolings} entries for {poolings + 1} levels, each one integer of at "
            f"least 1 or {spatial_dims} of them (one per axis)."
        )
    return spelled


def check_numbers(spatial_dims: int, features: Sequence[int]) -> None:
    """Check the number of spatial dimensions and the widths of at least two levels.

    Raises:
        RequestError: Invalid value.
    """
    if spatial_dims not in (2, 3):
        raise RequestError(f"invalid spatial_dims={spatial_dims!r}; expected 2 or 3.")
    if len(features) < 2 or min(features) < 1:
        raise RequestError(
            f"invalid features={tuple(features)}; expected two or more widths of at least 1, the bottleneck last."
        )


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a value is one of the choices.

    Raises:
        RequestError: Unknown value.
    """
    if value not in choices:
        raise RequestError(f"invalid {option}={value!r}; choose one of {', '.join(map(repr, choices))}.")


def chosen_levels(option: str, levels: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the selected levels among 1 (finest) to `depth`.

    Raises:
        RequestError: Unknown level.
    """
    every = tuple(range(1, depth + 1))
    if isinstance(levels, str) and levels in ("all", "none"):
        return every if levels == "all" else ()
    if isinstance(levels, str | int) or not set(levels) <= set(every):
        raise RequestError(
            f'invalid {option}={levels!r}; expected "all", "none", or levels from 1 (finest) to {depth}.'
        )
    return tuple(level for level in every if level in levels)
