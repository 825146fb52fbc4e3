"""Sampling at places: precise in large volumes, and from no more of them than needed."""

from __future__ import annotations

import pytest
import torch

from medseg.errors import RequestError
from medseg.transforms.sampling import Sampler, cut


def grid(size: tuple[int, ...], offset: float) -> list[torch.Tensor]:
    places = torch.meshgrid(*[torch.arange(float(n)) + offset for n in size], indexing="ij")
    return list(places)


@pytest.mark.parametrize("padding", ["border", "reflect", "constant"])
def test_only_the_voxels_that_are_needed_are_read(padding):
    # 10 GB, were it whole.
    image = torch.arange(50_000.0).expand(1, 50_000, 50_000)
    sampler = Sampler(grid((5, 7), 0.25), (5, 7), image.shape[1:], origin=(49_000, 40_000), padding=padding)
    expected = torch.arange(40_000.25, 40_007).expand(1, 5, 7)
    torch.testing.assert_close(sampler.linear(image), expected, atol=0.005, rtol=0)
    assert torch.equal(sampler.nearest(image.int()), expected.floor().int())
    assert torch.equal(sampler.votes(image), expected.floor())
    box = cut(image, (49_000, 40_000), (5, 7), padding=padding)
    assert torch.equal(box, expected.floor())
    assert box.untyped_storage().nbytes() == 5 * 7 * 4


def test_places_that_do_not_depend_on_an_axis_may_be_given_without_it():
    image = torch.rand(2, 9, 8, 7, generator=torch.Generator().manual_seed(0))
    size = (4, 5, 6)
    full = grid(size, 0.3)
    short = [place.select((axis + 1) % 3, 0).unsqueeze((axis + 1) % 3) for axis, place in enumerate(full)]
    one, other = (Sampler(places, size, image.shape[1:]) for places in (full, short))
    assert torch.equal(one.linear(image), other.linear(image))
    assert torch.equal(one.nearest(image), other.nearest(image))


def test_an_unknown_padding_is_refused():
    with pytest.raises(RequestError, match="'zeros'"):
        Sampler(grid((2, 2), 0), (2, 2), (2, 2), padding="zeros")
    with pytest.raises(RequestError, match="'zeros'"):
        cut(torch.zeros(1, 2, 2), (0, 0), (2, 2), padding="zeros")
