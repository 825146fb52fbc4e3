"""`medseg evaluate`: scores of a bundle on labeled cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli.console import write_json
from medseg.cli.options import BundleName, DataSet, Device, JsonTarget, Settings, Split, Strict, Trust, with_options
from medseg.cli.progress import progress
from medseg.cli.tables import print_scores
from medseg.jobs import api

__all__ = ["evaluate"]


def evaluate(
    bundle: BundleName,
    data: DataSet,
    split: Split = "val",
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            show_default="runs/evaluate in the bundle",
            help="Folder of manifest.json with the scores.",
        ),
    ] = None,
    settings: Settings = None,
    device: Device = None,
    strict: Strict = False,
    trust: Trust = None,
    json_target: JsonTarget = None,
) -> None:
    """Predict labeled cases and print the Dice of each label, computed in the labels' geometry.

    The exit code is 1 if a case failed.
    """
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
    write_json(manifest.to_dict(), json_target)
    raise typer.Exit(manifest.exit_code)
