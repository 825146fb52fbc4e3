"""`medseg evaluate`: how good a bundle is on labeled cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Strict, Trust, progress, with_options
from medseg.cli.tables import print_scores
from medseg.jobs import api

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
    strict: Strict = False,
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
            strict=strict,
            report=report,
        )
    print_scores(manifest)
    raise typer.Exit(manifest.exit_code)
