"""Training with MONAI's engines: data, wrappers, handlers, checkpoints, several processes."""

from medseg.lazy import room

__getattr__, __dir__, __all__ = room(__name__)
