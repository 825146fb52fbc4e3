"""Markdown tables of the records of `benchmarks/training.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from side_by_side.pages import commit_of, replace_between, table

__all__ = ["render"]

_TITLES = {
    "nnunet": "nnU-Net 2",
    "monai": "MONAI script",
    "monai-plain": "MONAI script, plain",
    "medseg": "medseg, planned",
}


def render(results: Path, page: Path) -> None:
    """Print the tables of all records in a folder, or insert them between the markers of a page."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("training_*.json"))]
    replace_between(page, "training", "\n\n".join(_section(record) for record in records if "differences" in record))


def _section(record: dict[str, Any]) -> str:
    labels = record["labels"]
    # For a single label, the mean is redundant.
    keys = [key for key in next(iter(record["dice"].values())) if key != "mean" or len(labels) > 2]
    names = [labels.get(key, "mean") for key in keys]
    head = (
        "contestant, seed",
        *(f"Dice, {name}" for name in names),
        "steps",
        "batch",
        "arithmetic",
        "CPU s of training",
    )
    shown = sorted(record["dice"], key=lambda name: list(_TITLES).index(name.split("_")[0]))
    rows = [_row(name, [record["dice"][name][key] for key in keys], record["runs"][name]) for name in shown]
    return "\n".join(
        [
            f"### {record['data']}",
            "",
            f"{record['cases']['train']} training and {record['cases']['val']} validation cases, "
            f"{record['cpu_seconds']:,} CPU seconds for each training.",
            "",
            *table(head, rows),
            "",
            *table(
                ("difference of the mean Dice", "points", "95 % interval", "cases better"),
                [_difference(name, found, record) for name, found in record["differences"].items()],
            ),
            "",
            *[f"- {_title(name)}: {_plan(record['runs'][name])}" for name in shown if name.startswith("medseg")],
            "",
            f"`{record['command']}`: {record['machine']['processor']}, {record['threads']} threads; "
            f"{', '.join(f'{k} {v}' for k, v in record['versions'].items())}; {commit_of(record)}.",
        ]
    )


def _row(name: str, dice: list[float], run: dict[str, Any]) -> list[str]:
    values = [f"{value:.4f}" for value in dice]
    batch = run["batch_size"] * run.get("patches_per_case", 1)
    return [_title(name), *values, f"{run['iterations']:,}", str(batch), run["precision"], f"{run['cpu_s']:,.0f}"]


def _difference(name: str, found: dict[str, Any], record: dict[str, Any]) -> list[str]:
    low, high = (100 * bound for bound in found["interval"])
    ours, other = name.split(" - ")
    cases = record["cases"]["val"]
    shown = f"{_title(ours)} - {_title(other)}"
    return [shown, f"{100 * found['mean']:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{found['cases_better']} of {cases}"]


def _plan(run: dict[str, Any]) -> str:
    return f"features {run['features']}, patch {run['patch_size']}, {run['max_epochs']} epochs"


def _title(name: str) -> str:
    kind, seed = name.rsplit("_", 1)
    return f"{_TITLES[kind]}, {seed}"
