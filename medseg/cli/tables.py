"""Tables and summaries of the typed results of commands."""

from __future__ import annotations

import math
import shlex
from pathlib import PurePosixPath
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Final, TypeGuard

from rich.text import Text

from medseg.cli.console import errors, notes, output
from medseg.cli.layout import Column, show_table
from medseg.errors import by

if TYPE_CHECKING:
    from pathlib import Path

    from medseg.manifest import CaseRecord, Manifest
    from medseg.planning import Plan
    from medseg.scoring.comparison import Comparison, Difference
    from medseg.scoring.scores import Scores
    from medseg.tools.convert import Conversion
    from medseg.tools.export import ExportResult
    from medseg.tools.prune import PruneTable

__all__ = [
    "print_comparison",
    "print_conversion",
    "print_export",
    "print_failures",
    "print_folds",
    "print_next",
    "print_plan",
    "print_prune",
    "print_scores",
    "print_training",
]

_KEY: Final = "val_mean_dice"


def print_plan(made: Plan, data: Path) -> None:
    """Print the plan's choices with their reasons, the forecast and the next command."""
    for line in made.choice_lines():
        output.print(line, highlight=False)
    show_table(["forecast", ""], made.forecast_rows())
    name = made.bundle["name"]
    if made.root is not None and name != made.root.name:
        notes.print(
            f"folder '{made.root.name}' holds bundle '{name}': rename the folder to find the bundle by its name"
        )
    print_next("train", str(made.root), "--data", str(data))


def print_next(*arguments: str) -> None:
    """Print the suggested next command."""
    output.print("next:")
    output.print(f"  {shlex.join(['medseg', *arguments])}", highlight=False)


def print_comparison(found: Comparison) -> None:
    """Print the runs, best first, with the differences from the best."""
    labels = list(dict.fromkeys(label for each in found.standings for label in each.labels))
    columns = ["mean", "SD", *labels, "best minus this", "95 % interval", "best is better in"]
    rows = []
    for standing, difference in zip(found.standings, (None, *found.differences), strict=True):
        scores = [standing.mean, standing.sd, *(standing.labels.get(label) for label in labels)]
        rows.append([standing.name, *map(_decimals, scores), *_difference(difference)])
    title = f"Dice, {found.cases} cases of {found.patients} patients"
    show_table([Column("run"), *(Column(name, number=True) for name in columns)], rows, title=title)
    if found.left_out:
        output.print(f"skipped {len(found.left_out)} cases that not all runs have scored")
    output.print(found.verdict)


def _difference(difference: Difference | None) -> tuple[str, str, str]:
    if difference is None:
        return "-", "-", "-"
    interval = f"{difference.low:+.4f} to {difference.high:+.4f}"
    return f"{difference.mean:+.4f}", interval, f"{difference.better:.0%}"


def print_prune(result: PruneTable) -> None:
    """Print the pruning levels, the selected one in bold."""
    memory = "on the CUDA device" if result.device.startswith("cuda") else "process, libraries included"
    numbers = ("weights", "MB", f"peak MiB ({memory})", "ms/case (network, median)", "Dice", "IoU")
    rows = []
    for row in result.levels:
        peak = "-" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f}"
        cost = (f"{row.parameters:,}", f"{row.megabytes:.2f}", peak, f"{row.milliseconds:.1f}")
        cells = (row.level, *cost, _decimals(row.dice), _decimals(row.iou))
        rows.append([Text(cell, style="bold" if row.level == result.selected else "") for cell in cells])
    title = f"{result.bundle}, {result.cases} cases of '{result.split}', {result.device}"
    show_table([Column("level"), *(Column(name, number=True) for name in numbers)], rows, title=title)
    if result.selected is not None:
        output.print(f"{result.selected} written: {result.root}")


def print_export(done: ExportResult) -> None:
    """Print the file, its dynamic axes and its differences from the network."""
    output.print(f"{done.path}: {done.bytes / 1e6:.2f} MB")
    output.print(f"dynamic axes: {done.free or 'none: batch and size are fixed'}")
    for one in done.differences:
        output.print(
            f"{by(one.shape)}: largest difference {one.difference:.1e} for logits up to {one.largest:.1f}, "
            f"{one.changed:.4%} of the voxels change their label"
        )


