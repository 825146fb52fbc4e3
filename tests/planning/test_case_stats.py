"""Statistics over the cases of a data set, against numpy, and their way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.planning.case_stats import Fingerprint, quantile, shown
from tests.planning.synthetic import color_image, fingerprint, image, volume

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
FLOATS = st.floats(-1e6, 1e6)
SHAPES = st.lists(st.tuples(*[st.integers(1, 400)] * 3), min_size=1, max_size=9)
SPACINGS = st.tuples(*[st.floats(0.2, 6.0)] * 3)


@PROPERTY
@given(st.lists(FLOATS, min_size=1, max_size=30), st.floats(0, 1))
def test_a_quantile_is_that_of_numpy(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-6)


@PROPERTY
@given(SHAPES)
def test_the_median_size_is_that_of_numpy_per_axis(shapes: list[tuple[int, ...]]) -> None:
    found = fingerprint(*(volume(shape=shape) for shape in shapes))
    assert found.median_shape() == tuple(np.rint(np.median(shapes, axis=0)))


@PROPERTY
@given(SHAPES, SPACINGS, SPACINGS)
def test_resampling_keeps_the_extent_in_millimeters(
    shapes: list[tuple[int, ...]], own: tuple[float, ...], new: tuple[float, ...]
) -> None:
    found = fingerprint(*(volume(shape=shape, spacing=own) for shape in shapes))
    for before, after in zip(shapes, found.shapes(new), strict=True):
        for n, m, old, step in zip(before, after, own, new, strict=True):
            assert m >= 1
            assert abs(m * step - n * old) <= step / 2 + 1e-6 or m == 1


def test_spacings_are_taken_per_axis() -> None:
    spacings = [(1.0, 0.5, 3.0), (2.0, 0.7, 1.0), (1.5, 0.9, 5.0)]
    found = fingerprint(*(volume(spacing=spacing) for spacing in spacings))
    assert found.median_spacing == (1.5, 0.7, 3.0)
    assert found.spacing_at(0.0) == (1.0, 0.5, 1.0)
    assert found.spacing_at(1.0) == (2.0, 0.9, 5.0)
    assert fingerprint(image()).median_spacing == ()


def test_shares_count_voxels_of_all_cases_not_means_of_cases() -> None:
    small = volume(shape=(10, 10, 1), values={0: 50, 2: 50})
    large = volume(shape=(10, 10, 9), values={0: 890, 1: 10})
    shares = fingerprint(small, large).shares()
    assert shares == {0: 0.94, 1: 0.01, 2: 0.05}
    assert small.foreground == 50
    assert large.voxels == 900


@pytest.mark.parametrize(
    ("sides", "middle"), [((5,), 0), ((5, 9), 1), ((9, 5, 7), 2), ((7, 7, 7), 1), ((4, 3, 2, 1), 1)]
)
def test_the_probe_runs_on_the_case_of_median_size(sides: tuple[int, ...], middle: int) -> None:
    assert fingerprint(*(volume(shape=(side,) * 3) for side in sides)).middle_case() == middle


@pytest.mark.parametrize(
    ("cases", "channels"),
    [
        ([image(), image()], 1),
        ([color_image(), image()], 3),
        ([image(channels=3), image()], 1),
        ([image(channels=3), image(channels=3)], 3),
        ([volume(channels=4)], 4),
    ],
)
def test_gray_stays_one_channel_unless_there_is_color(cases: list[Any], channels: int) -> None:
    assert fingerprint(*cases).channels == channels


@pytest.mark.parametrize("cases", [[volume(), volume(name="b", values={0: 1, 7: 2})], [color_image(microns=0.25)]])
def test_a_fingerprint_survives_json_with_its_types(cases: list[Any]) -> None:
    found = fingerprint(*cases, label_names={0: "background", 7: "cyst"}, channel_names=("T1",))
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Fingerprint.from_json(json.loads(text))
    assert again == found
    assert json.dumps(again.to_json()) == text


def test_the_record_starts_with_a_summary_for_readers() -> None:
    summary = fingerprint(volume(), volume(shape=(62, 72, 54))).to_json()["summary"]
    assert summary["training_cases"] == 2
    assert summary["median_shape"] == (61, 71, 52)
    assert set(summary["label_shares"]) == {"0", "1"}


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"cases": None},
        {"cases": [{"name": "only a name"}]},
        {"cases": [{"shape": 3}]},
        {"intensities": [{"mean": 1.0}]},
        {"label_names": {"liver": "1"}},
        {"label_names": ["liver"]},
        {"validation_cases": "many"},
        {"channel_names": 3},
    ],
)
def test_a_record_that_does_not_fit_is_not_taken(changes: dict[str, Any]) -> None:
    content = json.loads(json.dumps(fingerprint(volume()).to_json()))
    assert Fingerprint.from_json(content) is not None
    assert Fingerprint.from_json({**content, **changes}) is None


@pytest.mark.parametrize("missing", ["key", "dataset", "cases", "intensities", "validation_cases", "version"])
def test_a_record_that_lacks_a_field_is_not_taken(missing: str) -> None:
    content = json.loads(json.dumps(fingerprint(volume()).to_json()))
    del content[missing]
    assert Fingerprint.from_json(content) is None


def test_another_key_makes_another_fingerprint() -> None:
    found = fingerprint(volume())
    assert replace(found, key="other") != found


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [((40, 56, 40), 4, "40 x 56 x 40"), ((0.976562, 3.27), 3, "0.977 x 3.27"), ((7,), 4, "7")],
)
def test_sizes_are_shown_with_as_many_digits_as_count(values: tuple[float, ...], digits: int, text: str) -> None:
    assert shown(values, digits) == text
