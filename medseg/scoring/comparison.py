"""Which of several scored bundles is the best, and how sure that is: paired differences with intervals."""

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
# Of fewer patients all differences have the same sign by chance alone in over 5 %, and no draw could then hold zero.
_FEWEST: Final = 6


@dataclass(frozen=True)
class Standing:
    """One run in the table.

    Attributes:
        name: of its folder.
        mean: of the cases' mean Dice.
        sd: standard deviation of it over the cases; None for a single case.
        labels: label -> mean Dice over the cases that have it.
    """

    name: str
    mean: float
    sd: float | None
    labels: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """How much better the best run is than another one, on the same cases.

    Attributes:
        name: the other run.
        mean: of the paired differences of the cases' mean Dice, best minus other.
        low: lower end of the 95 % interval of this mean, a percentile bootstrap over patients.
        high: its upper end.
        better: share of the cases in which the best run is the better one; ties count half.
    """

    name: str
    mean: float
    low: float
    high: float
    better: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, on the cases that all of them have scored.

    Attributes:
        cases: how many those are.
        patients: of how many patients.
        left_out: cases that not all runs have scored.
        standings: best first.
        differences: between the best run and each of the others, in the order of `standings`.
    """

    cases: int
    patients: int
    left_out: tuple[str, ...]
    standings: tuple[Standing, ...]
    differences: tuple[Difference, ...]

    @property
    def verdict(self) -> str:
        """One sentence: which run is the best, and whether that is clear."""
        best = self.standings[0]
        if self.patients < _FEWEST:
            return (
                f"best: {best.name} (mean Dice {best.mean:.4f}); whether that is clear cannot be told from cases of "
                f"{self.patients} patients, since the intervals of fewer than {_FEWEST} are too narrow: score more"
            )
        unclear = [each.name for each in self.differences if not each.is_clear]
        if not unclear:
            return f"best: {best.name} (mean Dice {best.mean:.4f}); the differences to all others are clear"
        return (
            f"best: {best.name} (mean Dice {best.mean:.4f}); that it is better than {', '.join(unclear)} is not clear, "
            "since the interval of the difference holds zero: take the one that is smaller or faster"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return {**asdict(self), "best": self.standings[0].name, "verdict": self.verdict}


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Compare scored runs on the cases that they share.

    Args:
        runs: Two or more folders of cross-validations or evaluated bundles, or their manifests.

    Returns:
        The runs, best first, with the paired differences from the best and their confidence intervals.

    Raises:
        RequestError: Fewer than two runs, one without scores, or no cases that all have scored.
    """
    if len(runs) < 2:
        raise RequestError("give two runs or more to compare", found=len(runs), expected=2)
    found = _named([read_scores(Path(place)) for place in runs], runs)
    tables = {name: _by_case(scores) for name, scores in found.items()}
    everything = sorted({case for table in tables.values() for case in table})
    shared = [case for case in everything if all(case in table for table in tables.values())]
    if not shared:
        raise RequestError(
            f"{', '.join(found)} have no scored case in common: compare runs on the same data set and the same cases"
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
    """Name runs by their folder, and where two share that by what was given."""
    short = [each.name for each in scores]
    names = short if len(set(short)) == len(short) else [str(place) for place in places]
    if len(set(names)) < len(names):
        raise RequestError("a run is given twice: give each once")
    return dict(zip(names, scores, strict=True))


def _by_case(scores: Scores) -> dict[str, float]:
    means = {row["case"]: row["metrics"].get(MEAN) for row in scores.rows}
    return {case: float(value) for case, value in means.items() if isinstance(value, int | float)}


def _patients(runs: Any) -> dict[str, str]:
    """Patients of the cases, from the runs that know them."""
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
    """Draw patients with all their cases, since the cases of one patient are no independent evidence."""
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
