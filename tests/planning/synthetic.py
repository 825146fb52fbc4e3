"""Fingerprints that are written down instead of taken, so that a rule of the plan is tested in milliseconds."""

from __future__ import annotations

from typing import Any

from medseg.planning.case_stats import CaseStats, Fingerprint, Intensity

_VOLUME: dict[str, Any] = {
    "name": "case_0",
    "shape": (60, 70, 50),
    "spacing": (1.0, 1.0, 1.0),
    "orientation": "RAS",
    "dtype": "int16",
    "channels": 1,
    "color": False,
    "low": 0.0,
    "high": 400.0,
    "percentiles": (10.0, 100.0, 380.0),
    "modality": "",
    "microns": 0.0,
    "values": {0: 209_000, 1: 1_000},
    "distinct": 1,
    "contiguous": True,
    "objects": 1,
    "single": 1,
    "object_sizes": (1000.0, 1000.0, 1000.0),
}
_IMAGE: dict[str, Any] = {
    **_VOLUME,
    "shape": (96, 80),
    "spacing": (),
    "orientation": "",
    "dtype": "uint8",
    "high": 255.0,
    "percentiles": (5.0, 120.0, 250.0),
    "values": {0: 7_000, 1: 680},
}
TISSUE = Intensity(mean=120.0, std=30.0, low=50.0, median=115.0, high=210.0, samples=4_000)


def volume(**facts: Any) -> CaseStats:
    """Return a volume of 60 x 70 x 50 voxels of 1 mm with one structure, changed by `facts`."""
    return CaseStats(**{**_VOLUME, **facts})


def image(**facts: Any) -> CaseStats:
    """Return a gray 2D image of 96 x 80 pixels with one structure, changed by `facts`."""
    return CaseStats(**{**_IMAGE, **facts})


def color_image(**facts: Any) -> CaseStats:
    """Return an RGB image of 96 x 80 pixels with one structure, changed by `facts`."""
    return image(**{"channels": 3, "color": True, **facts})


def fingerprint(*cases: CaseStats, **facts: Any) -> Fingerprint:
    """Return the fingerprint of a data set that holds `cases`, and one more for validation."""
    channels = max(case.channels for case in cases)
    defaults: dict[str, Any] = {
        "dataset": "set",
        "key": "key",
        "validation_cases": 1,
        "label_names": {},
        "channel_names": (),
        "intensities": (TISSUE,) * channels,
    }
    return Fingerprint(cases=cases, **{**defaults, **facts})
