"""The size rules by themselves."""

from __future__ import annotations

import pytest
import torch

from medseg.errors import SizeError
from medseg.networks.sizes import ValidSizes, check_image, check_minimum, total_stride


def halvings(depth: int) -> ValidSizes:
    return ValidSizes(((2, 2),) * depth)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_valid_sizes_follow_the_closed_formulas(depth):
    sizes = halvings(depth)
    assert sizes.step == (2**depth,) * 2
    assert sizes.base == (4 * (2**depth - 1),) * 2
    assert sizes.shrink == (12 * 2**depth - 8,) * 2


def test_smallest_legal_size_leaves_the_smallest_output():
    assert halvings(4).smallest == (188, 188)
    for depth in range(1, 6):
        sizes = halvings(depth)
        left = sizes.smallest[0] - sizes.shrink[0]
        assert 0 < left <= sizes.step[0]


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(1, (188,)), (188, (188,)), (189, (188, 204)), (203, (188, 204)), (204, (204,)), (572, (572,)), (580, (572, 588))],
)
def test_nearest_legal_sizes_enclose_the_given_one(size, nearest):
    found = halvings(4).nearest((size, 572))[0]
    assert found == nearest if len(nearest) == 2 else found[0] == nearest[0]


def test_legal_sizes_pass_and_others_are_named_per_axis():
    sizes = ValidSizes(((1, 2), (2, 2)))
    sizes.check(sizes.smallest, "Net")
    with pytest.raises(SizeError, match=r"this Net .*axis 1 \(\d+ voxels\)") as caught:
        sizes.check((sizes.smallest[0], sizes.smallest[1] + 1), "Net")
    assert "axis 0" not in str(caught.value)


def test_total_stride_multiplies_each_axis():
    assert total_stride(((1, 2, 2), (2, 2, 2), (1, 3, 2))) == (2, 12, 8)


def test_minimum_names_the_nearest_size_that_fits():
    check_minimum((8, 16), (8, 16), "Net")
    with pytest.raises(SizeError, match=r"found 7x40\. The nearest valid size is 8x40"):
        check_minimum((7, 40), (8, 16), "Net")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 8), r"3D.*batch, channel, depth, height, width.*3 dimensions.*spatial_dims"),
        ((1, 8, 8, 8), r"4 dimensions, shape \(1, 8, 8, 8\).*unsqueeze"),
        ((1, 2, 8, 8, 8), r"expects 1 channel.*found 2 .*in_channels=2"),
    ],
)
def test_images_of_another_rank_or_channel_count_are_refused(shape, message):
    with pytest.raises(SizeError, match=message):
        check_image(torch.zeros(shape), "Net", 3, 1)
