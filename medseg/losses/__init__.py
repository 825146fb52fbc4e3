"""Losses of a training output and a label."""

from medseg.lazy import room

__getattr__, __dir__, __all__ = room(__name__)
