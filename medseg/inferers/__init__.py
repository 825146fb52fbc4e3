"""Inferers: from an image and a network to labels in native space."""

from medseg.lazy import room

__getattr__, __dir__, __all__ = room(__name__)
