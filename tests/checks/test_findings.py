"""Each finding about one bundle or one set, beside its nearest neighbors that are none; facts are written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.checks.dataset_checks import Examined, check_set
from medseg.checks.subjects import Collection, Finding, Subject
from medseg.checks.suitability import Needs, check_case, check_suitability
from medseg.io.geometry import Grid
from medseg.io.survey import FileFacts

COLLECTION = Collection(Path("set"), ())
NEEDS = Needs(
    name="organs",
    spatial_dims=3,
    channels=1,
    mapping={"0": 0, "1": 1, "2": 2},
    modality="CT",
    classes={1: "left kidney", 2: "spleen"},
    spacing=(1.0, 1.0, 3.0),
)
FACTS = FileFacts(
    file="a.nii.gz",
    format="nifti",
    shape=(40, 50, 20),
    channels=1,
    spacing=(1.0, 1.0, 3.0),
    orientation="RAS",
    dtype="int16",
    minimum=-1000.0,
    percentiles=(-990.0, 20.0, 400.0),
    maximum=1500.0,
    nonfinite=0,
    labels={},
    digest="a",
    grid=Grid((40, 50, 20), np.diag([1.0, 1.0, 3.0, 1.0])),
)
LABEL = replace(
    FACTS, file="l.nii.gz", digest="l", minimum=0.0, maximum=2.0, percentiles=(), labels={0: 900, 1: 50, 2: 50}
)


def case(name: str, part: str = "train", *, label: FileFacts | None = LABEL, **facts: Any) -> Examined:
    """Return an examined case with an image and a label of its own."""
    image = replace(FACTS, **{"file": name, "digest": f"image {name}", **facts})
    own = label and replace(label, digest=f"label {name}" if label is LABEL else label.digest)
    return Examined(Subject(name, f"{name}.nii.gz", f"{name}_label.nii.gz", part), image, own)


def of_case(needs: Needs = NEEDS, **facts: Any) -> list[Finding]:
    return list(check_case(Subject("a", "a.nii.gz"), COLLECTION, replace(FACTS, **facts), needs))


def of_set(*cases: Examined, **collection: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    found = check_set(cases, replace(COLLECTION, **collection))
    return [(item.severity, item.kind, item.cases) for item in found]


def suits(needs: Needs, *cases: Examined, **collection: Any) -> list[tuple[str, str]]:
    return [(item.severity, item.kind) for item in check_suitability(cases, replace(COLLECTION, **collection), needs)]


def test_a_case_of_the_bundles_kind_has_no_finding() -> None:
    assert of_case() == []
    assert of_case(replace(NEEDS, spacing=None, intensity_range=(-200.0, 300.0)), modality="CT") == []


@pytest.mark.parametrize(
    ("spacing", "found"),
    [
        ((1.99, 1.0, 3.0), False),
        ((2.0, 1.0, 3.0), True),
        ((1.0, 1.0, 6.0), True),
        ((0.34, 1.0, 3.0), False),
        ((0.33, 1.0, 3.0), True),
        ((1.0, 1.0, 1.0), True),
        ((1.0, 1.0, 1.01), False),
    ],
)
def test_voxels_twice_as_long_or_a_third_are_far(spacing: tuple[float, ...], found: bool) -> None:
    findings = of_case(spacing=spacing)
    assert [(item.severity, item.cases) for item in findings] == ([("warning", ("a",))] if found else [])


@pytest.mark.parametrize(
    ("orientation", "spacing", "found"),
    [
        ("LPI", (1.0, 1.0, 3.0), False),
        ("SAR", (3.0, 1.0, 1.0), False),
        ("IPL", (3.0, 1.0, 1.0), False),
        ("SAR", (1.0, 1.0, 3.0), True),
        ("", (9.0, 9.0, 9.0), False),
    ],
)
def test_voxels_are_compared_along_the_axes_of_the_body(
    orientation: str, spacing: tuple[float, ...], found: bool
) -> None:
    assert bool(of_case(orientation=orientation, spacing=spacing)) == found


@pytest.mark.parametrize(
    ("percentiles", "found"),
    [
        ((-990.0, 20.0, 400.0), False),
        ((300.0, 310.0, 400.0), True),
        ((299.0, 310.0, 400.0), False),
        ((-900.0, -500.0, -200.0), True),
        ((-900.0, -500.0, -199.0), False),
        ((), False),
    ],
)
def test_a_window_that_misses_nearly_all_values_is_found(percentiles: tuple[float, ...], found: bool) -> None:
    findings = of_case(replace(NEEDS, intensity_range=(-200.0, 300.0)), percentiles=percentiles)
    assert [item.severity for item in findings] == (["warning"] if found else [])
    assert of_case(percentiles=percentiles) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ("CT", "MR", True),
        ("CT", "CT", False),
        ("MRI", "MR", False),
        ("T1 MRI", "CT", True),
        ("CT", "", False),
        ("", "CT", False),
        ("CT", "PT", False),
        ("microscopy", "CT", False),
        ("ct", "mri", True),
        ("FACT", "MR", False),
    ],
)
def test_ct_and_mr_are_told_apart_and_nothing_else(ours: str, theirs: str, found: bool) -> None:
    needs = replace(NEEDS, modality=ours)
    assert [item.severity for item in of_case(needs, modality=theirs)] == (["error"] if found else [])
    assert suits(needs, modality=theirs) == ([("error", "modality mismatch")] if found else [])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("left kidney", None),
        ("kidney_left", None),
        ("Kidney-Left", None),
        ("leftkidney", None),
        ("spleen", "error"),
        ("liver", "note"),
    ],
)
def test_a_name_of_another_class_is_an_error_and_an_unknown_one_a_note(name: str, found: str | None) -> None:
    findings = suits(NEEDS, case("a"), labels={0: "spleen", 1: name})
    assert [severity for severity, _ in findings] == ([found] if found else [])


def test_names_of_values_that_the_bundle_does_not_take_are_left_alone() -> None:
    assert suits(NEEDS, case("a"), labels={7: "spleen"}) == []
    assert suits(replace(NEEDS, mapping=None), case("a"), labels={1: "spleen"}) == []


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ((("train", {0: 9, 1: 1, 2: 1}),), False),
        ((("train", {0: 9, 1: 1}), ("train", {0: 9, 2: 1})), False),
        ((("train", {0: 9, 1: 1}), ("val", {0: 9, 2: 1})), True),
        ((("train", {0: 9, 1: 1}),), True),
        ((("val", {0: 9, 1: 1, 2: 1}),), False),
        ((), False),
    ],
)
def test_a_class_has_to_be_in_a_training_case(parts: Any, found: bool) -> None:
    cases = [case(str(n), part, label=replace(LABEL, labels=labels)) for n, (part, labels) in enumerate(parts)]
    assert suits(NEEDS, *cases) == ([("warning", "missing class")] if found else [])
    assert suits(replace(NEEDS, mapping=None), *cases) == []


def test_what_a_bundle_takes_follows_from_its_mapping() -> None:
    assert NEEDS.labels == {0, 1, 2}
    assert [NEEDS.class_of(value) for value in (0, 2, 5)] == [0, 2, None]
    objects = replace(NEEDS, mapping={"0": 0, "other": 1})
    assert objects.labels is None
    assert [objects.class_of(value) for value in (0, 2, 500)] == [0, 1, 1]
    assert replace(NEEDS, mapping=None).labels is None


def test_copies_are_found_in_groups_and_leak_across_the_split() -> None:
    same = [case(name, digest="one") for name in "abc"]
    assert of_set(*same) == [("warning", "duplicate", ("a", "b", "c"))]
    assert of_set(*same, case("d", "val", digest="one")) == [("error", "leak", ("a", "b", "c", "d"))]
    assert of_set(case("a"), case("b", "val")) == []


@pytest.mark.parametrize(("equal_labels", "repair"), [(True, "duplicate"), (False, "")])
def test_copies_can_be_repaired_if_their_labels_are_equal(equal_labels: bool, repair: str) -> None:
    cases = [case(name, digest="one", label=replace(LABEL, digest="x" if equal_labels else name)) for name in "ab"]
    (finding,) = check_set(cases, COLLECTION)
    assert finding.repair == repair


def test_constant_images_and_empty_labels_are_no_copies() -> None:
    flat = [case(name, digest="flat", minimum=0.0, maximum=0.0) for name in "ab"]
    assert of_set(*flat) == []
    empty = [case(name, label=replace(LABEL, digest="empty", labels={0: 1000})) for name in "ab"]
    assert of_set(*empty) == []
    marked = [case(name, label=replace(LABEL, digest="marked")) for name in "ab"]
    assert of_set(*marked) == [("warning", "identical labels", ("a", "b"))]


def test_a_patient_may_not_stand_on_both_sides() -> None:
    assert of_set(case("x", patient="p"), case("y", "val", patient="p")) == [("error", "patient", ("x", "y"))]
    assert of_set(case("x", patient="p"), case("y", patient="p")) == []
    assert of_set(case("x", patient="p"), case("y", "val", patient="q")) == []
    by_name = of_set(case("sub-01_ses-1"), case("sub-01_ses-2", "val"))
    assert by_name == [("warning", "patient", ("sub-01_ses-1", "sub-01_ses-2"))]


@pytest.mark.parametrize(("usual", "found"), [(3, False), (4, True)])
def test_an_unusual_spacing_needs_five_volumes_to_be_seen(usual: int, found: bool) -> None:
    cases = [case(f"c{n}") for n in range(usual)]
    findings = of_set(*cases, case("odd", spacing=(4.0, 1.0, 3.0)))
    assert findings == ([("warning", "unusual spacing", ("odd",))] if found else [])


@pytest.mark.parametrize(("length", "found"), [(170, False), (190, True)])
def test_an_extent_is_unusual_at_three_times_the_median(length: int, found: bool) -> None:
    cases = [case(f"c{n}") for n in range(5)]
    findings = of_set(*cases, case("long", shape=(length, 50, 20)))
    assert findings == ([("warning", "unusual extent", ("long",))] if found else [])


def test_a_spread_of_spacings_makes_none_of_them_unusual() -> None:
    steps = (1.0, 1.5, 2.2, 3.0, 4.0, 5.0)
    spread = [case(f"c{n}", spacing=(step, step, step)) for n, step in enumerate(steps)]
    assert of_set(*spread) == []


@pytest.mark.parametrize(("turned", "found"), [(1, True), (2, True), (3, False)])
def test_an_orientation_is_unusual_if_four_fifths_have_another(turned: int, found: bool) -> None:
    names = [f"c{n}" for n in range(10)]
    cases = [case(name, orientation="LPS" if n < turned else "RAS") for n, name in enumerate(names)]
    assert of_set(*cases) == ([("note", "unusual orientation", tuple(names[:turned]))] if found else [])


def test_a_named_label_that_no_case_holds_is_noted() -> None:
    named = {0: "background", 1: "liver", 5: "cyst"}
    (finding,) = check_set([case("a"), case("b")], replace(COLLECTION, labels=named))
    assert (finding.severity, finding.kind) == ("note", "unused label")
    assert "5 (cyst)" in finding.message
    assert "liver" not in finding.message
    assert of_set(case("a", label=None), labels=named) == []
