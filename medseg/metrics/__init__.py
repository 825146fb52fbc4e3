"""Metrics for configs, and in `features` measures of the features that a network has learned."""

from medseg.lazy import room

__getattr__, __dir__, __all__ = room(__name__)
