"""Inferers: from an image and a network to labels in native space."""

from medseg.components import room

__getattr__, __dir__, __all__ = room(__name__)
