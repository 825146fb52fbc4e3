"""Shell completion of bundles, settings, formats and devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import typer

from medseg.bundle.catalog import find_bundle, merged, shipped_bundles
from medseg.bundle.knobs import changed, knobs
from medseg.errors import MedsegError
from medseg.io.names import OUTPUT_FORMATS
from medseg.networks.registry import NETWORKS
from medseg.tools import convert
from medseg.tools.export_formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from medseg.bundle.compose import Config

__all__ = [
    "bundle_names",
    "devices",
    "export_formats",
    "mask_formats",
    "networks",
    "setting_names",
    "splits",
    "weight_sources",
]

_CONFIGS: Final = {"predict": ("inference",), "evaluate": ("train", "evaluate"), "prune": ("train", "evaluate")}


def bundle_names(incomplete: str) -> list[str]:
    """Return the names of the shipped bundles."""
    return [bundle.name for bundle in shipped_bundles() if bundle.name.startswith(incomplete)]


def setting_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the settings of the bundle on the command line, each with an equals sign."""
    try:
        bundle = find_bundle(str(ctx.params.get("bundle") or ""))
        config = merged(bundle.load_configs(*_CONFIGS.get(str(ctx.info_name), ("train",))))
    except MedsegError:
        return []
    return [f"{name}=" for name in sorted(knobs(config)) if name.startswith(incomplete) and _can_be_set(config, name)]


def mask_formats(incomplete: str) -> list[str]:
    """Return the formats that `predict` writes."""
    return _starting(OUTPUT_FORMATS, incomplete)


def export_formats(incomplete: str) -> list[str]:
    """Return the formats that `export` writes."""
    return _starting(FORMATS, incomplete)


def weight_sources(incomplete: str) -> list[str]:
    """Return the code bases whose weights `convert` reads."""
    return _starting(convert.SOURCE_NAMES, incomplete)


def networks(incomplete: str) -> list[str]:
    """Return the networks of `plan`."""
    return _starting([f"{name.lower()}{end}" for name in NETWORKS for end in ("", "+selfreg")], incomplete)


def devices(incomplete: str) -> list[str]:
    """Return the computing devices."""
    return _starting(("auto", "cpu", "cuda"), incomplete)


def splits(incomplete: str) -> list[str]:
    """Return the splits of a data set."""
    return _starting(("val", "train", "test"), incomplete)


def _can_be_set(config: Config, name: str) -> bool:
    """Return whether the user may override a setting."""
    try:
        changed(config, {name: config[name]})
    except MedsegError:
        return False
    return True


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
