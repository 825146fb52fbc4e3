"""Medical image segmentation with published U-Net families, as MONAI bundles.

Use a bundle: `predict` writes masks, `Predictor` keeps a bundle loaded and takes images in memory, `load` reads an
image. Make one: `plan`, `train`, `convert`. Judge it: `evaluate`, `compare`, and `doctor` for data. Share it: `export`,
`prune`. What can go wrong is in `medseg.errors`.

Each name is loaded on first use, so importing medseg costs nothing; arguments are checked before torch is imported.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

from medseg.lazy import listed as _listed

if _TYPE_CHECKING:
    from typing import Any

_import_module("medseg.errors")  # so that `except medseg.errors.CaseError` needs no import of its own
_MODULES = _listed(_Path(__file__).with_suffix(".pyi"))
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
