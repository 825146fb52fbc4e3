"""Dictionary transforms that MONAI lacks: reading and writing cases, labels, and the patches of training."""

from medseg.lazy import room

__getattr__, __dir__, __all__ = room(__name__)
