"""`medseg prune`: accuracy and cost of the pruning levels of a trained UNet++."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli.console import write_json
from medseg.cli.options import BundleName, DataSet, Device, JsonTarget, Settings, Split, Trust, with_options
from medseg.cli.progress import progress
from medseg.cli.tables import print_prune
from medseg.tools import prune as pruning

__all__ = ["prune"]


def prune(
    bundle: BundleName,
    data: DataSet,
    split: Split = "val",
    select: Annotated[
        float | None,
        typer.Option(
            metavar="DICE",
            show_default="only compare levels",
            help="Write the smallest level whose Dice is at most DICE below the best.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            show_default="none; required with --select",
            help="New folder of the bundle with the selected level.",
        ),
    ] = None,
    settings: Settings = None,
    device: Device = None,
    trust: Trust = None,
    json_target: JsonTarget = None,
) -> None:
    """Compare the pruning levels of a trained UNet++, and write the smallest that is accurate enough.

    Each level runs in a separate process. Dice and IoU are means over labels and cases, in the labels' geometry.
    """
    with progress("passes") as report:
        table = pruning.prune(
            bundle,
            data,
            split=split,
            select=select,
            output=out,
            settings=parse_settings(with_options(settings, device_name=device)),
            trust=trust,
            report=report,
        )
    print_prune(table)
    write_json(table.to_dict(), json_target)
