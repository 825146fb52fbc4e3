"""Overlap-tile inference of unpadded networks."""

from __future__ import annotations

from pathlib import Path

import monai.inferers
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medseg.errors import RequestError, SizeError
from medseg.inferers.overlap_tile import OverlapTileInferer
from medseg.networks import UNet
from medseg.networks.convert import from_reference

GOLDEN = Path(__file__).parents[1] / "golden"


def valid_unet(dims: int, depth: int = 2, channels: int = 1) -> UNet:
    torch.manual_seed(0)
    return UNet(dims, channels, 3, (4, 6, 8, 10, 12)[: depth + 1], padding="valid", dropout=0.0).eval()


def random_image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def in_one_piece(network: UNet, image: torch.Tensor) -> torch.Tensor:
    """Pad by numpy to one legal size, and run the network once."""
    sizes = image.shape[2:]
    padding = []
    for size, margin, step, least in zip(
        sizes, network.margin, network.step, network.valid_sizes.smallest, strict=True
    ):
        whole = least
        while whole - 2 * margin < size:
            whole += step
        padding.append((margin, whole - margin - size))
    padded = np.pad(image.numpy(), [(0, 0), (0, 0), *padding], mode="reflect")
    with torch.no_grad():
        return network(torch.from_numpy(padded))[(..., *map(slice, sizes))]


def test_reference_logits_of_a_whole_image_are_reproduced():
    with np.load(GOLDEN / "unet2d_valid.npz") as file:
        state = {key.removeprefix("state/"): file[key] for key in file.files if key.startswith("state/")}
    with np.load(GOLDEN / "unet2d_overlap_tile.npz") as file:
        image, expected = torch.from_numpy(file["input"]), torch.from_numpy(file["output/logits"])
    network = from_reference("unet-2015", state)
    with torch.no_grad():
        for tile in (204, (220, 252), 572):
            found = OverlapTileInferer(tile, 4)(image, network)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [48, 52, (60, 48), 400])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_any_tile_size_gives_the_logits_of_one_large_tile(tile, batch):
    network = valid_unet(2)
    image = random_image(2, 1, 53, 71)
    with torch.no_grad():
        found = OverlapTileInferer(tile, batch)(image, network)
    torch.testing.assert_close(found, in_one_piece(network, image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(29, 31, 33), (7, 40, 1), (2, 3, 50)])
def test_volumes_and_axes_shorter_than_the_margin_are_mirrored_like_numpy_does(size):
    network = valid_unet(3)
    assert network.margin == (20, 20, 20)
    image = random_image(1, 1, *size)
    with torch.no_grad():
        found = OverlapTileInferer((48, 48, 52), 2)(image, network)
    torch.testing.assert_close(found, in_one_piece(network, image), atol=1e-5, rtol=1e-5)


def test_thick_slice_strides_set_the_step_per_axis():
    torch.manual_seed(0)
    network = UNet(3, 1, 2, (3, 4, 5), strides=((1, 2, 2), (2, 2, 2)), padding="valid", dropout=0.0).eval()
    tile = [least + step for least, step in zip(network.valid_sizes.smallest, network.step, strict=True)]
    image = random_image(1, 1, 11, 23, 19)
    with torch.no_grad():
        found = OverlapTileInferer(tile, 4)(image, network)
    torch.testing.assert_close(found, in_one_piece(network, image), atol=1e-5, rtol=1e-5)


def test_a_constant_image_gives_a_constant_result():
    """With interpolation: an up-convolution has a weight of its own for each pixel of a square."""
    torch.manual_seed(0)
    network = UNet(2, 1, 3, (4, 6, 8, 10), padding="valid", upsample="interp", dropout=0.0).eval()
    with torch.no_grad():
        found = OverlapTileInferer(network.valid_sizes.smallest[0] + 8, 8)(torch.full((1, 1, 61, 50), 0.7), network)
    torch.testing.assert_close(found, found[..., :1, :1].expand_as(found), atol=1e-5, rtol=0)
    assert found.std(dim=1).min() > 1e-3


def test_the_naive_step_puts_tile_beside_tile_and_moves_the_pooling_grid():
    network = valid_unet(2, depth=4)
    image = random_image(1, 1, 40, 40)
    with torch.no_grad():
        naive = OverlapTileInferer(204, step="tile")(image, network)
        padded = np.pad(image.numpy(), [(0, 0), (0, 0), (92, 92), (92, 92)], mode="reflect")
        for top, left in ((0, 0), (0, 20), (20, 0), (20, 20)):
            tile = network(torch.from_numpy(padded[..., top : top + 204, left : left + 204].copy()))
            torch.testing.assert_close(naive[..., top : top + 20, left : left + 20], tile, atol=1e-5, rtol=1e-5)
    assert (naive - in_one_piece(network, image)).abs().max() > 0.01


