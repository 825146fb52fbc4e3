"""Upgrade of bundles from earlier versions, whose configs name components by their former modules and classes.

`medseg bundle build` renames them in `bundle.json`; weights are unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from medseg import components

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["current_target", "upgraded"]

_RENAMED: Final[Mapping[str, str]] = {
    "ClassPlacesd": "ClassIndicesd",
    "EdgeTruthd": "LabelToEdged",
    "EndlessBatches": "InfiniteBatchSampler",
    "TrainingOutputs": "TrainingWrapper",
    "WeightAverage": "EMA",
    "item": "identity",
}
_NAMESPACE: Final = "medseg.components"


def current_target(target: object) -> str | None:
    """Return the present name of a `_target_` of an earlier version; None for any other value."""
    if not isinstance(target, str) or not target.startswith("medseg.") or target.startswith(f"{_NAMESPACE}."):
        return None
    name = target.rpartition(".")[2]
    name = _RENAMED.get(name, name)
    return f"{_NAMESPACE}.{name}" if name in components.__all__ else None


def upgraded(content: Any) -> Any:
    """Return JSON content with the targets of earlier versions replaced by their present names."""
    if isinstance(content, list):
        return [upgraded(item) for item in content]
    if not isinstance(content, dict):
        return content
    changed = {key: upgraded(value) for key, value in content.items()}
    if (target := current_target(changed.get("_target_"))) is not None:
        changed["_target_"] = target
    return changed
