"""Cross-validation splits that keep the cases of a patient together."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from medseg.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["patient_folds"]


def patient_folds(cases: Iterable[str], patients: Mapping[str, str], folds: int, seed: int) -> list[list[str]]:
    """Split cases into folds of similar size, with all cases of a patient in the same fold.

    The result depends only on the arguments, not on the order of the cases, the machine or the version of Python, so
    independent jobs obtain the same folds.

    Args:
        cases: Unique names of the cases.
        patients: Patient of each case; a case without an entry is treated as a separate patient.
        folds: Number of folds, at least 2.
        seed: Seed of the split.

    Returns:
        Sorted cases of each fold.

    Raises:
        RequestError: Fewer than two folds, or fewer patients than folds.
    """
    groups: dict[str, list[str]] = {}
    for case in sorted(cases):
        groups.setdefault(patients.get(case, case), []).append(case)
    if folds < 2:
        raise RequestError(f"cross-validation with {folds} folds is not possible: use at least 2.")
    if len(groups) < folds:
        raise RequestError(
            f"too few patients for {folds} folds: found {len(groups)} with {sum(map(len, groups.values()))} cases; "
            f"use at most {len(groups)} folds."
        )
    dealt: list[list[str]] = [[] for _ in range(folds)]
    counts = [0] * folds
    # Patients with many cases first, so that those with few balance the folds.
    for patient in sorted(groups, key=lambda name: (-len(groups[name]), _shuffled(name, seed))):
        smallest = min(range(folds), key=lambda number: (len(dealt[number]), counts[number], number))
        dealt[smallest] += groups[patient]
        counts[smallest] += 1
    return [sorted(fold) for fold in dealt]


def _shuffled(name: str, seed: int) -> str:
    """Return a reproducible random sort key."""
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()
