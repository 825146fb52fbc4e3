"""Shapes, grid and scanner of the phantoms, each against its formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.errors import RequestError
from medseg.studies import phantoms
from medseg.studies.phantoms import LABELS, make_phantom, write_phantoms

SMALL: dict[str, Any] = {"shape": (40, 40, 32), "spacing": (3.0, 3.0, 5.0)}
ZOOMS = np.array([1.5, 2.0, 2.5])
GRID = (64, 56, 48)


def canvas(monkeypatch: pytest.MonkeyPatch, *, affine: Any = None, seed: int = 0) -> phantoms._Canvas:
    """Return an empty volume whose positions are not bent."""
    monkeypatch.setattr(phantoms, "_bend", lambda positions, rng: positions)
    affine = np.diag([*ZOOMS, 1.0]) if affine is None else affine
    return phantoms._Canvas(affine, GRID, ZOOMS, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(3))
def test_positions_are_those_of_the_affine_in_half_fields_of_view(seed: int) -> None:
    affine = phantoms._oblique_affine(GRID, ZOOMS, np.random.default_rng(seed))
    half = np.array(GRID) * ZOOMS / 2
    found = np.stack(phantoms._positions(affine, GRID, half), -1)
    corners = np.array([(0, 0, 0), (63, 0, 47), (5, 17, 30), (63, 55, 47)])
    middle = nib.affines.apply_affine(affine, (np.array(GRID) - 1) / 2)
    expected = (nib.affines.apply_affine(affine, corners) - middle) / half
    np.testing.assert_allclose(found[tuple(corners.T)], expected, atol=1e-5)


@pytest.mark.parametrize("radii", [(0.5, 0.5, 0.5), (0.8, 0.3, 0.5), (0.25, 0.6, 0.4)])
def test_an_ellipsoid_has_the_volume_of_its_formula(radii: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    empty = canvas(monkeypatch)
    inside = empty.ellipsoid((0.0, 0.0, 0.0), radii, vary=0.0) < 1
    sides = np.array(radii) * empty.half
    assert inside.sum() * ZOOMS.prod() == pytest.approx(4 / 3 * math.pi * sides.prod(), rel=0.03)
    extent = [np.ptp(np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))) + 1 for axis in range(3)]
    np.testing.assert_allclose(extent * ZOOMS, 2 * sides, atol=2.1 * ZOOMS.max())


def test_a_tube_is_an_ellipse_in_every_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = canvas(monkeypatch)
    inside = empty.tube(0.1, -0.2, (0.3, 0.4)) < 1
    assert (inside == inside[..., :1]).all()
    area = math.pi * 0.3 * empty.half[0] * 0.4 * empty.half[1]
    assert inside[..., 0].sum() * ZOOMS[0] * ZOOMS[1] == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_a_nodule_is_a_lobed_ball_around_its_site(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    affine = phantoms._oblique_affine(GRID, ZOOMS, np.random.default_rng(seed))
    lung = canvas(monkeypatch, affine=affine, seed=seed)
    lung.label[:] = phantoms.LUNG
    site, radius = np.array((30, 28, 24)), 14.0
    phantoms._paint_nodule(lung, site, radius)
    voxels = np.argwhere(np.ones(GRID, bool))
    distance = np.linalg.norm((voxels - site) @ affine[:3, :3].T, axis=1).reshape(GRID)
    nodule = lung.label == phantoms.NODULE
    # Three waves of a tenth of the radius each.
    assert nodule[distance < 0.69 * radius].all()
    assert not nodule[distance > 1.31 * radius].any()
    assert np.unique(lung.hu[nodule]).size == 1
    assert 0 <= lung.hu[nodule][0] <= 60
    volume = nodule.sum() * ZOOMS.prod()
    assert volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.4)


def test_a_nodule_ends_at_the_border_of_its_lung(monkeypatch: pytest.MonkeyPatch) -> None:
    half_lung = canvas(monkeypatch)
    half_lung.label[:30] = phantoms.LUNG
    phantoms._paint_nodule(half_lung, np.array((28, 28, 24)), 12.0)
    nodule = half_lung.label == phantoms.NODULE
    assert nodule.any()
    assert not nodule[30:].any()
    assert (half_lung.hu[30:] == phantoms.AIR).all()


def test_bone_is_painted_over_tissue_and_never_over_air_or_organs(monkeypatch: pytest.MonkeyPatch) -> None:
    body = canvas(monkeypatch)
    body.hu[:40] = phantoms.MUSCLE
    body.fill(np.arange(64)[:, None, None] + np.zeros(GRID, int) < 10, phantoms.LIVER_TISSUE, phantoms.LIVER)
    phantoms._set_bone(body, np.ones(GRID, bool), np.full(GRID, phantoms.RIB_BONE))
    assert set(np.unique(body.hu[:10])) == {phantoms.LIVER_TISSUE}
    assert set(np.unique(body.hu[10:40])) == {phantoms.RIB_BONE}
    assert set(np.unique(body.hu[40:])) == {phantoms.AIR}


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (0.1, -0.2, 0.3), (np.pi / 2, 0.0, 0.0), (1.0, 2.0, 3.0)])
def test_a_rotation_keeps_lengths_and_turns_about_x_then_y_then_z(angles: tuple[float, ...]) -> None:
    found = phantoms._rotation(np.array(angles))
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(found) == pytest.approx(1)
    (a, b, c), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, a, -sa], [0, sa, a]])
    about_y = np.array([[b, 0, sb], [0, 1, 0], [-sb, 0, b]])
    about_z = np.array([[c, -sc, 0], [sc, c, 0], [0, 0, 1]])
    np.testing.assert_allclose(found, about_z @ about_y @ about_x, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_middle_of_the_grid_lies_in_the_chest_whatever_the_tilt(seed: int) -> None:
    affine = phantoms._oblique_affine(GRID, ZOOMS, np.random.default_rng(seed))
    x, y, z = nib.affines.apply_affine(affine, (np.array(GRID) - 1) / 2)
    assert max(abs(x), abs(y)) <= 40.001
    assert -340.001 <= z <= -259.999
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), ZOOMS, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.6, 0.9])
def test_the_blur_is_separable_and_keeps_the_mean(sigma: float) -> None:
    taps = phantoms._gaussian(sigma)
    assert taps.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(taps, taps[::-1])
    point = np.zeros((9, 9, 9), np.float32)
    point[4, 4, 4] = 1
    spread = phantoms._blur(point, (sigma, sigma, 0.5))
    last = phantoms._gaussian(0.5)
    expected = np.einsum("i,j,k->ijk", taps, taps, last)
    np.testing.assert_allclose(spread[2:7, 2:7, 2:7], expected, atol=1e-7)
    flat = np.full((5, 6, 7), 37.5, np.float32)
    np.testing.assert_allclose(phantoms._blur(flat, (sigma,) * 3), flat, rtol=1e-6)


@pytest.mark.parametrize("attenuation", [-1000.0, 40.0, 700.0])
def test_the_scanner_adds_noise_of_its_deviation_and_no_offset(attenuation: float) -> None:
    image = phantoms._scan(np.full((40, 40, 40), attenuation, np.float32), np.random.default_rng(1))
    assert image.dtype == np.int16
    inner = image[3:-3, 3:-3, 3:-3].astype(float)
    # At -1000 HU some of the noise is cut off at -1024.
    assert inner.mean() == pytest.approx(attenuation, abs=3.0 if attenuation < -900 else 1.0)
    assert inner.std() == pytest.approx(phantoms.NOISE_SD, rel=0.2 if attenuation < -900 else 0.03)
    neighbors = np.corrcoef(inner[1:].ravel(), inner[:-1].ravel())[0, 1]
    assert 0.2 < neighbors < 0.7


def test_values_stay_within_twelve_bits() -> None:
    for value in (-5000.0, 5000.0):
        image = phantoms._scan(np.full((8, 8, 8), value, np.float32), np.random.default_rng(0))
        assert set(np.unique(image)) == {phantoms.HU_RANGE[int(value > 0)]}


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 5.0), (1.0, 2.0, 4.0), (6.0, 6.0, 6.0)])
def test_a_case_is_near_the_nominal_shape_and_spacing(spacing: tuple[float, ...]) -> None:
    for case in range(3):
        phantom = make_phantom(case, shape=(40, 36, 32), spacing=spacing)
        assert max(abs(n - m) for n, m in zip(phantom.image.shape, (40, 36, 32), strict=True)) <= 3
        found = nib.affines.voxel_sizes(phantom.affine)
        assert (np.abs(found / spacing - 1) <= 0.1 + 0.006 / min(spacing)).all()
        assert phantom.label.shape == phantom.image.shape
        assert set(np.unique(phantom.label)) <= set(LABELS)


def test_seed_and_case_both_decide_the_volume() -> None:
    volumes = {(seed, case): make_phantom(case, seed=seed, **SMALL) for seed in (0, 1) for case in (0, 1)}
    assert len({phantom.image.tobytes() for phantom in volumes.values()}) == 4
    again = make_phantom(1, seed=0, **SMALL)
    np.testing.assert_array_equal(again.label, volumes[0, 1].label)
    np.testing.assert_array_equal(again.affine, volumes[0, 1].affine)


def test_its_own_data_set_may_be_written_anew(tmp_path: Path) -> None:
    listing = write_phantoms(tmp_path, cases=2, validation=1, unseen=0, **SMALL)
    first = listing.read_bytes()
    assert write_phantoms(tmp_path, cases=2, validation=1, unseen=0, **SMALL).read_bytes() == first
    content = json.loads(first)
    assert [entry["image"] for entry in content["training"]] == ["./imagesTr/phantom_000.nii.gz"]
    assert [entry["image"] for entry in content["validation"]] == ["./imagesTr/phantom_001.nii.gz"]
    assert content["test"] == []


@pytest.mark.parametrize("arguments", [{"case": -1}, {"case": 0, "seed": -1}, {"case": 0, "shape": (32, 32, 31)}])
def test_a_phantom_that_cannot_be_drawn_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        make_phantom(**arguments)
