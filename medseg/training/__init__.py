"""Training with MONAI engines: data loading, wrappers, handlers, checkpoints, distributed training."""

from medseg.lazy import room

__getattr__, __dir__, __all__ = room(__name__)
