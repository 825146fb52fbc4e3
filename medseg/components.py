"""The one namespace that bundle configs name: `"_target_": "medseg.components.UNet"`. It never moves.

A part may change its file; configs and other people's bundles do not notice. `components.pyi` lists the parts (and
types them for editors), `medseg.networks.registry` the networks. Nothing else can be reached through this module, which
the trust check relies on. A part is imported on first use; listing them imports neither torch nor MONAI.
"""

from __future__ import annotations

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

from medseg.lazy import listed as _listed

if _TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def _all() -> dict[str, str]:
    """Return the module of each part in `components.pyi`, and of each network."""
    networks = _importlib.import_module("medseg.networks.registry").NETWORKS
    parts = _listed(_Path(__file__).with_suffix(".pyi"))
    return {**parts, **{name: entry.module for name, entry in networks.items()}}


_MODULES = _all()
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__


def room(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose public names are its parts in this list."""
    names = [name for name, module in _MODULES.items() if module.startswith(f"{package}.")]

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return __getattr__(name)

    return get, lambda: sorted(names), sorted(names)
