"""Windows of any shape: MONAI's places and values, the blending by definition, and the box of the foreground."""

from __future__ import annotations

import itertools
import math
from typing import Any

import monai.inferers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import dense_patch_slices

from medseg.errors import CaseError, RequestError
from medseg.inferers.blend import (
    TensorWindows,
    check_numbers,
    count_windows,
    cut_windows,
    in_batches,
    per_axis,
    stream,
)
from medseg.inferers.foreground import windows_with_foreground
from medseg.inferers.sliding_window import SlidingWindowInferer

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
OVERLAPS = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.6, 0.75, 0.9])


@st.composite
def cuts(draw: st.DrawFn, longest: int = 24) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """Return image size, window and overlap of a 2D or 3D image; windows may be longer than the image, or -1."""
    dims = draw(st.sampled_from([2, 3]))
    size = tuple(draw(st.integers(1, longest)) for _ in range(dims))
    roi = tuple(draw(st.integers(2, longest) | st.just(-1)) for _ in range(dims))
    return size, roi, tuple(draw(OVERLAPS) for _ in range(dims))


def random_image(size: tuple[int, ...], *, batch: int = 1, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def by_place(x: torch.Tensor) -> torch.Tensor:
    """Return two channels that depend on where in its window a voxel is; no sums, which round by memory layout."""
    ramps = [torch.arange(n, dtype=x.dtype).reshape(-1, *[1] * k) for k, n in enumerate(reversed(x.shape[2:]))]
    where = sum(ramp / (2 + k) for k, ramp in enumerate(ramps))
    return torch.cat([x * 3 - where, x * where], 1)


@PROPERTY
@given(cuts())
def test_windows_are_those_of_monai(cut: Any) -> None:
    size, roi, overlap = cut
    windows = cut_windows(size, roi, overlap)
    steps = [
        n if r == n else max(int(r * (1 - o)), 1) for n, r, o in zip(windows.size, windows.roi, overlap, strict=True)
    ]
    expected = [tuple(part.start for part in place) for place in dense_patch_slices(windows.size, windows.roi, steps)]
    assert list(windows.starts) == sorted(expected, key=lambda start: start[0])
    assert count_windows(size, roi, overlap) == len(expected)


@PROPERTY
@given(cuts(), st.sampled_from([0, 1, None]))
def test_windows_cover_the_padded_image_and_stay_within(cut: Any, axis: int | None) -> None:
    size, roi, overlap = cut
    windows = cut_windows(size, roi, overlap, axis=axis)
    covered = torch.zeros(windows.size, dtype=torch.bool)
    for start in windows.starts:
        assert all(0 <= a <= n - r for a, n, r in zip(start, windows.size, windows.roi, strict=True))
        covered[tuple(slice(a, a + r) for a, r in zip(start, windows.roi, strict=True))] = True
    assert covered.all()
    assert [n + sum(pad) for n, pad in zip(size, windows.padding, strict=True)] == list(windows.size)
    assert all(after - before in (0, 1) for before, after in windows.padding)
    along = [start[windows.axis] for start in windows.starts]
    assert along == sorted(along)
    assert (
        windows.slab_values(3) == 4 * math.prod(windows.size) // windows.size[windows.axis] * windows.roi[windows.axis]
    )


@PROPERTY
@given(
    cuts(16),
    st.integers(1, 5),
    st.integers(1, 2),
    st.sampled_from(["constant", "gaussian"]),
    st.floats(-2, 2, width=32),
)
def test_any_cut_gives_the_logits_of_monai(cut: Any, windows: int, batch: int, mode: str, cval: float) -> None:
    size, roi, overlap = cut
    arguments: Any = (roi, windows, overlap, mode, 0.125, "constant", cval)
    image = random_image(size, batch=batch)
    found = SlidingWindowInferer(*arguments)(image, by_place)
    assert torch.equal(found, monai.inferers.SlidingWindowInferer(*arguments)(image, by_place))


@PROPERTY
@given(cuts(12), st.sampled_from([0, 1, -1]), st.integers(1, 4))
def test_a_stream_is_the_weighted_mean_of_the_windows(cut: Any, axis: int, count: int) -> None:
    size, roi, overlap = cut
    windows = cut_windows(size, roi, overlap, axis=axis % len(size))
    image = random_image(size).double()
    weights = torch.rand(windows.roi, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    source = TensorWindows(image, windows, "constant", 0.5)
    sums = torch.zeros(2, *windows.size, dtype=torch.float64)
    totals = torch.zeros(windows.size, dtype=torch.float64)
    for start in windows.starts:
        where = tuple(slice(a, a + r) for a, r in zip(start, windows.roi, strict=True))
        sums[(slice(None), *where)] += by_place(source.read(0, start))[0] * weights
        totals[where] += weights
    crop = tuple(slice(before, before + n) for (before, _), n in zip(windows.padding, size, strict=True))
    batches = in_batches([(0, start) for start in windows.starts], count)
    slabs = [
        (slab.start, slab.logits.clone(), slab.covered)
        for slab in stream(source, windows, by_place, weights=weights, batches=batches)
    ]
    assert all(covered is None for *_, covered in slabs)
    starts = [start for start, *_ in slabs]
    assert starts == list(itertools.accumulate((logits.shape[1] for _, logits, _ in slabs[:-1]), initial=0))
    found = torch.cat([logits for _, logits, _ in slabs], 1).movedim(1, windows.axis + 1)
    torch.testing.assert_close(found, (sums / totals)[(slice(None), *crop)])


@pytest.mark.parametrize(
    ("padding_mode", "cval"), [("constant", 0.0), ("constant", -3.5), ("reflect", 0.0), ("replicate", 0.0)]
)
@pytest.mark.parametrize(("size", "roi"), [((9, 12), (14, 5)), ((7, 9, 12), (9, 4, 15)), ((8, 8), (8, 8))])
def test_a_window_is_cut_from_the_padded_image(
    size: tuple[int, ...], roi: tuple[int, ...], padding_mode: str, cval: float
) -> None:
    image = random_image(size, batch=2, channels=3)
    windows = cut_windows(size, roi, 0.5)
    source = TensorWindows(image, windows, padding_mode, cval)
    sides = [side for pair in reversed(windows.padding) for side in pair]
    whole = F.pad(image, sides, mode=padding_mode, **({"value": cval} if padding_mode == "constant" else {}))
    for number, start in itertools.product(range(2), windows.starts):
        where = tuple(slice(a, a + r) for a, r in zip(start, roi, strict=True))
        assert torch.equal(source.read(number, start), whole[(slice(number, number + 1), slice(None), *where)])


@PROPERTY
@given(cuts(16), st.floats(0.85, 1.0), st.integers(0, 5))
def test_windows_with_foreground_hold_all_of_it_and_none_is_empty(cut: Any, above: float, seed: int) -> None:
    size, roi, overlap = cut
    image = random_image(size, channels=2, seed=seed)[0]
    windows = cut_windows(size, roi, overlap)
    kept = windows_with_foreground(image, windows, overlap, above)
    found = (image > above).any(0)
    covered = torch.zeros_like(found)
    for start in kept:
        where = tuple(slice(a, a + r) for a, r in zip(start, windows.roi, strict=True))
        assert all(0 <= a <= n - r for a, n, r in zip(start, windows.size, windows.roi, strict=True))
        assert found[where].any() or not found.any()
        covered[where] = True
    assert not (found & ~covered).any()
    assert len(kept) == len(set(kept)) >= 1
    assert len(kept) <= len(windows.starts)
    if not found.any():
        assert len(kept) == 1


@pytest.mark.parametrize("place", [(0, 0), (39, 39), (20, 3), (0, 39)])
def test_one_voxel_of_foreground_needs_one_window(place: tuple[int, int]) -> None:
    image = torch.zeros(1, 40, 40)
    image[(0, *place)] = 1
    windows = cut_windows((40, 40), (16, 16), 0.5)
    assert len(windows_with_foreground(image, windows, (0.5, 0.5), 0.0)) == 1
    labels = SlidingWindowInferer((16, 16), 1, 0.5, output="labels", foreground=0.0)(
        image[None], lambda x: torch.cat([torch.zeros_like(x), x - 0.5], 1)
    )
    assert torch.nonzero(labels[0, 0]).tolist() == [list(place)]


@pytest.mark.parametrize("overlap", [-0.1, 1.0, 1.5])
def test_an_overlap_of_a_whole_window_is_refused(overlap: float) -> None:
    with pytest.raises((RequestError, ValueError), match="overlap"):
        SlidingWindowInferer((8, 8), 1, overlap)(random_image((16, 16)), by_place)


def test_one_value_stands_for_all_axes_and_too_few_are_refused() -> None:
    assert per_axis(3, 2) == (3, 3)
    assert per_axis([1, 2, 3], 3) == (1, 2, 3)
    assert per_axis(None, 3) == (None,) * 3
    for wrong in ([1], [1, 2, 3, 4]):
        with pytest.raises(RequestError, match="3 spatial axes"):
            per_axis(wrong, 3)


@given(st.integers(0, 20), st.integers(1, 7))
@PROPERTY
def test_batches_hold_every_place_in_order(places: int, size: int) -> None:
    every = [(0, (number,)) for number in range(places)]
    batches = list(in_batches(every, size))
    assert [place for batch in batches for place in batch] == every
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(batches)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_value_that_is_not_finite_is_refused(value: float) -> None:
    logits = torch.zeros(2, 3, 4)
    check_numbers(logits)
    # The sum overflows, and yet every value is finite.
    check_numbers(torch.full((4,), 3e38))
    logits[1, 2, 3] = value
    with pytest.raises(CaseError):
        check_numbers(logits)
