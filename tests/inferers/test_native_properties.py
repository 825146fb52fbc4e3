"""Native resampling between any two grids, against the interpolation of torch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from medseg.errors import GeometryError, RequestError
from medseg.inferers.grid_mapping import Axis, GridMapping, find_grid_mapping
from medseg.inferers.sliding_window import SlidingWindowInferer

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
SIZES = st.integers(5, 14)
SCALES = st.floats(0.4, 2.5)


@st.composite
def straight(draw: st.DrawFn, dims: int) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray]:
    """Return native shape, model shape, and the map from native to model voxels: permuted, flipped, scaled, moved."""
    native, model = (tuple(draw(SIZES) for _ in range(dims)) for _ in range(2))
    order = draw(st.permutations(range(dims)))
    matrix = np.eye(dims + 1)
    matrix[:dims, :dims] = 0
    for axis, source in enumerate(order):
        matrix[axis, source] = draw(SCALES) * draw(st.sampled_from([-1, 1]))
    _center(matrix, native, model, [draw(st.floats(-3, 3)) for _ in range(dims)])
    return native, model, matrix


@st.composite
def tilted(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray]:
    """Return the same for two grids at an angle."""
    native, model, matrix = draw(straight(3))
    for axis, angle in enumerate(draw(st.floats(0.15, 0.6)) * np.array([1, -1, 0.7])):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(4)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[b, a], turn[a, b] = np.sin(angle), -np.sin(angle)
        matrix = turn @ matrix
    _center(matrix, native, model, [0.3, -0.4, 0.1])
    return native, model, matrix


def _center(matrix: np.ndarray, native: Any, model: Any, shift: Any) -> None:
    """Let the middles of both grids fall together, but for a shift in model voxels."""
    middle = (np.array(native) - 1) / 2
    matrix[:-1, -1] = (np.array(model) - 1) / 2 + np.array(shift) - matrix[:-1, :-1] @ middle


def image_on(native: tuple[int, ...], model: tuple[int, ...], matrix: np.ndarray) -> MetaTensor:
    """Return an image on the model's grid that was loaded on another one."""
    dims = len(model)
    affine = np.eye(4)
    affine[:dims, :dims] = matrix[:dims, :dims]
    affine[:dims, -1] = matrix[:dims, -1]
    noise = torch.rand(1, 1, *model, generator=torch.Generator().manual_seed(len(model)))
    meta = {"original_affine": affine, "spatial_shape": np.array(native), "space": "RAS"}
    return MetaTensor(noise, affine=torch.eye(dims + 1, dtype=torch.float64), meta=meta)


def two_scores(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x - 0.5, 0.5 - x], 1)


