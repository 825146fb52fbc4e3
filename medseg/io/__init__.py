"""Images and labels: listing, reading and writing files with their geometry.

Functions that work on file names alone import nothing heavy; the others import numpy, torch and MONAI on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from medseg.io.cases import CaseList, find_cases, list_cases
from medseg.io.datasets import find_dataset, list_dataset
from medseg.io.names import case_stem, output_path

if TYPE_CHECKING:
    from medseg.io.geometry import Grid, grid_difference, same_grid
    from medseg.io.labels import load_label
    from medseg.io.readers import load, read_grid
    from medseg.io.writers import write_label_files, write_mask, write_probabilities

__all__ = [
    "CaseList",
    "Grid",
    "case_stem",
    "find_cases",
    "find_dataset",
    "grid_difference",
    "list_cases",
    "list_dataset",
    "load",
    "load_label",
    "output_path",
    "read_grid",
    "same_grid",
    "write_label_files",
    "write_mask",
    "write_probabilities",
]

_HEAVY = {
    "Grid": "geometry",
    "grid_difference": "geometry",
    "same_grid": "geometry",
    "load": "readers",
    "load_label": "labels",
    "read_grid": "readers",
    "write_label_files": "writers",
    "write_mask": "writers",
    "write_probabilities": "writers",
}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HEAVY[name]}"), name)
