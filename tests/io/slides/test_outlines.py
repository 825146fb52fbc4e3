"""Outlines against Pillow's filling of polygons, and the rules of valid polygons."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from medseg.io.slides.components import find_objects
from medseg.io.slides.outlines import polygons, ring_areas, simplify


def filled(rings, shape):
    """Which pixel centers lie inside an odd number of rings, by Pillow on a plane three times as fine."""
    inside = np.zeros((3 * shape[1], 3 * shape[0]), dtype=bool)
    for ring in rings:
        plane = Image.new("1", (3 * shape[0], 3 * shape[1]))
        ImageDraw.Draw(plane).polygon([tuple(point) for point in (3 * ring - 0.5).tolist()], fill=1)
        inside ^= np.asarray(plane)
    return inside[1::3, 1::3].T


def drawn(item, shape):
    mask = np.zeros(shape, dtype=bool)
    x0, x1, y0, y1 = item.bounds
    mask[x0:x1, y0:y1] = item.mask()
    return mask


@st.composite
def masks(draw):
    shape = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return generator.random(shape) < draw(st.sampled_from([0.3, 0.5, 0.7, 0.9]))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(masks(), st.sampled_from([4, 8]))
def test_outlines_are_valid_polygons_around_exactly_the_pixels(mask, connectivity):
    items = find_objects(mask, connectivity=connectivity)
    for item, shapes in zip(items, polygons(items), strict=True):
        assert connectivity == 8 or len(shapes) == 1
        rings = [ring for polygon in shapes for ring in polygon]
        assert np.array_equal(filled(rings, mask.shape), drawn(item, mask.shape))
        assert sum(ring_areas(rings)) == item.area
        for polygon in shapes:
            areas = ring_areas(polygon)
            assert areas[0] > 0
            assert all(area < 0 for area in areas[1:])
        for ring in rings:
            assert len(np.unique(ring, axis=0)) == len(ring), "a ring touches itself"
            steps = np.diff(np.concatenate([ring, ring[:2]]), axis=0) != 0
            assert (steps.sum(axis=1) == 1).all()
            assert (steps[1:, 0] != steps[:-1, 0]).all(), "a corner on a straight edge"


def test_nothing_has_no_outline():
    assert polygons([]) == []
    assert ring_areas([]) == []
    assert simplify([], 1.0) == []


def distance_to_ring(point, ring):
    start, stop = ring, np.roll(ring, -1, axis=0)
    along = stop - start
    share = np.clip(((point - start) * along).sum(axis=1) / (along**2).sum(axis=1), 0, 1)
    return np.hypot(*(start + share[:, None] * along - point).T).min()


@pytest.mark.parametrize("tolerance", [0.5, 0.75, 2.0])
def test_simplified_rings_stay_near_and_are_a_choice_of_the_corners(tolerance):
    x, y = np.mgrid[:200, :150]
    mask = ((x - 90) / 70) ** 2 + ((y - 70) / 50) ** 2 + 0.2 * np.sin(x / 5) < 1
    mask &= ((x - 90) / 20) ** 2 + ((y - 70) / 20) ** 2 > 1
    ((rings,),) = polygons(find_objects(mask))
    assert len(rings) == 2
    for before, after in zip(rings, simplify(rings, tolerance), strict=True):
        assert len(after) < len(before)
        assert {tuple(point) for point in after} <= {tuple(point) for point in before}
        assert max(distance_to_ring(point, after) for point in before) <= tolerance + 1e-9


def test_no_tolerance_changes_nothing_and_a_tiny_ring_does_not_collapse():
    mask = np.zeros((40, 40), bool)
    mask[3, 5] = mask[10:30, 7] = True
    mask[20, 8] = True
    rings = [ring for shapes in polygons(find_objects(mask)) for polygon in shapes for ring in polygon]
    assert all(np.array_equal(a, b) for a, b in zip(rings, simplify(rings, 0.0), strict=True))
    for ring, area in zip(simplify(rings, 100.0), ring_areas(rings), strict=True):
        assert len(ring) >= 3
        assert np.sign(ring_areas([ring])) == np.sign(area)
