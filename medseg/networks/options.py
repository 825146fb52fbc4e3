"""Checks of constructor arguments that the networks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_choice", "check_numbers", "chosen_levels", "per_axis"]


def per_axis(
    strides: Sequence[int | Sequence[int]] | None, poolings: int, spatial_dims: int
) -> tuple[tuple[int, ...], ...]:
    """Spell out one stride per pooling and axis."""
    given = [2] * poolings if strides is None else strides
    spelled = tuple((s,) * spatial_dims if isinstance(s, int) else tuple(s) for s in given)
    if len(spelled) != poolings or any(len(s) != spatial_dims or min(s) < 1 for s in spelled):
        raise RequestError(
            f"strides={strides} does not fit: {poolings + 1} levels need {poolings} entries, each a number from 1 up "
            f"or {spatial_dims} of them (one per axis)."
        )
    return spelled


def check_numbers(spatial_dims: int, features: Sequence[int]) -> None:
    """Refuse anything but 2D or 3D, and fewer than two levels."""
    if spatial_dims not in (2, 3):
        raise RequestError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}.")
    if len(features) < 2 or min(features) < 1:
        raise RequestError(
            f"features={tuple(features)} must hold two or more widths from 1 up: one per level, the bottleneck last."
        )


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise RequestError(f"{option}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def chosen_levels(option: str, levels: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Spell out which of the levels 1 (finest) to `depth` are meant."""
    every = tuple(range(1, depth + 1))
    if isinstance(levels, str) and levels in ("all", "none"):
        return every if levels == "all" else ()
    if isinstance(levels, str | int) or not set(levels) <= set(every):
        raise RequestError(
            f'{option}={levels!r} is not known; give "all", "none", or numbers from 1 (finest level) to {depth}.'
        )
    return tuple(level for level in every if level in levels)
