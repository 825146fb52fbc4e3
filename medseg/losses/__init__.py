"""Losses: functions of a network's training output and the labels."""

from medseg.lazy import room

__getattr__, __dir__, __all__ = room(__name__)
