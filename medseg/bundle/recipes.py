"""The training recipes of the papers, and how a bundle takes one.

A recipe (`recipes/*.json`) replaces settings (`knobs`) and blocks of the template: optimizer, schedule, loss,
augmentation and stopping. What belongs to the data (spacing, patch size, intensity range) stays with the bundle.
`source` names the origin of its figures, `choices` our values where the paper gives none, `2d` and `3d` what differs by
dimension.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import RequestError
from medseg.files import load_json

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read_recipe", "recipe_names", "with_recipe"]

_RECIPES = Path(__file__).parent / "recipes"
_PARTS = ("knobs", "blocks")


def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.json")))


def read_recipe(name: str, spatial_dims: int) -> dict[str, Any]:
    """Return the recipe: `source` and `choices` for people, and the `knobs` and `blocks` for 2 or 3 dimensions.

    Raises:
        RequestError: Unknown recipe; the message lists the known ones.
    """
    if name not in recipe_names():
        raise RequestError(f"unknown recipe '{name}'; expected one of: {', '.join(recipe_names())}")
    found: dict[str, Any] = load_json(_RECIPES / f"{name}.json")
    own = found.pop(f"{spatial_dims}d", {})
    found.pop(f"{5 - spatial_dims}d", None)
    return {**found, **{part: {**found.get(part, {}), **own.get(part, {})} for part in _PARTS}}


def with_recipe(bundle: Mapping[str, Any], name: str, spatial_dims: int) -> dict[str, Any]:
    """Return the content of a `bundle.json` that trains with a recipe, or with its template alone if `name` is empty.

    The recipe replaces the bundle's values of its settings and blocks; all others are kept.

    Raises:
        RequestError: Unknown recipe.
    """
    changed = {key: value for key, value in bundle.items() if key != "recipe"}
    if not name:
        return changed
    recipe = read_recipe(name, spatial_dims)
    for part in _PARTS:
        kept = {key: value for key, value in bundle.get(part, {}).items() if key not in recipe[part]}
        changed.pop(part, None)
        if kept:
            changed[part] = kept
    return {**changed, "recipe": name}