def interpolated(scores: torch.Tensor, native: tuple[int, ...], matrix: np.ndarray) -> torch.Tensor:
    """Return scores `(1, K, *model)` at the native voxels, by torch in float64; beyond the border its value counts."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in native), indexing="ij"), -1)
    where = grid @ matrix[:-1, :-1].T + matrix[:-1, -1]
    normed = 2 * where / (np.array(scores.shape[2:]) - 1) - 1
    # torch counts x first, which is the last axis.
    places = torch.from_numpy(normed[..., ::-1].copy())[None]
    sampled = torch.nn.functional.grid_sample(scores.double(), places, padding_mode="border", align_corners=True)
    return sampled[0]


def check_scores(case: Any) -> None:
    native, model, matrix = case
    image = image_on(native, model, matrix)
    expected = interpolated(two_scores(image.as_tensor()), native, matrix)
    roi = tuple(min(6, n) for n in model)
    run = SlidingWindowInferer(roi, 2, 0.25, output="float32", activation="none")
    found = run(image, two_scores)[0]
    assert found.shape == (2, *native)
    # Positions within a ten thousandth of a voxel count as on it.
    torch.testing.assert_close(torch.as_tensor(found).double(), expected, atol=5e-4, rtol=0)
    labels = SlidingWindowInferer(roi, 2, 0.25, output="labels", activation="none")(image, two_scores)[0, 0]
    clear = expected[0].abs() > 5e-4
    assert torch.equal((torch.as_tensor(labels) == 1)[clear], (expected[1] > expected[0])[clear])


@PROPERTY
@given(straight(3))
def test_permuted_flipped_and_scaled_volumes_are_interpolated_like_torch(case: Any) -> None:
    check_scores(case)


@PROPERTY
@given(straight(2))
def test_permuted_flipped_and_scaled_images_are_interpolated_like_torch(case: Any) -> None:
    check_scores(case)


@PROPERTY
@given(tilted())
def test_oblique_volumes_are_interpolated_like_torch(case: Any) -> None:
    native, model, matrix = case
    assert GridMapping(native, model, matrix, np.eye(4), ()).native_axes() is None
    check_scores(case)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_a_reoriented_volume_comes_back_voxel_by_voxel(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    native = (5, 7, 9)
    model = tuple(native[axis] for axis in order)
    matrix = np.zeros((4, 4))
    for axis, (source, sign) in enumerate(zip(order, flips, strict=True)):
        matrix[axis, source] = sign
        matrix[axis, 3] = 0 if sign > 0 else native[source] - 1
    matrix[3, 3] = 1
    image = image_on(native, model, matrix)
    found = SlidingWindowInferer((4, 4, 4), 2, output="labels")(image, two_scores)[0, 0]
    flipped = image[0, 0].as_tensor().flip([axis for axis in range(3) if flips[axis] < 0])
    expected = flipped.permute(*np.argsort(order)) < 0.5
    assert torch.equal(torch.as_tensor(found).bool(), expected)


@PROPERTY
@given(straight(3))
def test_a_straight_mapping_knows_its_axes(case: Any) -> None:
    native, model, matrix = case
    mapping = find_grid_mapping(image_on(native, model, matrix)[0])
    axes = mapping.native_axes()
    assert axes == tuple(np.abs(matrix[:3, :3]).argmax(1))
    np.testing.assert_allclose(mapping.matrix, matrix, atol=1e-9)
    for axis, source in enumerate(axes):
        expected = np.arange(native[source]) * matrix[axis, source] + matrix[axis, 3]
        np.testing.assert_allclose(mapping.along(axis, source), expected, atol=2e-4)
        own = Axis.of(mapping, axis, source)
        inside = np.clip(expected, 0, model[axis] - 1)
        assert len(own) == native[source]
        assert own.all_valid
        np.testing.assert_allclose(own.low.numpy() + own.fraction.numpy(), inside, atol=2e-4)
        assert bool((own.high - own.low).abs().max() <= 1)
        above = [index for plane in range(model[axis]) for index, _ in own.indices_above(plane)]
        assert sorted(above) == list(range(native[source]))


@pytest.mark.parametrize(("drift", "straight_grid"), [(0.0, True), (1e-5, True), (1e-3, False), (0.5, False)])
def test_a_small_error_of_the_direction_counts_at_the_far_end(drift: float, straight_grid: bool) -> None:
    matrix = np.eye(4)
    matrix[0, 1] = drift
    mapping = GridMapping((20, 50, 20), (20, 50, 20), matrix, np.eye(4), ((0.0, 19.0), (0.0, 49.0), (0.0, 19.0)))
    assert (mapping.native_axes() == (0, 1, 2)) == straight_grid


def test_rounded_headers_do_not_move_voxels() -> None:
    matrix = np.diag([1 + 1e-7, 1.0, 1.0, 1.0])
    matrix[0, 3] = 3e-5
    mapping = GridMapping((9, 9, 9), (9, 9, 9), matrix, np.eye(4), ((0.0, 8.0),) * 3)
    assert mapping.along(0, 0).tolist() == list(range(9))
    assert Axis.of(mapping, 0, 0).exact
    matrix[0, 3] = 0.25
    assert not Axis.of(mapping, 0, 0).exact


def test_voxels_beyond_the_border_of_a_cropped_image_are_background() -> None:
    extent = ((-math.inf, math.inf),) * 3
    matrix = np.eye(4)
    matrix[0, 3] = -2.0
    axis = Axis.of(GridMapping((9, 4, 4), (5, 4, 4), matrix, np.eye(4), extent, border=0.5), 0, 0)
    assert axis.valid.tolist() == [False, False, True, True, True, True, True, False, False]
    assert not axis.all_valid
    assert [index for plane in range(5) for index, _ in axis.indices_above(plane)] == [2, 3, 4, 5, 6]


def test_grids_that_do_not_fit_are_refused() -> None:
    image = image_on((5, 6, 7), (5, 6, 7), np.eye(4))[0]
    flat = image.clone()
    flat.affine = torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    with pytest.raises(GeometryError):
        find_grid_mapping(flat)
    for field in ("spatial_shape", "original_affine"):
        bare = image.clone()
        del bare.meta[field]
        with pytest.raises(RequestError, match=field):
            find_grid_mapping(bare)
    stack = image.clone()
    stack.meta["spatial_shape"] = np.array((5, 6))
    with pytest.raises(RequestError, match="3D"):
        find_grid_mapping(stack)


def test_an_identity_maps_every_voxel_on_itself() -> None:
    mapping = GridMapping.identity((4, 6))
    assert mapping.native_axes() == (0, 1)
    assert mapping.along(1, 1).tolist() == list(range(6))
    assert mapping.native_shape == mapping.model_shape == (4, 6)
    assert len(Axis.single()) == 1
    assert Axis.single().exact
