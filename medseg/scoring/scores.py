"""Tables of scores per case: of a cross-validation, and read back for comparisons. No import of torch or MONAI."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from medseg.errors import RequestError
from medseg.files import load_json, replace_text
from medseg.manifest import Manifest

__all__ = ["CROSS_VALIDATION", "MEAN", "Scores", "nanmean", "read_scores", "write_scores"]

CROSS_VALIDATION: Final = "cross_validation.json"
# The mean of a case over its labels.
MEAN: Final = "mean"


@dataclass(frozen=True)
class Scores:
    """The Dice of each label in each case.

    Attributes:
        name: of what was scored.
        folds: how many networks share the cases.
        rows: for each case `case`, `patient`, `fold` and `metrics`: label -> value, None where the case lacks the
            label, and their `mean`.
        failed: cases that could not be scored.
    """

    name: str
    folds: int
    rows: tuple[Mapping[str, Any], ...]
    failed: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in their order, and last the mean over them."""
        names = dict.fromkeys(name for row in self.rows for name in row["metrics"] if name != MEAN)
        return (*names, MEAN)

    def values(self, label: str, fold: int | None = None) -> list[float]:
        """Return the known values of a label, of all folds or of one."""
        rows = (row for row in self.rows if fold is None or row["fold"] == fold)
        return [float(value) for row in rows if _is_known(value := row["metrics"].get(label))]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return for each label mean and standard deviation over the cases, and the mean of each fold."""
        return {label: self._of(label) for label in self.labels}

    def table(self) -> str:
        """Return a table of the labels for people."""
        folds = [f"fold {number}" for number in range(self.folds)] if self.folds > 1 else []
        rows = [
            [label, _shown(of["mean"]), _shown(of["sd"]), *map(_shown, of["folds"] if folds else ()), str(of["cases"])]
            for label, of in self.summary().items()
        ]
        title = f"{self.name}: Dice, {len(self.rows)} cases"
        return "\n".join([title, "", *_aligned([["label", "mean", "SD", *folds, "cases"], *rows])])

    def to_text(self) -> str:
        """Return tables for people: labels, then cases, worst first."""
        cases = sorted(self.rows, key=lambda row: (_sortable(row["metrics"].get(MEAN)), row["case"]))
        table = [
            [row["case"], str(row["fold"]), *(_shown(row["metrics"].get(label)) for label in self.labels)]
            for row in cases
        ]
        lines = [self.table(), "", *_aligned([["case", "fold", *self.labels], *table])]
        lines += ["", *(f"failed: {name}" for name in self.failed)] if self.failed else []
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it: values that are not finite become null."""
        return {
            "bundle": self.name,
            "metric": "Dice",
            "folds": self.folds,
            "labels": self.summary(),
            "cases": [
                {**row, "metrics": {name: _or_none(value) for name, value in row["metrics"].items()}}
                for row in self.rows
            ],
            "failed": list(self.failed),
        }

    def _of(self, label: str) -> dict[str, Any]:
        values = self.values(label)
        folds = [self.values(label, fold) for fold in range(self.folds)]
        return {
            "mean": fmean(values) if values else None,
            "sd": stdev(values) if len(values) > 1 else None,
            "cases": len(values),
            "folds": [fmean(each) if each else None for each in folds],
        }


def nanmean(values: Sequence[float]) -> float:
    """Return the mean of the values that are numbers; NaN where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def write_scores(scores: Scores, path: Path) -> None:
    """Write scores as JSON and, beside it, as text."""
    replace_text(path, json.dumps(scores.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    replace_text(path.with_suffix(".txt"), scores.to_text())


def read_scores(place: Path) -> Scores:
    """Read the scores of a run.

    Args:
        place: folder of a cross-validation or of an evaluated bundle, a folder that `medseg evaluate` wrote to, or one
            of the files in these: `cross_validation.json`, `manifest.json`.

    Raises:
        RequestError: there are none.
    """
    candidates = (place / CROSS_VALIDATION, place / "runs" / "evaluate" / "manifest.json", place / "manifest.json")
    path = place if place.is_file() else next((file for file in candidates if file.is_file()), None)
    if path is None:
        raise RequestError(
            f"'{place}' holds no scores: give the folder of a cross-validation (`medseg train --folds`), or of a "
            "bundle or output of `medseg evaluate`"
        )
    return _from_table(place, path) if path.name == CROSS_VALIDATION else _from_manifest(place, path)


def _from_table(place: Path, path: Path) -> Scores:
    content = load_json(path)
    try:
        rows = tuple({key: row[key] for key in ("case", "patient", "fold", "metrics")} for row in content["cases"])
        return Scores(_title(place), int(content["folds"]), rows, tuple(content["failed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{path} is no table of a cross-validation ({error!r}); let `medseg train` write it"
        ) from error


def _from_manifest(place: Path, path: Path) -> Scores:
    manifest = Manifest.read(path)
    rows = tuple(
        {"case": record.name, "patient": record.name, "fold": 0, "metrics": record.metrics}
        for record in manifest.cases.values()
        if record.status == "done" and record.metrics
    )
    if not rows:
        raise RequestError(f"{path} holds no scored cases: `medseg evaluate` writes such a file")
    failed = tuple(record.name for record in manifest.cases.values() if record.status == "failed")
    return Scores(_title(place), 1, rows, failed)


def _title(place: Path) -> str:
    folder = place.parent if place.is_file() else place
    return folder.resolve().name


def _is_known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _or_none(value: Any) -> Any:
    return value if _is_known(value) else None


def _sortable(value: Any) -> float:
    return float(value) if _is_known(value) else -1.0


def _shown(value: Any) -> str:
    return f"{value:.4f}" if _is_known(value) else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()
