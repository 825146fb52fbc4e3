"""The stable namespace of bundle configs: `"_target_": "medseg.components.UNet"`.

A component may move to another module without breaking configs or published bundles. `components.pyi` lists the
components (and types them for editors), `medseg.networks.registry` the networks. Nothing else is reachable through this
module, which the trust check relies on. Components are imported on first use; listing them imports neither torch nor
MONAI.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path

from medseg.lazy import exports as _exports
from medseg.lazy import listed as _listed

_networks = {name: entry.module for name, entry in _import_module("medseg.networks.registry").NETWORKS.items()}
__getattr__, __dir__, __all__ = _exports(__name__, {**_listed(_Path(__file__).with_suffix(".pyi")), **_networks})
