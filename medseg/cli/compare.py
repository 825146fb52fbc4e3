"""`medseg compare`: which of several runs is the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.cli.console import output
from medseg.files import replace_text
from medseg.scoring.comparison import compare as compare_runs

if TYPE_CHECKING:
    from medseg.scoring.comparison import Comparison

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of cross-validations, or of bundles that `medseg evaluate` has scored.", metavar="RUN..."
        ),
    ],
    table: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the comparison as JSON.")] = None,
) -> None:
    """Compare scored bundles on the cases they share, and name the best."""
    found = compare_runs(runs)
    _print_table(found)
    if found.left_out:
        output.print(f"{len(found.left_out)} cases are left out: not all runs have scored them", soft_wrap=True)
    output.print(found.verdict, markup=False, soft_wrap=True)
    if table is not None:
        replace_text(table, json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n")


def _print_table(found: Comparison) -> None:
    from rich.table import Table

    table = Table(title=f"Dice, {found.cases} cases of {found.patients} patients")
    labels = list(dict.fromkeys(label for each in found.standings for label in each.labels))
    for column in ("run", "mean", "SD", *labels, "best minus this", "95 % interval", "best is better in"):
        table.add_column(column)
    for number, each in enumerate(found.standings):
        cells = [each.name, f"{each.mean:.4f}", "-" if each.sd is None else f"{each.sd:.4f}"]
        cells += [f"{each.labels[label]:.4f}" if label in each.labels else "-" for label in labels]
        if number:
            difference = found.differences[number - 1]
            cells += [f"{difference.mean:+.4f}", f"{difference.low:+.4f} to {difference.high:+.4f}"]
            cells.append(f"{difference.better:.0%}")
        table.add_row(*cells)
    output.print(table)
