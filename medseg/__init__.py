"""medseg: published U-Net families as MONAI networks, bundled and run on real medical images.

`predict`, `train`, `evaluate` and `load` are loaded on first use, so that importing medseg costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.bundle.api import evaluate, predict, train
    from medseg.io import load

__version__ = "0.1.0"

__all__ = ["__version__", "evaluate", "load", "predict", "train"]

_HOMES = {"evaluate": "bundle.api", "predict": "bundle.api", "train": "bundle.api", "load": "io"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