def test_tiles_reach_the_network_in_batches_across_images_and_progress_ends_at_their_number():
    network = valid_unet(2)
    inferer = OverlapTileInferer(52, 4)
    told: list[tuple[int, int]] = []
    sizes: list[tuple[int, ...]] = []
    inferer.on_progress = lambda done, total: told.append((done, total))

    def spy(tiles: torch.Tensor, scale: float) -> torch.Tensor:
        sizes.append(tuple(tiles.shape))
        return network(tiles) * scale

    spy.valid_sizes = network.valid_sizes
    with torch.no_grad():
        found = inferer(random_image(3, 1, 20, 30), spy, scale=2.0)
        expected = in_one_piece(network, random_image(3, 1, 20, 30)) * 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # 2 x 3 tiles of 12 x 12 pixels for each of 3 images.
    assert sizes == [(4, 1, 52, 52)] * 4 + [(2, 1, 52, 52)]
    assert told == [(4, 18), (8, 18), (12, 18), (16, 18), (18, 18)]


def test_a_large_image_is_neither_copied_nor_padded():
    """One stored pixel stands for 400 billion: any copy would not fit."""
    image = torch.zeros(1, 1, 1, 1).expand(1, 1, 20_000, 20_000_000)
    network = valid_unet(2)
    seen = 0

    class EnoughError(Exception):
        pass

    def first_tiles(tiles: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(tiles)
        raise EnoughError

    first_tiles.valid_sizes = network.valid_sizes
    with pytest.raises(EnoughError):
        OverlapTileInferer(72, 3)(image, first_tiles)
    assert seen == 3


def test_tiles_and_logits_go_to_the_devices_asked_for():
    """The device "meta" stands for another one that every machine has."""
    network = valid_unet(2).to("meta")
    inferer = OverlapTileInferer(52, sw_device="meta", device="meta")
    assert inferer(random_image(1, 1, 20, 20), network).device.type == "meta"
    found = OverlapTileInferer(52, device="meta")(random_image(1, 1, 20, 20), valid_unet(2))
    assert found.device.type == "meta"


def test_metadata_of_the_image_comes_with_the_logits():
    affine = torch.diag(torch.tensor([0.5, 0.5, 2.0, 1.0], dtype=torch.float64))
    image = MetaTensor(random_image(1, 1, 20, 20), affine=affine)
    kinds = []
    network = valid_unet(2)

    def spy(tiles: torch.Tensor) -> torch.Tensor:
        kinds.append(type(tiles))
        return network(tiles)

    spy.valid_sizes = network.valid_sizes
    with torch.no_grad():
        found = OverlapTileInferer(52)(image, spy)
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, affine)
    assert set(kinds) == {torch.Tensor}


def test_a_foreign_network_works_with_a_given_margin_and_stride():
    convolution = torch.nn.Conv2d(1, 2, 5)
    image = random_image(1, 1, 17, 23)
    with torch.no_grad():
        found = OverlapTileInferer(11, 2, margin=2, stride=1)(image, convolution)
        expected = convolution(torch.from_numpy(np.pad(image.numpy(), [(0, 0), (0, 0), (2, 2), (2, 2)], "reflect")))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(SizeError, match=r"margin of 3x3 should give 1 output\(s\) of 5x5.*shape \(1, 2, 7, 7\)"):
        OverlapTileInferer(11, margin=3, stride=1)(image, convolution)


@pytest.mark.parametrize(
    ("options", "image", "message"),
    [
        ({"tile_size": 50}, (1, 1, 90, 90), r"50 on axis 0 \(use 48 with output 8 or 52 with output 12\)"),
        ({"tile_size": (52, 20)}, (1, 1, 90, 90), r"20 on axis 1 \(use 44 with output 4\)"),
        ({"tile_size": (52, 52, 52)}, (1, 1, 90, 90), "2 for 2 spatial axes"),
        ({"tile_size": 0}, (1, 1, 90, 90), "invalid tile_size=0"),
        ({"tile_size": 52}, (1, 1, 90, 90, 90), "the network is 2D, the image has 3"),
        ({"tile_size": 52}, (1, 1, 0, 90), "empty image"),
        ({"tile_size": 40, "margin": 20, "stride": 4}, (1, 1, 90, 90), "too small.*Use 44"),
        ({"tile_size": 42, "margin": 20, "stride": 4}, (1, 1, 90, 90), "has an output of 2 voxels.*Use 46 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_those_that_can(options, image, message):
    with pytest.raises(SizeError, match=message):
        OverlapTileInferer(**options)(torch.zeros(image), valid_unet(2))


def test_a_result_shorter_than_the_stride_serves_small_images_only():
    network = valid_unet(2, depth=4)
    with torch.no_grad():
        small = OverlapTileInferer(188)(random_image(1, 1, 4, 3), network)
    torch.testing.assert_close(small, in_one_piece(network, random_image(1, 1, 4, 3)), atol=1e-5, rtol=1e-5)
    with pytest.raises(SizeError, match=r"has an output of 4 voxels, less than the total stride.*Use 204 or more"):
        OverlapTileInferer(188)(random_image(1, 1, 40, 40), network)


def test_padded_networks_are_sent_to_the_sliding_window():
    with pytest.raises(RequestError, match=r"this UNet is padded.*use SlidingWindowInferer"):
        OverlapTileInferer(64)(torch.zeros(1, 1, 64, 64), UNet(2, 1, 2, (2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "half"}, "step='half'"),
        ({"sw_batch_size": 0}, "sw_batch_size=0"),
        ({"margin": 4}, "set both or neither"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        OverlapTileInferer(64, **options)


def test_it_is_an_inferer_of_monai():
    assert isinstance(OverlapTileInferer(64), monai.inferers.Inferer)
