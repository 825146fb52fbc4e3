"""Scores per case and their tables, from cross-validations and evaluations. Imports neither torch nor MONAI."""

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
# Key of a case's mean over its labels.
MEAN: Final = "mean"


@dataclass(frozen=True)
class Scores:
    """Dice of each label in each case.

    Attributes:
        name: Name of the bundle or run.
        folds: Number of folds; 1 for a single network.
        rows: A mapping per case with `case`, `patient`, `fold` and `metrics`: the Dice of each label, None where the
            case lacks the label, and their `mean`.
        failed: Names of the cases whose scoring failed.
    """

    name: str
    folds: int
    rows: tuple[Mapping[str, Any], ...]
    failed: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in their order, followed by the mean over them."""
        names = dict.fromkeys(name for row in self.rows for name in row["metrics"] if name != MEAN)
        return (*names, MEAN)

    def values(self, label: str, fold: int | None = None) -> list[float]:
        """Return the finite values of a label, from one fold or all folds."""
        rows = (row for row in self.rows if fold is None or row["fold"] == fold)
        return [float(value) for row in rows if _is_known(value := row["metrics"].get(label))]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return the mean and standard deviation of each label over the cases, and its mean in each fold."""
        return {label: self._of(label) for label in self.labels}

    def table(self) -> str:
        """Return a text table of the labels."""
        folds = [f"fold {number}" for number in range(self.folds)] if self.folds > 1 else []
        rows = [
            [label, _shown(of["mean"]), _shown(of["sd"]), *map(_shown, of["folds"] if folds else ()), str(of["cases"])]
            for label, of in self.summary().items()
        ]
        title = f"{self.name}: Dice, {len(self.rows)} cases"
        return "\n".join([title, "", *_aligned([["label", "mean", "SD", *folds, "cases"], *rows])])

    def to_text(self) -> str:
        """Return text tables of the labels and of the cases, worst case first."""
        cases = sorted(self.rows, key=lambda row: (_sortable(row["metrics"].get(MEAN)), row["case"]))
        table = [
            [row["case"], str(row["fold"]), *(_shown(row["metrics"].get(label)) for label in self.labels)]
            for row in cases
        ]
        lines = [self.table(), "", *_aligned([["case", "fold", *self.labels], *table])]
        lines += ["", *(f"failed: {name}" for name in self.failed)] if self.failed else []
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values; non-finite values become null."""
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
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def write_scores(scores: Scores, path: Path) -> None:
    """Write scores to a JSON file and, next to it, to a text file."""
    replace_text(path, json.dumps(scores.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    replace_text(path.with_suffix(".txt"), scores.to_text())


def read_scores(place: Path) -> Scores:
    """Read the scores of a run.

    Args:
        place: Folder of a cross-validation, of an evaluated bundle or of the output of `medseg evaluate`, or the
            `cross_validation.json` or `manifest.json` in one of these.

    Raises:
        RequestError: No scores at `place`, or a malformed file.
    """
    candidates = (place / CROSS_VALIDATION, place / "runs" / "evaluate" / "manifest.json", place / "manifest.json")
    path = place if place.is_file() else next((file for file in candidates if file.is_file()), None)
    if path is None:
        raise RequestError(
            f"No scores in '{place}'. Pass the folder of a cross-validation (`medseg train --folds`), of an evaluated "
            "bundle, or of the output of `medseg evaluate`."
        )
    return _from_table(place, path) if path.name == CROSS_VALIDATION else _from_manifest(place, path)


def _from_table(place: Path, path: Path) -> Scores:
    content = load_json(path)
    try:
        rows = tuple({key: row[key] for key in ("case", "patient", "fold", "metrics")} for row in content["cases"])
        return Scores(_title(place), int(content["folds"]), rows, tuple(content["failed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"Malformed scores: {path} is not a table of a cross-validation ({error!r}). Write it again with `medseg "
            "train --folds`."
        ) from error


def _from_manifest(place: Path, path: Path) -> Scores:
    manifest = Manifest.read(path)
    rows = tuple(
        {"case": record.name, "patient": record.name, "fold": 0, "metrics": record.metrics}
        for record in manifest.cases.values()
        if record.status == "done" and record.metrics
    )
    if not rows:
        raise RequestError(f"No scored cases in {path}. Pass the manifest of a `medseg evaluate` with labels.")
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
