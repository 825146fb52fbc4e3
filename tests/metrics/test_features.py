"""Analysis of features: reference values, properties, and maps of a network that are known in advance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import Tensor

from medseg.errors import RequestError, SizeError
from medseg.metrics.features import (
    attention_maps,
    boundary_share,
    channel_similarity,
    energy_inside,
    grad_cam,
    linear_cka,
    redundancy,
    tap_similarity,
)
from medseg.networks import UNet
from medseg.training.taps import FeatureTaps

GOLDEN = Path(__file__).parents[1] / "golden" / "selfreg.npz"
EXACT = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def diagnostics() -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        found = {name: file[name] for name in file.files if name.startswith("diag/")}
    return {name.removeprefix("diag/"): torch.from_numpy(np.array(value)) for name, value in found.items()}


@pytest.mark.parametrize("tap", ["enc1", "enc2", "dec1"])
def test_reference_similarity_and_redundancy(diagnostics, tap):
    feature = diagnostics[f"{tap}/feature"]
    torch.testing.assert_close(channel_similarity(feature), diagnostics[f"{tap}/channel_similarity"], **EXACT)
    torch.testing.assert_close(redundancy(feature), diagnostics[f"{tap}/redundancy"], **EXACT)


def test_reference_similarity_of_blocks(diagnostics):
    features = {tap: diagnostics[f"{tap}/feature"] for tap in ("enc1", "enc2", "dec1")}
    torch.testing.assert_close(tap_similarity(features).float(), diagnostics["cka"], **EXACT)


@pytest.mark.parametrize("name", ["cam", "cam3d"])
def test_reference_attention(diagnostics, name):
    found = grad_cam(diagnostics[f"{name}/activation"], diagnostics[f"{name}/gradient"])
    torch.testing.assert_close(found, diagnostics[f"{name}/lowres"], **EXACT)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equal_and_opposite_channels(dims):
    one = torch.randn(2, 1, *(6,) * dims)
    similarity = channel_similarity(torch.cat([one, 3 * one, -one], 1))
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]]))
    torch.testing.assert_close(redundancy(torch.cat([one, 3 * one], 1)), torch.tensor(1.0))
    torch.testing.assert_close(redundancy(torch.cat([one, -one], 1)), torch.tensor(-1.0))
    assert redundancy(one) == 0


def test_dead_channels_are_like_none():
    feature = torch.randn(2, 3, 4, 4)
    feature[:, 1] = 0
    assert channel_similarity(feature)[1].tolist() == [0, 0, 0]


def test_cka_ignores_rotation_and_scale_and_knows_strangers():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 4, 10, 10, generator=generator)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    rotated = 5 * torch.einsum("cd,bdhw->bchw", rotation, first) + 7
    stranger = torch.randn(2, 6, 10, 10, generator=generator)
    assert float(linear_cka(first, rotated)) == pytest.approx(1, abs=1e-6)
    assert float(linear_cka(first, stranger)) < 0.1
    assert float(linear_cka(first, stranger)) == pytest.approx(float(linear_cka(stranger, first)))
    assert float(linear_cka(first, torch.ones(2, 3, 10, 10))) == 0


def test_cka_needs_common_positions():
    with pytest.raises(SizeError, match=r"\(1, 2, 4, 4\) and \(1, 2, 8, 8\)"):
        linear_cka(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize("size", [(8, 8), (4, 6, 8)])
def test_attention_of_a_linear_head_is_known(size):
    """With logits that are sums of channels, the weights of the map are the head's, times the size of the class."""
    feature = torch.rand(2, 2, *size).requires_grad_()
    head = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 2.0]])
    logits = torch.einsum("kc,bc...->bk...", head, feature)
    label = torch.zeros(2, 1, *size)
    label[:, :, 1:3, 2:5] = 1
    label[:, :, 3:] = 2
    maps = attention_maps({"logits": logits, "features": {"D1": feature}}, label)

    def scaled(cam: Tensor) -> Tensor:
        flat = cam.flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        shape = (-1, *(1,) * len(size))
        return (cam - low.reshape(shape)) / (high - low).reshape(shape)

    a, b = feature.detach().unbind(1)
    expected = scaled(a) + scaled((2 * b - a).relu())
    peak = expected.flatten(1).amax(1).reshape(-1, *(1,) * len(size))
    torch.testing.assert_close(maps["D1"], expected / peak, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_attention_of_networks_has_the_size_of_the_image(dims, labelled):
    torch.manual_seed(0)
    image = torch.randn(2, 1, *(32,) * dims)
    label = torch.randint(0, 3, (2, 1, *(32,) * dims)) if labelled else None
    maps = attention_maps(UNet(dims, 1, 3, (4, 6, 8)).eval().forward_train(image), label)
    assert list(maps) == ["E1", "E2", "B", "D2", "D1"]
    foreign = BasicUNet(dims, 1, 3, (4, 4, 4, 4, 8, 4)).eval()
    with FeatureTaps(foreign) as taps:
        logits = foreign(image)
        maps |= attention_maps({"logits": logits, "features": taps.features}, label)
    assert len(maps) == 9
    for found in maps.values():
        assert found.shape == (2, *image.shape[2:])
        assert not found.requires_grad
        assert (found >= 0).all()
        assert float(found.max()) == pytest.approx(1, abs=1e-5)


def test_attention_without_a_class_is_empty_and_one_channel_is_foreground():
    network = UNet(2, 1, 3, (4, 6)).eval()
    image = torch.randn(1, 1, 16, 16)
    maps = attention_maps(network.forward_train(image), torch.zeros(1, 1, 16, 16))
    assert all((found == 0).all() for found in maps.values())
    feature = torch.rand(1, 1, 8, 8).requires_grad_()
    maps = attention_maps({"logits": feature * 2 - 1, "features": {"D1": feature}})
    assert float(maps["D1"].max()) == pytest.approx(1, abs=1e-5)


def test_attention_says_what_it_lacks():
    network, image = UNet(2, 1, 2, (4, 6)).eval(), torch.randn(1, 1, 16, 16)
    with torch.no_grad(), pytest.raises(RequestError, match="require gradients"):
        attention_maps(network.forward_train(image))
    with pytest.raises(RequestError, match="no features"):
        attention_maps({"logits": network(image)})


def test_shares_of_an_even_map_are_those_of_the_voxels():
    mask = torch.zeros(2, 20, 30)
    mask[0, 5:15, 10:20] = 1
    mask[1, :, :15] = 2
    even = torch.ones(2, 20, 30)
    assert energy_inside(even, mask).tolist() == pytest.approx([100 / 600, 300 / 600])
    # Three voxels on either side: a 16 x 16 square without its 4 x 4 core, and a strip of 6 columns.
    assert boundary_share(even, mask).tolist() == pytest.approx([(256 - 16) / 600, 120 / 600])
    assert boundary_share(even, mask, width=1).tolist() == pytest.approx([(144 - 64) / 600, 40 / 600])


def test_shares_in_3d_and_of_an_empty_map():
    mask = torch.zeros(1, 12, 12, 12)
    mask[:, 4:8, 4:8, 4:8] = 1
    attention = mask.clone()
    attention[:, 0, 0, 0] = 64
    assert energy_inside(attention, mask).tolist() == [0.5]
    assert boundary_share(attention, mask, width=1).tolist() == pytest.approx([(64 - 8) / 128])
    assert energy_inside(torch.zeros(1, 12, 12, 12), mask).isnan().all()
    assert boundary_share(attention, torch.zeros_like(mask)).tolist() == [0]
