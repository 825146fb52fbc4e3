"""A plan: the content of a bundle, the reason of each choice, and the forecast of its training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from medseg.machine import shown_bytes
from medseg.planning.schedule import shown_time

if TYPE_CHECKING:
    from pathlib import Path

    from medseg.planning.case_stats import Fingerprint
    from medseg.planning.probe import Measurement
    from medseg.planning.request import PlanRequest

__all__ = ["Forecast", "Plan"]

_BUSY = 1.7


@dataclass(frozen=True)
class Forecast:
    """Estimated memory and time of training; figures of a measurement are 0 where nothing was measured.

    Attributes:
        memory: Estimated memory on the device, in bytes.
        measured_memory: Measured memory on the device, in bytes.
        step: Time of a training step with its data, in seconds.
        epoch: Time of an epoch without validation, in seconds.
        validation: Time of a validation, in seconds.
        total: Time of the whole training with its validations, in seconds.
        device: Device of the measurement, "cpu" or the name of the GPU; empty where nothing was measured.
    """

    memory: int
    measured_memory: int = 0
    step: float = 0.0
    epoch: float = 0.0
    validation: float = 0.0
    total: float = 0.0
    device: str = ""


@dataclass(frozen=True)
class Plan:
    """A planned bundle.

    Attributes:
        bundle: Content of its `bundle.json`, with the reasons of the choices in `bundle["plan"]`.
        forecast: Estimated memory and time of training.
        measured: Measurements of the probe; None where nothing was measured.
        request: Network, limits and settings of the request.
        root: Folder of the written bundle; None if it was not written.
    """

    bundle: dict[str, Any]
    forecast: Forecast
    measured: Measurement | None
    request: PlanRequest
    root: Path | None = None

    def __str__(self) -> str:
        rows = [f"{what}: {figure}" for what, figure in self.forecast_rows()]
        return "\n".join([f"{self.bundle['name']} in {self.root}", *self.choice_lines(), *rows])

    def choice_lines(self) -> list[str]:
        """Return one line per choice: setting, value and reason."""
        lines = []
        for setting, reason in self.bundle["plan"].items():
            value = self.bundle["knobs"].get(setting)
            lines.append(f"{setting}{'' if value is None else f' = {json.dumps(value)}'}: {reason}")
        return lines

    def forecast_rows(self) -> list[tuple[str, str]]:
        """Return the estimated memory and time of training, as pairs of quantity and figure."""
        forecast = self.forecast
        rows = [
            ("memory, estimated", f"{shown_bytes(forecast.memory)} of the limit of {shown_bytes(self.request.memory)}")
        ]
        if not forecast.total:
            return [*rows, ("time", "not measured")]
        knobs = self.bundle["knobs"]
        busy = self.measured.busy if self.measured else 1.0
        if busy > _BUSY:
            rows.append(
                ("warning", f"other programs use the CPU: a step took {busy:.1f} times as long as on idle cores")
            )
        where = "the CPU" if forecast.device == "cpu" else forecast.device
        return [
            *rows,
            ("memory, measured", f"{shown_bytes(forecast.measured_memory)} on {where}"),
            ("training step", f"{forecast.step:.3g} s, with loading and augmentation"),
            ("epoch", shown_time(forecast.epoch)),
            ("validation", f"{shown_time(forecast.validation)}, every {knobs['val_interval']} epochs"),
            (f"all {knobs['max_epochs']} epochs", f"about {shown_time(forecast.total)}"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, without the fingerprint of the data."""
        return {
            "folder": None if self.root is None else str(self.root),
            "bundle": self.bundle,
            "forecast": asdict(self.forecast),
            "measured": asdict(self.measured) if self.measured else None,
        }

    def to_json(self, fingerprint: Fingerprint) -> dict[str, Any]:
        """Return the record of the plan for `plan.json`: forecast, measurements and fingerprint."""
        return {
            "forecast": asdict(self.forecast),
            "measured": asdict(self.measured) if self.measured else None,
            "fingerprint": fingerprint.to_json(),
        }
