"""The model card of a planned bundle, and its forecast for the terminal."""

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
    limits = f"memory {shown_bytes(request.memory)}"
    if request.budget is not None:
        limits += f" and time {shown_time(request.budget)}"
    lines = [
        f"# {bundle['name']}",
        "",
        f"{bundle['description']} It was planned for {limits}, and is not trained yet: there are no weights.",
        "",
        "```",
        f"medseg train {bundle['name']} --data {bundle['data_source']}",
        f"medseg evaluate {bundle['name']} --data {bundle['data_source']}",
        "```",
        "",
        "## Choices and reasons",
        "",
        "| what | value | why |",
        "|---|---|---|",
        *(_row(plan, knob) for knob in bundle["plan"]),
        "",
        "## Forecast",
        "",
        "| what | how much |",
        "|---|---|",
        *(f"| {what} | {figure} |" for what, figure in forecast_rows(plan)),
        "",
        "Change a knob with `--set` when training, or edit `bundle.json` and run `medseg bundle build` on the folder.",
        "What was seen and measured is in `plan.json`.",
        "",
        "## Limits",
        "",
        "For research; not for diagnosis or treatment. Nothing has been measured with this bundle yet.",
    ]
    return "\n".join(lines) + "\n"


def choice_lines(plan: Plan) -> list[str]:
    """Return a line for each choice: setting, value and reason."""
    lines = []
    for setting, reason in plan.bundle["plan"].items():
        value = plan.bundle["knobs"].get(setting)
        lines.append(f"{setting}{'' if value is None else f' = {json.dumps(value)}'}: {reason}")
    return lines


def forecast_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return pairs of quantity and figure: the memory and time that training will take."""
    forecast = plan.forecast
    rows = [("memory, counted", f"{shown_bytes(forecast.memory)} of {shown_bytes(plan.request.memory)}")]
    if not forecast.total:
        return [*rows, ("time", "not measured")]
    knobs = plan.bundle["knobs"]
    busy = plan.measured.busy if plan.measured else 1.0
    if busy > _BUSY:
        rows.append(("careful", f"other programs compute here: steps took {busy:.1f} times what they would alone"))
    where = "the CPU" if forecast.device == "cpu" else forecast.device
    return [
        *rows,
        ("memory, measured", f"{shown_bytes(forecast.measured_memory)} on {where}"),
        ("a training step", f"{forecast.step:.3g} s with its data"),
        ("an epoch", shown_time(forecast.epoch)),
        ("a validation", f"{shown_time(forecast.validation)}, every {knobs['val_interval']} epochs"),
        (f"{knobs['max_epochs']} epochs", f"about {shown_time(forecast.total)}"),
    ]


def _row(plan: Plan, knob: str) -> str:
    value = plan.bundle["knobs"].get(knob)
    reason = plan.bundle["plan"][knob].replace("|", "\\|")
    return f"| {knob} | {'' if value is None else f'`{json.dumps(value)}`'} | {reason} |"
