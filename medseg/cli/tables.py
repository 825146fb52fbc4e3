"""What commands print of their typed results."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from medseg.cli.console import errors, output
from medseg.errors import by

if TYPE_CHECKING:
    from pathlib import Path

    from medseg.manifest import CaseRecord, Manifest
    from medseg.planning import Plan
    from medseg.scoring.comparison import Comparison
    from medseg.tools.convert import Conversion
    from medseg.tools.export import ExportResult
    from medseg.tools.prune import PruneTable

__all__ = [
    "print_comparison",
    "print_conversion",
    "print_export",
    "print_failures",
    "print_plan",
    "print_prune",
    "print_scores",
]


def print_plan(made: Plan, data: Path) -> None:
    """Print the choices with their reasons, the forecast and the next command."""
    from rich.table import Table

    from medseg.planning.model_card import choice_lines, forecast_rows

    for line in choice_lines(made):
        output.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table("forecast", "", show_header=False)
    for what, figure in forecast_rows(made):
        table.add_row(what, figure)
    output.print(table)
    name = made.bundle["name"]
    if made.root is not None and name != made.root.name:
        output.print(f"the bundle is called {name}; rename its folder so, for others to find it by name")
    output.print(f"next: medseg train {made.root} --data {data}", markup=False, highlight=False, soft_wrap=True)


def print_comparison(found: Comparison) -> None:
    """Print the runs, best first, with the differences from the best."""
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
    if found.left_out:
        output.print(f"{len(found.left_out)} cases are skipped: not all runs have scored them", soft_wrap=True)
    output.print(found.verdict, markup=False, soft_wrap=True)


def print_prune(result: PruneTable) -> None:
    """Print the levels, the selected one in bold."""
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
    if result.selected is not None:
        output.print(f"{result.selected} is written: {result.root}", soft_wrap=True)


def print_export(done: ExportResult) -> None:
    """Print the file, its free axes and its differences from the network."""
    output.print(f"{done.path}: {done.bytes / 1e6:.2f} MB", soft_wrap=True)
    output.print(f"free: {done.free or 'nothing: batch and size are fixed'}")
    for one in done.differences:
        output.print(
            f"{by(one.shape)}: largest difference {one.difference:.1e} of logits up to {one.largest:.1f}, "
            f"{one.changed:.4%} of the voxels get another label",
            soft_wrap=True,
        )


def print_conversion(done: Conversion) -> None:
    """Print which tensors were taken over, and where the weights are."""
    lines = [f"{done.network} from {done.source}: {done.tensors} tensors with {done.parameters} parameters"]
    if done.left_out:
        lines.append(f"skipped, because the network never uses them ({len(done.left_out)}): {', '.join(done.left_out)}")
    if done.background:
        lines.append("added: a channel of zeros for the background; softmax then gives what the sigmoid gave")
    for line in (*lines, f"weights: {done.weights}"):
        output.print(line, markup=False, soft_wrap=True)


def print_scores(manifest: Manifest) -> None:
    """Print the Dice of each label over the cases, and the cases that failed."""
    from rich.table import Table

    done = [record for record in manifest.cases.values() if record.status == "done"]
    table = Table(title=f"Dice, {len(done)} cases")
    for column in ("label", "mean", "SD", "lowest", "lowest case"):
        table.add_column(column)
    for label in done[0].metrics if done else ():
        table.add_row(label, *_scores(label, done))
    output.print(table)
    print_failures(manifest)


def _scores(label: str, done: list[CaseRecord]) -> tuple[str, str, str, str]:
    values = [(value, r.name) for r in done if (value := r.metrics[label]) is not None and not math.isnan(value)]
    if not values:
        return "-", "-", "-", "in no label"
    numbers = [value for value, _ in values]
    spread = stdev(numbers) if len(numbers) > 1 else 0.0
    lowest, case = min(values)
    return f"{fmean(numbers):.4f}", f"{spread:.4f}", f"{lowest:.4f}", case


def print_failures(manifest: Manifest) -> None:
    """Print the cases that failed, with the reasons."""
    for record in manifest.cases.values():
        if record.status == "failed":
            errors.print(f"failed: {record.name}: {record.error}", markup=False, soft_wrap=True)
