"""Settings: the values of a bundle that a user may change, parsed from the command line and checked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.compose import Config, checked_value, nearest
from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["changed", "knobs", "parse_settings"]

# Entries of a config that a command fills in, and their source.
_GIVEN: Final = {
    "bundle_root": "the bundle",
    "dataset_dir": "the data, such as --data",
    "resume": "--resume",
}


def knobs(config: Config) -> Config:
    """Return the settings of a config: its top-level entries that are plain values."""
    return {name: value for name, value in config.items() if not name.startswith("_") and _is_plain(value)}


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Parse `name=value` texts; a value is JSON if it parses as such, otherwise text.

    Raises:
        RequestError: A text without `=`, or a name that is set twice.
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise RequestError(f"invalid setting '{setting}': write --set name=value")
        if name in parsed:
            raise RequestError(f"'{name}' is set twice")
        try:
            parsed[name] = json.loads(text)
        except ValueError:
            parsed[name] = text
    return parsed


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """Check a user's settings against those of a config and return them as overrides.

    Settings are values, never expressions. A path that the config computes, such as `weights` or `output_dir`, may be
    replaced by a text.

    Raises:
        RequestError: Unknown setting (names the nearest one), a value of the wrong type, or an entry that the command
            fills in.
    """
    known = knobs(config) | {name: "" for name, value in config.items() if _is_path(value)}
    for name in settings:
        if name not in known:
            raise RequestError(f"unknown setting '{name}' of this bundle{nearest(name, known)}")
        if name in _GIVEN:
            raise RequestError(f"'{name}' cannot be set: it comes from {_GIVEN[name]}")
        if not _is_plain(settings[name]):
            raise RequestError(f"'{name}' takes a plain value, not {settings[name]!r}, which MONAI would evaluate")
    return {name: checked_value(name, value, known[name]) for name, value in settings.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" not in value and bool(value) and all(_is_plain(item) for item in value.values())
    if isinstance(value, list):
        return all(_is_plain(item) and not isinstance(item, dict) for item in value)
    return not (isinstance(value, str) and value[:1] in ("$", "@", "%"))


def _is_path(value: Any) -> bool:
    return isinstance(value, dict) and value.get("_target_") == "medseg.components.inside"
