"""The model card of a planned bundle, and its choices and forecast for the terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from medseg.machine import shown_bytes
from medseg.planning.schedule import shown_time

if TYPE_CHECKING:
    from medseg.planning.plan import Plan

__all__ = ["card", "choice_lines", "forecast_rows"]

_BUSY = 1.7


def card(plan: Plan) -> str:
    """Return the model card, `docs/README.md` of the bundle."""
    bundle, request = plan.bundle, plan.request
    limits = f"{shown_bytes(request.memory)} of memory"
    if request.budget is not None:
        limits += f" and {shown_time(request.budget)} of training time"
    lines = [
        f"# {bundle['name']}",
        "",
        f"{bundle['description']} The plan is limited to {limits}. The bundle is not trained yet and has no weights.",
        "",
        "```",
        f"medseg train {bundle['name']} --data {bundle['data_source']}",
        f"medseg evaluate {bundle['name']} --data {bundle['data_source']}",
        "```",
        "",
        "## Choices and reasons",
        "",
        "| setting | value | reason |",
        "|---|---|---|",
        *(_row(plan, setting) for setting in bundle["plan"]),
        "",
        "## Forecast",
        "",
        "| quantity | estimate |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in forecast_rows(plan)),
        "",
        "To change a setting, pass `--set NAME=VALUE` to `medseg train`, or edit `bundle.json` and run",
        "`medseg bundle build` on the folder. `plan.json` contains the statistics of the training cases and the "
        "measurements.",
        "",
        "## Limits",
        "",
        "For research only, not for diagnosis or treatment. The accuracy of this bundle has not been evaluated yet.",
    ]
    return "\n".join(lines) + "\n"


def choice_lines(plan: Plan) -> list[str]:
    """Return one line per choice: setting, value and reason."""
    lines = []
    for setting, reason in plan.bundle["plan"].items():
        value = plan.bundle["knobs"].get(setting)
        lines.append(f"{setting}{'' if value is None else f' = {json.dumps(value)}'}: {reason}")
    return lines


def forecast_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the estimated memory and time of training, as pairs of quantity and figure."""
    forecast = plan.forecast
    rows = [("memory, estimated", f"{shown_bytes(forecast.memory)} of the limit of {shown_bytes(plan.request.memory)}")]
    if not forecast.total:
        return [*rows, ("time", "not measured")]
    knobs = plan.bundle["knobs"]
    busy = plan.measured.busy if plan.measured else 1.0
    if busy > _BUSY:
        rows.append(("warning", f"other programs use the CPU: a step took {busy:.1f} times as long as on idle cores"))
    where = "the CPU" if forecast.device == "cpu" else forecast.device
    return [
        *rows,
        ("memory, measured", f"{shown_bytes(forecast.measured_memory)} on {where}"),
        ("training step", f"{forecast.step:.3g} s, with loading and augmentation"),
        ("epoch", shown_time(forecast.epoch)),
        ("validation", f"{shown_time(forecast.validation)}, every {knobs['val_interval']} epochs"),
        (f"all {knobs['max_epochs']} epochs", f"about {shown_time(forecast.total)}"),
    ]


def _row(plan: Plan, setting: str) -> str:
    value = plan.bundle["knobs"].get(setting)
    reason = plan.bundle["plan"][setting].replace("|", "\\|")
    return f"| {setting} | {'' if value is None else f'`{json.dumps(value)}`'} | {reason} |"
