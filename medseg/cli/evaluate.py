"""`medseg evaluate`: how good a bundle is on labeled cases."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Trust, errors, output, progress, with_options
from medseg.jobs import api

if TYPE_CHECKING:
    from medseg.manifest import Manifest

__all__ = ["evaluate"]


def evaluate(
    bundle: BundleName,
    data: Annotated[Path, typer.Option("--data", "-d", help="Data set as for `medseg train`.")],
    split: Annotated[str, typer.Option(help="Which cases: val, train or test.")] = "val",
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for manifest.json; runs/evaluate of the bundle if not given."),
    ] = None,
    settings: Settings = None,
    device: Device = None,
    trust: Trust = None,
) -> None:
    """Predict labeled cases and print the Dice of each label, on the labels' own grids."""
    with progress("cases") as report:
        manifest = api.evaluate(
            bundle,
            data,
            split=split,
            output=out,
            settings=parse_settings(with_options(settings, device_name=device)),
            trust=trust,
            report=report,
        )
    _print_table(manifest)
    raise typer.Exit(manifest.exit_code)


def _print_table(manifest: Manifest) -> None:
    from rich.table import Table

    done = [record for record in manifest.cases.values() if record.status == "done"]
    table = Table(title=f"Dice, {len(done)} cases")
    for column in ("label", "mean", "SD", "lowest", "lowest case"):
        table.add_column(column)
    for label in done[0].metrics if done else ():
        values = [(value, r.name) for r in done if (value := r.metrics[label]) is not None and not math.isnan(value)]
        if values:
            numbers = [value for value, _ in values]
            spread = stdev(numbers) if len(numbers) > 1 else 0.0
            worst = min(values)
            table.add_row(label, f"{fmean(numbers):.4f}", f"{spread:.4f}", f"{worst[0]:.4f}", worst[1])
        else:
            table.add_row(label, "-", "-", "-", "in no label")
    output.print(table)
    for record in manifest.cases.values():
        if record.status == "failed":
            errors.print(f"failed: {record.name}: {record.error}", markup=False, soft_wrap=True)
