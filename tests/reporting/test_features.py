"""Pictures of features: their colors mean the same everywhere, and each tap has its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg.errors import SizeError
from medseg.metrics.features import attention_maps
from medseg.networks import UNet
from medseg.reporting.features import (
    CELL,
    HEAT,
    NUMBERS,
    plot_attention_grid,
    plot_channel_similarity,
    plot_tap_similarity,
)

LEFT, TOP, STEP_X, STEP_Y = 16, 56, 168, 208


def cell(page, row: int, column: int) -> np.ndarray:
    """Return the pixels of one cell."""
    left, top = LEFT + column * STEP_X, TOP + row * STEP_Y
    return np.asarray(page)[top : top + CELL, left : left + CELL].astype(int)


def test_similarity_has_one_scale_of_colors():
    one = torch.rand(2, 1, 8, 8) + 1
    features = {
        "before": {"E1": torch.cat([one, one], 1), "B": torch.cat([one, -one], 1)},
        "after": {"E1": torch.eye(4).reshape(1, 4, 2, 2)},
    }
    page = plot_channel_similarity(features)
    assert page.size == (2 * LEFT + 2 * STEP_X, 32 + 2 * STEP_Y)
    bright, dark = NUMBERS[-1].tolist(), NUMBERS[0].tolist()
    assert (cell(page, 0, 0) == bright).all()
    assert [cell(page, 0, 1)[y, x].tolist() for y, x in ((10, 10), (10, 150), (150, 10))] == [bright, dark, dark]
    assert [cell(page, 1, 0)[y, x].tolist() for y, x in ((10, 10), (10, 150), (150, 150))] == [bright, dark, bright]
    assert (cell(page, 1, 1) == 255).all()


def test_of_many_channels_the_same_few_are_drawn():
    torch.manual_seed(0)
    features = {"net": {"E1": torch.randn(1, 40, 6, 6)}}
    first, again, other = (plot_channel_similarity(features, seed=seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert len(np.unique(cell(first, 0, 0).reshape(-1, 3)[:, 0])) > 10


def test_similarity_of_blocks_is_a_bright_diagonal():
    torch.manual_seed(0)
    taps = {"E1": torch.randn(2, 3, 16, 16), "B": torch.randn(2, 3, 8, 8), "D1": torch.randn(2, 3, 16, 16)}
    drawn = cell(plot_tap_similarity({"net": taps}), 0, 0)
    assert drawn[20, 20].tolist() == drawn[140, 140].tolist() == NUMBERS[-1].tolist()
    assert drawn[20, 140, 1] < 0.6 * NUMBERS[-1, 1]


@pytest.mark.parametrize("labelled", [False, True])
def test_attention_is_half_color_half_gray_on_the_slice_of_the_label(labelled):
    image = torch.zeros(6, 8, 8)
    image[1, :, :4] = 1
    image[3, :4] = 1
    label = torch.zeros(6, 8, 8)
    label[1, 2:4, 2:4] = 2
    hot = torch.ones(6, 8, 8)
    page = plot_attention_grid(image, {"net": {"E1": 0 * hot, "D1": hot}}, label if labelled else None)
    for column, color in enumerate((HEAT[0], HEAT[-1])):
        drawn = cell(page, 0, column)
        lit, unlit = drawn[100 if labelled else 10, 10], drawn[150, 150]
        assert np.abs(unlit - color / 2).max() <= 1
        assert np.abs(lit - (color / 2 + 127.5)).max() <= 1


@pytest.mark.parametrize("dims", [2, 3])
def test_attention_of_a_network_fills_a_row(dims, tmp_path):
    torch.manual_seed(0)
    image = torch.randn(1, 1, *(16,) * dims)
    maps = attention_maps(UNet(dims, 1, 2, (4, 6, 8)).eval().forward_train(image))
    rows = {"U-Net": {tap: found[0] for tap, found in maps.items()}}
    page = plot_attention_grid(image[0, 0], rows)
    assert page.width == 2 * LEFT + 5 * STEP_X
    page.save(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_maps_of_another_size_are_named():
    with pytest.raises(SizeError, match=r"'E1' of 'net' is \(4, 4\) and the image \(8, 8\)"):
        plot_attention_grid(torch.zeros(8, 8), {"net": {"E1": torch.zeros(4, 4)}})
    with pytest.raises(SizeError, match=r"the image is \(1, 1, 8, 8\)"):
        plot_attention_grid(torch.zeros(1, 1, 8, 8), {})
