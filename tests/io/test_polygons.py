from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from medseg.io import polygons
from medseg.io.polygons import fill_rings, trace_rings

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8))


def area(ring: NDArray[np.float64]) -> float:
    x, y = ring.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def crossing_parity(rings: list[NDArray[np.float64]], x: int, y: int) -> bool:
    """Even-odd rule for one point in the plainest form: count edges to its left."""
    count = 0
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if (y0 <= y) != (y1 <= y):
                at = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
                count += at <= x
    return count % 2 == 1


@settings(max_examples=200, deadline=None)
@given(MASKS)
def test_rings_of_any_mask_fill_to_the_same_mask(mask: NDArray[np.bool_]) -> None:
    assert np.array_equal(fill_rings(trace_rings(mask), mask.shape), mask)


@settings(max_examples=200, deadline=None)
@given(MASKS)
def test_rings_enclose_as_much_as_the_pixels_and_touch_no_corner_twice(mask: NDArray[np.bool_]) -> None:
    rings = trace_rings(mask)
    assert sum(area(ring) for ring in rings) == mask.sum()
    for ring in rings:
        steps = np.roll(ring, -1, axis=0) - ring
        along_x = steps[:, 0] != 0
        assert np.array_equal(along_x, steps[:, 1] == 0)
        assert not (along_x & np.roll(along_x, 1)).any()
        assert len(np.unique(ring, axis=0)) == len(ring)


def test_a_hole_is_a_ring_of_negative_area_and_an_island_in_it_one_of_positive() -> None:
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[2:7, 2:7] = False
    mask[4, 4] = True
    assert sorted(area(ring) for ring in trace_rings(mask)) == [-25, 1, 49]


def test_pixels_that_touch_at_a_corner_have_rings_of_their_own() -> None:
    assert [len(ring) for ring in trace_rings(np.eye(3, dtype=bool))] == [4, 4, 4]


def test_rings_lie_on_the_borders_of_pixels() -> None:
    (ring,) = trace_rings(np.ones((3, 2), bool))
    assert ring.tolist() == [[-0.5, -0.5], [2.5, -0.5], [2.5, 1.5], [-0.5, 1.5]]


def test_a_notch_that_closes_at_a_corner_is_a_hole() -> None:
    mask = np.ones((4, 4), bool)
    mask[1, 1] = mask[0, 0] = False
    assert sorted(area(ring) for ring in trace_rings(mask)) == [-1, 15]


def test_no_mask_no_rings() -> None:
    assert trace_rings(np.zeros((4, 5), bool)) == []
    assert not fill_rings([], (4, 5)).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(3, 9))
def test_any_polygons_fill_as_the_even_odd_rule_says_point_by_point(seed: int, count: int, points: int) -> None:
    rng = np.random.default_rng(seed)
    rings = [rng.uniform(-4, 14, (points, 2)) for _ in range(count)]
    filled = fill_rings(rings, (11, 9))
    expected = [[crossing_parity(rings, x, y) for y in range(9)] for x in range(11)]
    assert np.array_equal(filled, expected)


def test_a_center_on_a_common_border_belongs_to_exactly_one_polygon() -> None:
    left, right = np.array([[0, 0], [4, 0], [4, 8], [0, 8.0]]), np.array([[4, 0], [8, 0], [8, 8], [4, 8.0]])
    low, high = left[:, ::-1], right[:, ::-1]
    for one, other in ((left, right), (low, high)):
        both = fill_rings([one], (9, 9)).astype(int) + fill_rings([other], (9, 9))
        assert both[:8, :8].tolist() == np.ones((8, 8)).tolist()
        assert both.sum() == 64


def test_a_keyhole_is_filled_without_its_hole() -> None:
    outside = [[0, 0], [10, 0], [10, 10], [0, 10]]
    keyhole = np.array([*outside, [0, 3], [3, 3], [3, 6], [6, 6], [6, 3], [3, 3], [0, 3]]) - 0.5
    expected = np.ones((10, 10), bool)
    expected[3:6, 3:6] = False
    assert np.array_equal(fill_rings([keyhole], (10, 10)), expected)


def test_portions_of_work_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.random.default_rng(0).random((40, 30)) < 0.5
    rings = trace_rings(mask)
    monkeypatch.setattr(polygons, "_CHUNK", 7)
    assert np.array_equal(fill_rings(rings, mask.shape), mask)
