"""Whole-slide images: region reading, tissue detection, GeoJSON polygons of objects, label pyramids."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.io.slides.slide import Slide, open_slide

__all__ = ["Slide", "open_slide"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("medseg.io.slides.slide"), name)
