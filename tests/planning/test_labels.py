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


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"1": ["liver", "organ"]}, {1: "liver"}),
        ({"1": []}, {1: "[]"}),
        ({"-1": "void", "1": "liver"}, {-1: "void", 1: "liver"}),
        ({1: "liver"}, {1: "liver"}),
        ({"liver": 1, "checked": True, "weight": 0.5, "note": None}, {1: "liver"}),
        ({"12": 3}, {12: "3"}),
        (["background", "liver"], {}),
        ("liver", {}),
        ({}, {}),
    ],
)
def test_names_are_read_from_what_listings_hold(labels: Any, names: dict[int, str]) -> None:
    assert names_of_labels({"labels": labels}) == names


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ({"background": 0, "whole tumor": [1, 2]}, "whole tumor"),
        ({"background": 0, "IGNORE": 4}, "IGNORE"),
        ({"ignore": [3]}, "ignore"),
    ],
)
def test_a_refused_label_is_named(labels: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named) as error:
        names_of_labels({"labels": labels})
    assert "dataset.json" in str(error.value)


def test_a_listing_without_labels_names_none() -> None:
    assert names_of_labels({}) == {}
    assert names_of_labels({"modality": {"0": "CT"}}) == {}


def test_named_classes_that_no_case_holds_are_kept_and_reported() -> None:
    names = {0: "void", 1: "liver", 2: "spleen", 5: "cyst"}
    found = classes_of(fingerprint(case({0: 5, 2: 5}), names=names))
    assert found.labels == {"0": "void", "1": "liver", "2": "spleen", "3": "cyst"}
    assert found.mapping == {"0": 0, "1": 1, "2": 2, "5": 3}
    missing = found.reason.rpartition(";")[2]
    for value in ("1 (liver)", "5 (cyst)"):
        assert value in missing
    assert "spleen" not in missing


def test_background_needs_no_name() -> None:
    found = classes_of(fingerprint(case({0: 5, 1: 5}), names={1: "liver"}))
    assert found.labels == {"0": "background", "1": "liver"}
    assert found.is_plain


@pytest.mark.parametrize(
    ("counts", "kind"),
    [
        # Two values, or three in few cases, may well be organs.
        ([2, 2, 1], "classes"),
        ([3, 2, 1], "classes"),
        ([7, 3, 2, 1], "classes"),
        ([8, 3, 2, 1], "objects"),
        ([3, 2, 1, 3, 2, 1, 3, 2], "objects"),
        # The same organs everywhere, up to whole-body maps of them.
        ([20] * 9, "classes"),
        ([31] * 9, "classes"),
        ([32] * 9, "objects"),
        ([20] * 8 + [12], "classes"),
        ([20] * 8 + [10], "objects"),
    ],
)
def test_values_count_objects_if_they_are_many_and_their_number_varies(counts: list[int], kind: str) -> None:
    assert classes_of(fingerprint(*(case(numbered(n)) for n in counts))).kind == kind


@pytest.mark.parametrize(("gaps", "kind"), [(1, "objects"), (2, "classes")])
def test_one_case_in_ten_may_have_a_gap_in_its_numbers(gaps: int, kind: str) -> None:
    cases = [case(numbered(n)) for n in range(5, 15 - gaps)]
    with_gap = {value: count for value, count in numbered(9).items() if value != 4}
    assert classes_of(fingerprint(*cases, *[case(with_gap)] * gaps)).kind == kind


@pytest.mark.parametrize(("single", "kind"), [(7, "objects"), (6, "classes")])
def test_most_numbered_objects_are_one_piece(single: int, kind: str) -> None:
    cases = [case(numbered(10), single=single), case({0: 50, **dict.fromkeys(range(1, 21), 5)}, single=2 * single)]
    assert classes_of(fingerprint(*cases)).kind == kind


def test_empty_labels_do_not_count_as_cases_without_objects() -> None:
    found = classes_of(fingerprint(case({0: 100}), *(case(numbered(n)) for n in (4, 9, 15, 2)), case({0: 100})))
    assert found.kind == "objects"
    assert "2 to 15" in found.reason


def test_two_values_are_called_foreground_and_more_are_numbered() -> None:
    two = classes_of(fingerprint(case({0: 90, 1: 10})))
    assert (two.labels, two.kind) == ({"0": "background", "1": "foreground"}, "two values")
    more = classes_of(fingerprint(case({0: 90, 1: 5}), case({0: 90, 3: 10})))
    assert more.labels == {"0": "background", "1": "label 1", "2": "label 3"}
    assert more.mapping == {"0": 0, "1": 1, "3": 2}


@pytest.mark.parametrize(("inside", "said"), [(49, False), (51, True)])
def test_foreground_of_more_than_half_is_pointed_out(inside: int, said: bool) -> None:
    reason = classes_of(fingerprint(case({0: 100 - inside, 1: inside}))).reason
    assert (reason.count(";") == 2 or "half" in reason) == said
    assert f"{inside}%" in reason


def test_a_long_list_of_values_is_cut_short() -> None:
    cases = [case({0: 50, **dict.fromkeys(range(10, 90, 10), 5)})] * 3
    reason = classes_of(fingerprint(*cases)).reason
    assert "0, 10, 20, 30 and 5 more" in reason
    with pytest.raises(RequestError, match="10, 20, 30, 40 and 3 more"):
        classes_of(fingerprint(*cases, names={1: "liver", 80: "spleen"}))


def test_the_first_case_with_a_bad_value_is_named() -> None:
    good = case({0: 5, 1: 5}, name="good")
    for values, names in (({-3: 1, 0: 5}, {}), ({0: 5, 9: 1}, {1: "liver"})):
        with pytest.raises(RequestError, match="bad") as error:
            classes_of(fingerprint(good, case(values, name="bad"), case(values, name="later"), names=names))
        assert "later" not in str(error.value)
        assert str(min(values) if min(values) < 0 else 9) in str(error.value)
