"""Folds: patients stay together, sizes are even, the result is the same everywhere."""

from __future__ import annotations

import random

import pytest

from medseg.errors import RequestError
from medseg.training.splits import patient_folds

CASES = [f"case_{number:02d}" for number in range(23)]
# Patients with 6, 3, 2 and 1 cases.
PATIENTS = dict.fromkeys(CASES[:6], "big") | dict.fromkeys(CASES[6:9], "middle") | {CASES[9]: "x", CASES[10]: "x"}


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_each_case_is_in_one_fold_and_each_patient_too(folds: int) -> None:
    dealt = patient_folds(CASES, PATIENTS, folds, seed=0)
    assert sorted(case for fold in dealt for case in fold) == CASES
    for patient in ("big", "middle", "x"):
        assert sum(any(PATIENTS.get(case) == patient for case in fold) for fold in dealt) == 1


@pytest.mark.parametrize("seed", range(5))
def test_folds_have_about_the_same_size(seed: int) -> None:
    sizes = [len(fold) for fold in patient_folds(CASES, PATIENTS, 3, seed)]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_of_the_cases_does_not_matter_and_the_seed_does() -> None:
    shuffled = list(CASES)
    random.Random(1).shuffle(shuffled)
    assert patient_folds(shuffled, PATIENTS, 3, seed=0) == patient_folds(CASES, PATIENTS, 3, seed=0)
    assert patient_folds(CASES, PATIENTS, 3, seed=1) != patient_folds(CASES, PATIENTS, 3, seed=0)


def test_the_deal_never_changes_between_versions() -> None:
    assert patient_folds("abcdef", {}, 3, seed=7) == [["a", "e"], ["c", "f"], ["b", "d"]]


@pytest.mark.parametrize(
    ("cases", "folds", "message"),
    [
        (CASES, 1, "cross-validation with 1 folds is not possible"),
        (CASES[:7], 3, "at most 2 folds"),
        ([], 2, "at most 0 folds"),
    ],
)
def test_impossible_folds_are_refused(cases: list[str], folds: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        patient_folds(cases, PATIENTS, folds, seed=0)
