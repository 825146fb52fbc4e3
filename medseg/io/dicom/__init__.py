"""DICOM series from folders, single files, DICOMDIR and zip archives, with their geometry.

`detect` recognizes DICOM by its first bytes and imports nothing heavy; the rest imports numpy and pydicom on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from medseg.io.dicom.detect import is_dicom, split_series

if TYPE_CHECKING:
    from medseg.io.dicom.series import Series, open_series

__all__ = ["Series", "is_dicom", "open_series", "split_series"]

_HEAVY = {"Series": "series", "open_series": "series"}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HEAVY[name]}"), name)
