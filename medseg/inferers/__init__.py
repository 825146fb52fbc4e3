"""Inferers: predict logits, probabilities or labels of an image, in model space or native space."""

from medseg.lazy import room

__getattr__, __dir__, __all__ = room(__name__)
