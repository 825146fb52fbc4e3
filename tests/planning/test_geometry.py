"""Spacing, patches and strides."""

from __future__ import annotations

import math

import pytest

from medseg.planning.geometry import lay_out, target_spacing
from medseg.planning.network_sizing import SIZE_LADDER


def test_a_small_image_is_taken_whole_and_padded_to_the_strides() -> None:
    layout = lay_out((35, 50, 36), (1.0, 1.0, 1.0), 96**3, 4)
    assert layout.patch == (40, 56, 40)
    assert layout.step == (8, 8, 8)
    assert layout.whole


def test_a_patch_is_near_to_a_cube_in_millimeters() -> None:
    layout = lay_out((180, 171, 60), (0.98, 0.98, 3.27), 96**3 // 2, 4)
    assert not layout.whole
    sides = [n * mm for n, mm in zip(layout.patch, (0.98, 0.98, 3.27), strict=True)]
    assert max(sides) / min(sides) < 1.15
    assert layout.voxels == pytest.approx(96**3 // 2, rel=0.15)


def test_coarse_axes_are_pooled_later() -> None:
    layout = lay_out((180, 171, 60), (0.98, 0.98, 3.27), 96**3 // 2, 4)
    assert layout.strides[0] == (2, 2, 1)
    assert layout.strides[1] == (2, 2, 2)
    assert min(layout.bottom) >= 4


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 200, 7), (64, 64, 64), (512, 512, 30), (7, 7, 900), (2000, 1500, 1)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.4, 0.4, 6.0), (5.0, 0.5, 0.5)])
@pytest.mark.parametrize("poolings", [2, 4])
def test_every_layout_can_be_pooled(
    dims: int, shape: tuple[int, ...], spacing: tuple[float, ...], poolings: int
) -> None:
    shape, spacing = shape[:dims], spacing[:dims]
    for _, limit in SIZE_LADDER[dims]:
        layout = lay_out(shape, spacing, limit, poolings)
        assert 1 <= len(layout.strides) <= poolings
        assert all(n % s == 0 for n, s in zip(layout.patch, layout.step, strict=True))
        assert max(layout.bottom) > 1
        assert all(
            n <= max(2 * s, -(-size // s) * s) for n, s, size in zip(layout.patch, layout.step, shape, strict=True)
        )
        assert math.prod(layout.patch) <= 2 * limit or max(layout.patch) <= 32
        assert layout.whole == all(n >= size for n, size in zip(layout.patch, shape, strict=True))


class _Spacings:
    """What `target_spacing` asks of a fingerprint."""

    def __init__(self, *spacings: tuple[float, ...]) -> None:
        self.cases = spacings

    def spacing_at(self, share: float) -> tuple[float, ...]:
        from medseg.planning.case_stats import quantile

        return tuple(round(quantile(axis, share), 6) for axis in zip(*self.cases, strict=True))

    @property
    def median_spacing(self) -> tuple[float, ...]:
        return self.spacing_at(0.5)


def test_equal_spacings_are_kept_exactly() -> None:
    spacing, reason = target_spacing(_Spacings(*[(0.976562, 0.976562, 3.27)] * 3))  # type: ignore[arg-type]
    assert spacing == (0.976562, 0.976562, 3.27)
    assert "no resampling" in reason


def test_the_slice_axis_of_uneven_volumes_takes_its_tenth_percentile() -> None:
    spacings = [(0.8, 0.8, 5.0)] * 8 + [(0.8, 0.8, 1.0), (0.7, 0.7, 1.25)]
    spacing, reason = target_spacing(_Spacings(*spacings))  # type: ignore[arg-type]
    assert spacing[:2] == (0.8, 0.8)
    assert spacing[2] == pytest.approx(1.225)
    for number in ("5", "1.225", "6.2"):
        assert number in reason


def test_nearly_even_volumes_take_the_median() -> None:
    uneven = _Spacings((1.0, 1.0, 1.0), (1.2, 1.2, 2.0), (0.9, 0.9, 1.5))
    spacing, reason = target_spacing(uneven)  # type: ignore[arg-type]
    assert spacing == (1.0, 1.0, 1.5)
    assert "0.9 x 0.9 x 1" in reason
