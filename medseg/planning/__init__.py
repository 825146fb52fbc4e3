"""From a labeled data set to a bundle that can be trained: fingerprint, plan, probe.

Submodules that need torch are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from medseg.planning.request import PlanRequest, parse_duration, parse_network, parse_size

if TYPE_CHECKING:
    from medseg.planning.case_stats import Fingerprint
    from medseg.planning.fingerprint import take_fingerprint
    from medseg.planning.plan import make_plan
    from medseg.planning.probe import Measurement, measure
    from medseg.planning.result import Plan

__all__ = [
    "Fingerprint",
    "Measurement",
    "Plan",
    "PlanRequest",
    "make_plan",
    "measure",
    "parse_duration",
    "parse_network",
    "parse_size",
    "take_fingerprint",
]

_LATER = {
    "Fingerprint": "case_stats",
    "Measurement": "probe",
    "Plan": "result",
    "make_plan": "plan",
    "measure": "probe",
    "take_fingerprint": "fingerprint",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
