"""Objects of maps cut into strips, against ITK's labelling of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import RequestError
from medseg.io.slides import components
from medseg.io.slides.components import ObjectMerger, find_objects


def reference(labels, connectivity):
    """The objects by ITK, each as its label and the set of its pixels."""
    found = set()
    for value in np.unique(labels[labels > 0]):
        image = sitk.GetImageFromArray((labels == value).astype(np.uint8))
        parts = sitk.GetArrayFromImage(sitk.ConnectedComponent(image, connectivity == 8))
        for part in range(1, parts.max() + 1):
            found.add((int(value), frozenset(map(tuple, np.argwhere(parts == part).tolist()))))
    return found


def pixels(found):
    """The pixels `(x, y)` of an object by its runs."""
    return frozenset((x, y) for y, start, stop in found.runs.tolist() for x in range(start, stop))


def in_strips(labels, cuts, connectivity, instances=None):
    merger = ObjectMerger(labels.shape[0], connectivity=connectivity)
    done = []
    for top, bottom in zip([0, *cuts], [*cuts, labels.shape[1]], strict=True):
        numbers = None if instances is None else instances[:, top:bottom]
        done += merger.add(labels[:, top:bottom], numbers)
    return done + merger.finish()


@st.composite
def cut_maps(draw):
    width, height = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.3, 0.5, 0.6, 0.75]))
    labels = generator.integers(1, draw(st.integers(2, 4)), (width, height)) * (
        generator.random((width, height)) < density
    )
    cuts = sorted(draw(st.lists(st.integers(0, height), max_size=8)))
    return labels.astype(draw(st.sampled_from([np.uint8, np.int32, np.int64]))), cuts


@settings(deadline=None, max_examples=300, derandomize=True)
@given(cut_maps(), st.sampled_from([4, 8]))
def test_objects_are_those_of_the_whole_map_however_it_is_cut(case, connectivity):
    labels, cuts = case
    found = in_strips(labels, cuts, connectivity)
    assert {(item.value, pixels(item)) for item in found} == reference(labels, connectivity)
    assert sum(item.area for item in found) == (labels > 0).sum()


@pytest.mark.parametrize("connectivity", [4, 8])
def test_a_spiral_over_many_strips_is_one_object(connectivity):
    spiral = np.zeros((41, 41), bool)
    x, y, dx, dy, length = 0, 0, 1, 0, 40
    spiral[0, 0] = True
    while length > 0:
        for _ in range(2 if length < 40 else 3):
            for _ in range(length):
                x, y = x + dx, y + dy
                spiral[x, y] = True
            dx, dy = -dy, dx
        length -= 2
    found = in_strips(spiral, list(range(1, 41)), connectivity)
    assert len(found) == 1
    assert found[0].bounds == (0, 41, 0, 41)
    assert np.array_equal(found[0].mask(), spiral)


def test_instances_that_touch_stay_apart():
    labels = np.ones((6, 6), np.uint8)
    instances = np.repeat(np.repeat(np.arange(1, 5).reshape(2, 2), 3, axis=0), 3, axis=1)
    found = in_strips(labels, [1, 4], 8, instances)
    assert sorted((item.instance, item.value, item.area, item.bounds) for item in found) == [
        (1, 1, 9, (0, 3, 0, 3)),
        (2, 1, 9, (0, 3, 3, 6)),
        (3, 1, 9, (3, 6, 0, 3)),
        (4, 1, 9, (3, 6, 3, 6)),
    ]


def test_an_object_comes_out_as_soon_as_it_is_complete():
    labels = np.zeros((5, 9), np.uint8)
    labels[1, 1:3] = 1
    labels[3, 1:7] = 2
    merger = ObjectMerger(5)
    assert merger.add(labels[:, :3]) == []
    assert [item.value for item in merger.add(labels[:, 3:5])] == [1]
    assert merger.add(labels[:, 5:5]) == []
    assert [item.value for item in merger.add(labels[:, 5:])] == [2]
    assert merger.finish() == []


def test_bands_inside_a_strip_change_nothing(monkeypatch):
    labels = (np.random.default_rng(0).random((50, 60)) < 0.6).astype(np.uint8)
    whole = [item.runs.tolist() for item in find_objects(labels)]
    monkeypatch.setattr(components, "_BAND_PIXELS", 70)
    assert [item.runs.tolist() for item in find_objects(labels)] == whole


def test_a_merger_can_be_used_again():
    merger = ObjectMerger(3)
    for _ in range(2):
        assert merger.add(np.ones((3, 2), np.uint8)) == []
        (item,) = merger.finish()
        assert item.bounds == (0, 3, 0, 2)


@pytest.mark.parametrize(
    ("labels", "instances", "message"),
    [
        (np.ones((4, 3), int), None, "expected \\(5, rows\\)"),
        (np.ones((5, 3), float), None, "expected integers"),
        (np.ones((5, 3), int), np.ones((5, 2), int), "the same for labels and"),
        (np.ones(5, int), None, "expected \\(5, rows\\)"),
    ],
)
def test_strips_that_do_not_fit_are_refused(labels, instances, message):
    with pytest.raises(RequestError, match=message):
        ObjectMerger(5).add(labels, instances)


@pytest.mark.parametrize(("width", "connectivity"), [(0, 4), (5, 6)])
def test_mergers_that_cannot_be_are_refused(width, connectivity):
    with pytest.raises(RequestError):
        ObjectMerger(width, connectivity=connectivity)
