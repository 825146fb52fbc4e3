"""Metrics that configs name, and in `features` measures of what a network has learned."""

from medseg.lazy import room

__getattr__, __dir__, __all__ = room(__name__)
