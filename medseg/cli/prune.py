"""`medseg prune`: which level of a trained UNet++ is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Trust, progress, with_options
from medseg.cli.tables import print_prune
from medseg.files import check_folder, replace_text
from medseg.tools import prune as pruning

__all__ = ["prune"]


def prune(
    bundle: BundleName,
    data: Annotated[Path, typer.Option("--data", "-d", help="Data set as for `medseg train`.")],
    split: Annotated[str, typer.Option(help="Which cases: val, train or test.")] = "val",
    select: Annotated[
        float | None,
        typer.Option(metavar="LOSS", help="Write the smallest level whose Dice is at most this below the best."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder for the bundle of the selected level.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the table there too.")] = None,
    settings: Settings = None,
    device: Device = None,
    trust: Trust = None,
) -> None:
    """Compare the levels that a trained UNet++ can be pruned to, and write the smallest that is good enough.

    Each level runs in a process of its own. Dice and IoU are means over labels and cases on the labels' own grids.
    """
    if json_file is not None:
        check_folder(json_file.absolute().parent)
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
    if json_file is not None:
        replace_text(json_file, table.to_json())
    print_prune(table)
