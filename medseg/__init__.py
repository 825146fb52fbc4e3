"""Medical image segmentation with published U-Net families, as MONAI bundles.

Use a bundle: `predict` writes masks, `Predictor` keeps a bundle loaded and segments images in memory, `load` reads an
image. Create one: `plan`, `train`, `convert`. Evaluate it: `evaluate`, `compare`, and `doctor` for data sets. Share it:
`export`, `prune`. `medseg.errors` lists the exceptions.

Each name is loaded on first use, so importing medseg costs nothing; arguments are checked before torch is imported.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path

from medseg.lazy import exports as _exports
from medseg.lazy import listed as _listed

_import_module("medseg.errors")  # so that `except medseg.errors.CaseError` needs no further import
__getattr__, __dir__, __all__ = _exports(__name__, _listed(_Path(__file__).with_suffix(".pyi")))
