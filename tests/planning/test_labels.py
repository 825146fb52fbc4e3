"""What label values mean."""

from __future__ import annotations

from typing import Any

import pytest

from medseg.errors import RequestError
from medseg.planning.case_stats import CaseStats, Fingerprint
from medseg.planning.labels import classes_of, names_of_labels


def case(values: dict[int, int], *, single: int | None = None, name: str = "a") -> CaseStats:
    marked = [value for value in values if value > 0]
    return CaseStats(
        name=name,
        shape=(10, 10),
        spacing=(),
        orientation="",
        dtype="uint8",
        channels=1,
        color=False,
        low=0,
        high=255,
        percentiles=(1, 100, 250),
        modality="",
        microns=0.0,
        values=values,
        distinct=len(marked),
        contiguous=marked == list(range(1, len(marked) + 1)),
        objects=len(marked),
        single=len(marked) if single is None else single,
        object_sizes=(1.0, 2.0, 3.0),
    )


def fingerprint(*cases: CaseStats, names: dict[int, str] | None = None) -> Fingerprint:
    return Fingerprint("set", "key", 1, names or {}, (), cases, ())


def numbered(count: int) -> dict[int, int]:
    return {0: 50, **dict.fromkeys(range(1, count + 1), 5)}


def test_numbers_of_objects_become_one_class() -> None:
    found = classes_of(fingerprint(*(case(numbered(n)) for n in (4, 9, 15, 2))))
    assert found.mapping == {"0": 0, "other": 1}
    assert found.labels == {"0": "background", "1": "object"}
    for number in ("100%", "2 to 15"):
        assert number in found.reason


@pytest.mark.parametrize(
    "cases",
    [
        [case(numbered(5)) for _ in range(6)],
        [case({0: 5, 1: 3, 3: 4}), case({0: 5, 2: 3, 3: 4}), case({0: 5, 1: 4})],
        [case(numbered(n), single=0) for n in (3, 9, 15)],
    ],
    ids=["the same everywhere", "with gaps", "in many pieces"],
)
def test_numbers_of_classes_stay_apart(cases: list[CaseStats]) -> None:
    found = classes_of(fingerprint(*cases))
    assert found.kind == "classes"
    assert "other" not in found.mapping


def test_names_settle_that_numbers_are_classes() -> None:
    names = {value: f"organ {value}" for value in range(16)}
    found = classes_of(fingerprint(*(case(numbered(n)) for n in (4, 9, 15, 2)), names=names))
    assert found.kind == "classes"
    assert found.labels["15"] == "organ 15"
    assert found.is_plain


def test_0_and_255_are_two_classes() -> None:
    found = classes_of(fingerprint(case({0: 23, 255: 77})))
    assert found.mapping == {"0": 0, "255": 1}
    assert "255" in found.reason
    assert "more than half" in found.reason


def test_values_with_gaps_are_counted_through() -> None:
    found = classes_of(fingerprint(case({0: 50, 2: 10, 7: 4}), names={2: "liver", 7: "spleen"}))
    assert found.mapping == {"0": 0, "2": 1, "7": 2}
    assert found.labels == {"0": "background", "1": "liver", "2": "spleen"}
    assert not found.is_plain


def test_labels_without_0_take_the_lowest_as_background() -> None:
    found = classes_of(fingerprint(case({1: 50, 2: 10})))
    assert found.mapping == {"1": 0, "2": 1}
    assert "background" in found.reason


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ({0: 5}, {}, "contain only the value 0"),
        ({-1: 3, 0: 5, 1: 2}, {}, "-1 in the label of bad"),
        ({0: 5, 1: 2, 4: 1}, {1: "liver"}, "4 in the label of bad, while dataset.json names only 1"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[int, int], names: dict[int, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        classes_of(fingerprint(case(values, name="bad"), names=names))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"0": "background", "1": "liver"}, {0: "background", 1: "liver"}),
        ({"background": 0, "liver": 1}, {0: "background", 1: "liver"}),
        (None, {}),
    ],
)
def test_both_ways_to_write_names(labels: Any, names: dict[int, str]) -> None:
    assert names_of_labels({"labels": labels}) == names


@pytest.mark.parametrize("labels", [{"background": 0, "whole": [1, 2]}, {"background": 0, "ignore": 3}])
def test_regions_and_ignored_labels_are_refused(labels: Any) -> None:
    with pytest.raises(RequestError, match="exclusive classes"):
        names_of_labels({"labels": labels})
