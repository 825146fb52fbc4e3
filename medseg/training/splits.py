"""Cross-validation splits that keep the cases of a patient together."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["patient_folds"]


def patient_folds(cases: Iterable[str], patients: Mapping[str, str], folds: int, seed: int) -> list[list[str]]:
    """Deal cases into folds: no patient in two, about the same number of cases in each.

    The result depends on the arguments alone, not on the order of the cases, the machine or the version of Python, so
    jobs that are started apart agree on it.

    Args:
        cases: names, each once.
        patients: case -> patient; a case that is not in it is a patient of its own.
        folds: how many, at least 2.
        seed: which of the many ways to deal.

    Returns:
        The cases of each fold, sorted.

    Raises:
        RequestError: fewer than two folds, or fewer patients than folds.
    """
    groups: dict[str, list[str]] = {}
    for case in sorted(cases):
        groups.setdefault(patients.get(case, case), []).append(case)
    if folds < 2:
        raise RequestError(f"{folds} folds are no cross-validation: ask for 2 or more.")
    if len(groups) < folds:
        raise RequestError(
            f"{folds} folds need as many patients, found {len(groups)} with {sum(map(len, groups.values()))} cases: "
            f"ask for at most {len(groups)} folds."
        )
    dealt: list[list[str]] = [[] for _ in range(folds)]
    counts = [0] * folds
    # Large patients first, so that the small ones even out what these leave uneven.
    for patient in sorted(groups, key=lambda name: (-len(groups[name]), _shuffled(name, seed))):
        smallest = min(range(folds), key=lambda number: (len(dealt[number]), counts[number], number))
        dealt[smallest] += groups[patient]
        counts[smallest] += 1
    return [sorted(fold) for fold in dealt]


def _shuffled(name: str, seed: int) -> str:
    """A key whose order is random, and the same wherever it is computed."""
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()
