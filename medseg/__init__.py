"""medseg: published U-Net families as MONAI networks, bundled and run on real medical images.

`predict`, `train`, `evaluate` and `load` are loaded on first use, so that importing medseg costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medseg.version import __version__

if TYPE_CHECKING:
    from medseg.io import load
    from medseg.jobs.api import evaluate, predict, train

__all__ = ["__version__", "evaluate", "load", "predict", "train"]

_HOMES = {"evaluate": "jobs.api", "predict": "jobs.api", "train": "jobs.api", "load": "io"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