def print_conversion(done: Conversion) -> None:
    """Print the number of converted tensors, the skipped ones and the file of the weights."""
    lines = [f"{done.network} from {done.source}: {done.tensors} tensors with {done.parameters} parameters"]
    if done.left_out:
        lines.append(f"skipped {len(done.left_out)} tensors that the network never uses: {', '.join(done.left_out)}")
    if done.background:
        lines.append(
            "added: a channel of zeros for the background, so that softmax returns the probabilities of the sigmoid"
        )
    for line in (*lines, f"weights: {done.weights}"):
        output.print(line)


def print_scores(manifest: Manifest) -> None:
    """Print the Dice of each label over the cases, and the cases that failed."""
    done = [record for record in manifest.cases.values() if record.status == "done"]
    numbers = (Column(name, number=True) for name in ("n", "mean", "SD", "lowest"))
    rows = [[label, *_scores(label, done)] for label in (done[0].metrics if done else ())]
    title = f"Dice of {manifest.bundle.name if manifest.bundle else 'a bundle'}, {len(done)} cases"
    show_table([Column("label"), *numbers, Column("lowest in")], rows, title=title)
    print_failures(manifest)


def _scores(label: str, done: list[CaseRecord]) -> tuple[str, ...]:
    """Return the number of cases with the label, mean, standard deviation, lowest value and its case."""
    values = [(value, r.name) for r in done if _is_known(value := r.metrics[label])]
    if not values:
        return "0", "-", "-", "-", "-"
    numbers = [value for value, _ in values]
    spread = stdev(numbers) if len(numbers) > 1 else None
    lowest, case = min(values)
    return str(len(values)), f"{fmean(numbers):.4f}", _decimals(spread), f"{lowest:.4f}", case


def print_training(manifest: Manifest, root: Path, data: Path) -> None:
    """Print the Dice of each label at the best validation, the file of the weights and the next command."""
    scored = [entry for entry in manifest.validations if _KEY in entry]
    best = max(scored, key=lambda entry: entry[_KEY], default=None)
    if best is not None:
        labels = {name.removeprefix(f"{_KEY}/"): value for name, value in best.items() if name.startswith(f"{_KEY}/")}
        rows = [[name, _decimals(value)] for name, value in {**labels, "mean": best[_KEY]}.items()]
        show_table(
            [Column("label"), Column("Dice", number=True)], rows, title=f"best validation, epoch {best['epoch']}"
        )
    output.print(f"best weights: {root / 'models' / 'model.pt'}")
    print_next("evaluate", str(root), "--data", str(data))


def print_folds(scores: Scores, out: Path) -> None:
    """Print the Dice of each label over all folds, and the next command."""
    heads = ("n", "mean", "SD", *(f"fold {number}" for number in range(scores.folds)))
    rows = [
        [label, str(of["cases"]), *map(_decimals, (of["mean"], of["sd"], *of["folds"]))]
        for label, of in scores.summary().items()
    ]
    title = f"{scores.name}: Dice, {len(scores.rows)} cases"
    show_table([Column("label"), *(Column(head, number=True) for head in heads)], rows, title=title)
    output.print(f"scores of each case: {out / 'cross_validation.txt'}")
    print_next("predict", str(out), "INPUT", "--output", "MASKS")


def _decimals(value: float | None) -> str:
    return f"{value:.4f}" if _is_known(value) else "-"


def _is_known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def print_failures(manifest: Manifest) -> None:
    """Print the cases that failed, with the reasons."""
    for record in manifest.cases.values():
        if record.status == "failed":
            errors.print(f"failed: {record.name}: {_reason(record)}")


def _reason(record: CaseRecord) -> str:
    """Return the error of a case, without the file name at its start if that is the name of the case."""
    return str(record.error).removeprefix(f"{PurePosixPath(record.name).name}: ")
