"""The model card of a planned bundle, and its choices and forecast for the terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from medseg.machine import shown_bytes
from medseg.planning.schedule import shown_time

if TYPE_CHECKING:
    from medseg.planning.result import Plan

__all__ = ["card"]


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
        *(f"| {what} | {figure} |" for what, figure in plan.forecast_rows()),
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


def _row(plan: Plan, setting: str) -> str:
    value = plan.bundle["knobs"].get(setting)
    reason = plan.bundle["plan"][setting].replace("|", "\\|")
    return f"| {setting} | {'' if value is None else f'`{json.dumps(value)}`'} | {reason} |"
