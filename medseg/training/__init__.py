"""Training with MONAI's engines: data, wrappers, handlers, checkpoints, several processes."""

from medseg.components import room

__getattr__, __dir__, __all__ = room(__name__)
