"""Ranking of scored bundles by paired differences with confidence intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import RequestError
from medseg.scoring.scores import MEAN, Scores, read_scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Comparison", "Difference", "Standing", "compare"]

_SAMPLES: Final = 10_000
_SEED: Final = 0
_INTERVAL: Final = (2.5, 97.5)
# With fewer patients, all differences have the same sign by chance in over 5%, and no interval would then contain 0.
_FEWEST: Final = 6


@dataclass(frozen=True)
class Standing:
    """The scores of one run.

    Attributes:
        name: Name of its folder.
        mean: Mean over the cases of their mean Dice.
        sd: Standard deviation over the cases of their mean Dice; None for a single case.
        labels: Mean Dice of each label over the cases that contain it.
    """

    name: str
    mean: float
    sd: float | None
    labels: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """Paired difference between the best run and another one.

    Attributes:
        name: Name of the other run.
        mean: Mean difference of the cases' mean Dice, best minus other.
        low: Lower end of the 95% confidence interval of the mean difference, by percentile bootstrap over patients.
        high: Upper end of that interval.
        better: Fraction of the cases in which the best run has the higher Dice; ties count half.
    """

    name: str
    mean: float
    low: float
    high: float
    better: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Comparison of runs on the cases that all of them have scored.

    Attributes:
        cases: Number of these cases.
        patients: Number of their patients.
        left_out: Names of the cases that not all runs have scored.
        standings: Runs, best first.
        differences: Difference between the best run and each of the others, in the order of `standings`.
    """

    cases: int
    patients: int
    left_out: tuple[str, ...]
    standings: tuple[Standing, ...]
    differences: tuple[Difference, ...]

    @property
    def verdict(self) -> str:
        """Sentence that names the best run and states whether its lead is significant."""
        best = self.standings[0]
        if self.patients < _FEWEST:
            return (
                f"best: {best.name} (mean Dice {best.mean:.4f}); {self.patients} patients are too few for a reliable "
                f"interval: score at least {_FEWEST}"
            )
        unclear = [each.name for each in self.differences if not each.is_clear]
        if not unclear:
            return f"best: {best.name} (mean Dice {best.mean:.4f}); the difference from every other run is significant"
        return (
            f"best: {best.name} (mean Dice {best.mean:.4f}); the difference from {', '.join(unclear)} is not "
            "significant (the interval contains 0): prefer the smaller or faster bundle"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values, with the best run and the verdict."""
        return {**asdict(self), "best": self.standings[0].name, "verdict": self.verdict}


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Compare scored runs on the cases that they share.

    Args:
        runs: Two or more folders of cross-validations or evaluated bundles, or their manifests.

    Returns:
        The runs, best first, with the paired differences from the best and their confidence intervals.

    Raises:
        RequestError: Fewer than two runs, a run without scores, or no case that all runs have scored.
    """
    if len(runs) < 2:
        raise RequestError("Nothing to compare: expected two or more runs.", found=len(runs), expected=2)
    found = _named([read_scores(Path(place)) for place in runs], runs)
    tables = {name: _by_case(scores) for name, scores in found.items()}
    everything = sorted({case for table in tables.values() for case in table})
    shared = [case for case in everything if all(case in table for table in tables.values())]
    if not shared:
        raise RequestError(
            f"No common cases: {', '.join(found)} have scored different cases. Compare runs on the same data set and "
            "split."
        )
    patients = _patients(found.values())
    standings = sorted((_standing(name, found[name], table, shared) for name, table in tables.items()), key=_rank)
    groups = [patients.get(case, case) for case in shared]
    best = tables[standings[0].name]
    differences = tuple(
        _difference(other.name, [best[case] - tables[other.name][case] for case in shared], groups)
        for other in standings[1:]
    )
    left_out = tuple(case for case in everything if case not in set(shared))
    return Comparison(len(shared), len(set(groups)), left_out, tuple(standings), differences)


def _named(scores: Sequence[Scores], places: Sequence[str | Path]) -> dict[str, Scores]:
    """Name runs by their folders, or by the given paths if folder names repeat."""
    short = [each.name for each in scores]
    names = short if len(set(short)) == len(short) else [str(place) for place in places]
    if len(set(names)) < len(names):
        raise RequestError("Duplicate run: the same folder is given twice. Pass each run once.")
    return dict(zip(names, scores, strict=True))


def _by_case(scores: Scores) -> dict[str, float]:
    means = {row["case"]: row["metrics"].get(MEAN) for row in scores.rows}
    return {case: float(value) for case, value in means.items() if isinstance(value, int | float)}


def _patients(runs: Any) -> dict[str, str]:
    """Return the patient of each case, from the runs that record patients."""
    return {row["case"]: row["patient"] for scores in runs for row in scores.rows if row["patient"] != row["case"]}


def _standing(name: str, scores: Scores, table: Mapping[str, float], shared: Sequence[str]) -> Standing:
    values = [table[case] for case in shared]
    wanted = set(shared)
    only = Scores(name, scores.folds, tuple(row for row in scores.rows if row["case"] in wanted))
    labels = {label: fmean(known) for label in only.labels if label != MEAN and (known := only.values(label))}
    return Standing(name, fmean(values), stdev(values) if len(values) > 1 else None, labels)


def _rank(standing: Standing) -> tuple[float, str]:
    return -standing.mean, standing.name


def _difference(name: str, values: Sequence[float], patients: Sequence[str]) -> Difference:
    """Resample patients with all their cases, because the cases of a patient are not independent."""
    import numpy as np

    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    index = np.array([numbers[patient] for patient in patients])
    sums = np.bincount(index, weights=np.array(values))
    counts = np.bincount(index).astype(float)
    rng = np.random.default_rng(_SEED)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=_SAMPLES)
    means = (drawn @ sums) / (drawn @ counts)
    low, high = np.percentile(means, _INTERVAL)
    better = fmean(1.0 if value > 0 else 0.5 if value == 0 else 0.0 for value in values)
    return Difference(name, fmean(values), float(low), float(high), better)
