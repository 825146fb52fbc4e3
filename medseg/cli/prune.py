"""`medseg prune`: which level of a trained UNet++ is enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Trust, output, progress, with_options
from medseg.files import check_folder, replace_text
from medseg.tools.prune import prune as measure_levels

if TYPE_CHECKING:
    from medseg.tools.prune import PruneTable

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
        table = measure_levels(
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
    _print_table(table)
    if table.selected is not None:
        output.print(f"{table.selected} is written: {out}", soft_wrap=True)


def _print_table(result: PruneTable) -> None:
    from rich.table import Table

    memory = "on the CUDA device" if result.device.startswith("cuda") else "process, libraries included"
    table = Table(title=f"{result.bundle}, {result.cases} cases of '{result.split}', {result.device}")
    headers = ("level", "weights", "MB", f"peak MiB ({memory})", "ms/case (network, median)", "Dice", "IoU")
    for header in headers:
        table.add_column(header, justify="left" if header == "level" else "right")
    for row in result.levels:
        scores = ("-" if score is None else f"{score:.4f}" for score in (row.dice, row.iou))
        peak = "-" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f}"
        cost = (f"{row.parameters:,}", f"{row.megabytes:.2f}", peak, f"{row.milliseconds:.1f}")
        table.add_row(row.level, *cost, *scores, style="bold" if row.level == result.selected else None)
    output.print(table)
