"""Averages over mirror images and over networks, window by window."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medseg.errors import RequestError, SizeError, WeightsError
from medseg.inferers.ensemble import Ensemble, MirrorTTA
from medseg.inferers.overlap_tile import OverlapTileInferer
from medseg.inferers.sliding_window import SlidingWindowInferer
from medseg.networks import UNet, UNetPlusPlus
from medseg.training.wrapper import TrainingWrapper


def unet(seed: int = 0, dims: int = 2, **options) -> UNet:
    torch.manual_seed(seed)
    return UNet(dims, 1, 3, (3, 4), dropout=0.0, **options).eval()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def probability(logits: torch.Tensor, activation: str) -> torch.Tensor:
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(1)


SUBSETS_OF_THREE = [[], [2], [3], [4], [2, 3], [2, 4], [3, 4], [2, 3, 4]]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("axes", "flips"),
    [(None, SUBSETS_OF_THREE), ([0, 1, 2], SUBSETS_OF_THREE), ([0, 2], [[], [2], [4], [2, 4]]), ([1], [[], [3]])],
)
def test_mirrored_predictions_are_averaged_over_every_subset_of_the_axes(axes, flips, activation):
    network, x = unet(dims=3), image(2, 1, 6, 7, 8)
    with torch.no_grad():
        each = torch.stack([network(x.flip(flip)).flip(flip) for flip in flips])
        logits = MirrorTTA(network, axes)(x)
        mixed = MirrorTTA(network, axes, average="probabilities", activation=activation)(x)
    torch.testing.assert_close(logits, each.mean(0), atol=1e-6, rtol=1e-6)
    expected = torch.stack([probability(one, activation) for one in each]).mean(0)
    torch.testing.assert_close(probability(mixed, activation), expected, atol=1e-6, rtol=1e-5)
    assert (each.mean(0) - each[0]).abs().max() > 1e-3


def test_without_an_axis_the_network_answers_alone():
    network, x = unet().bfloat16(), image(1, 1, 8, 8).bfloat16()
    with torch.no_grad():
        found = MirrorTTA(network, [])(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, network(x))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weights", [None, (1, 2, 5), (0.1, 0.2, 0.5)])
def test_networks_are_averaged_by_weight(weights, activation):
    networks, x = [unet(seed) for seed in range(3)], image(2, 1, 8, 10)
    shares = torch.tensor(weights or (1, 1, 1)).float()
    shares = (shares / shares.sum()).reshape(3, 1, 1, 1, 1)
    with torch.no_grad():
        each = torch.stack([network(x) for network in networks])
        mixed = Ensemble(networks, weights=weights, activation=activation)(x)
        logits = Ensemble(networks, "logits", weights)(x)
    torch.testing.assert_close(logits, (shares * each).sum(0), atol=1e-6, rtol=1e-5)
    expected = (shares * torch.stack([probability(one, activation) for one in each])).sum(0)
    torch.testing.assert_close(probability(mixed, activation), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_equal_members_change_nothing(average, activation):
    network, x = unet(), image(1, 1, 8, 8)
    with torch.no_grad():
        found = Ensemble([network] * 3, average, (1, 2, 3), activation=activation)(x)
        expected = probability(network(x), activation)
    torch.testing.assert_close(probability(found, activation), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_one_member_is_returned_bit_for_bit(average):
    network, x = unet(), image(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(Ensemble([network], average, [0.3])(x), network(x))


def test_certain_members_stay_finite():
    class Certain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x * 0 + 1e4, x * 0 - 1e4], dim=1)

    for activation in ("softmax", "sigmoid"):
        found = Ensemble([Certain(), Certain()], activation=activation)(torch.zeros(1, 1, 2, 2))
        assert found.isfinite().all()
        assert torch.equal(
            probability(found, activation).round(), torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 2)[None]
        )


def test_half_precision_members_are_summed_in_float32():
    x = image(1, 1, 8, 8).bfloat16()
    networks = [unet(seed).bfloat16() for seed in range(2)]
    with torch.no_grad():
        each = [network(x).float() for network in networks]
        found = Ensemble(networks, "logits")(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, (each[0] + each[1]) / 2)


def test_state_dicts_become_members_and_leave_the_network_as_it_was():
    network = unet(9)
    before = copy.deepcopy(network.state_dict())
    sources = [unet(seed) for seed in range(2)]
    x = image(1, 1, 8, 8)
    ensemble = Ensemble.from_state_dicts(network, (source.state_dict() for source in sources), average="logits")
    with torch.no_grad():
        assert torch.equal(ensemble(x), (sources[0](x) + sources[1](x)) / 2)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module.training for module in ensemble.networks)
    with torch.no_grad():
        next(sources[0].parameters()).add_(1)
    assert not torch.equal(next(sources[0].parameters()), next(ensemble.parameters()))


def test_a_state_dict_of_another_network_is_named_by_its_number():
    other = UNet(2, 1, 3, (3, 5)).state_dict()
    with pytest.raises(WeightsError, match=r"ensemble member 2 do not match this UNet.*size mismatch for bottleneck"):
        Ensemble.from_state_dicts(unet(), [unet().state_dict(), other])


def test_evaluation_mode_and_weights_pass_through():
    ensemble = MirrorTTA(Ensemble([unet(0, norm="batch"), unet(1, norm="batch")])).train()
    assert all(module.training for module in ensemble.modules())
    ensemble.eval()
    assert not any(module.training for module in ensemble.modules())
    assert len(list(ensemble.parameters())) == 2 * len(list(unet(0, norm="batch").parameters()))


def test_networks_with_several_training_outputs_give_their_logits():
    torch.manual_seed(0)
    network = UNetPlusPlus(2, 1, 2, (2, 3, 4)).eval()
    x = image(1, 1, 8, 8)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(Ensemble([network, TrainingWrapper(network)], "logits")(x), expected)
        assert torch.equal(MirrorTTA(TrainingWrapper(network), [])(x), expected)


def test_a_sliding_window_over_the_wrapper_is_the_average_of_sliding_windows():
    networks, x = [unet(seed) for seed in range(2)], image(1, 1, 30, 25)
    windows = SlidingWindowInferer((16, 16), 1, 0.5, mode="gaussian")
    with torch.no_grad():
        found = windows(x, Ensemble(networks, "logits"))
        expected = (windows(x, networks[0]) + windows(x, networks[1])) / 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_unpadded_networks_are_tiled_through_both_wrappers():
    network, x = unet(padding="valid"), image(1, 1, 30, 25)
    tiles = OverlapTileInferer(28, 4)
    with torch.no_grad():
        found = tiles(x, MirrorTTA(Ensemble([network, network], "logits"), [0]))
        expected = (tiles(x, network) + tiles(x.flip(2), network).flip(2)) / 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_member():
    networks, x = [unet(seed) for seed in range(2)], image(1, 1, 8, 8)
    for average in ("probabilities", "logits"):
        ensemble = MirrorTTA(Ensemble(networks, average), [0])
        ensemble.zero_grad()
        ensemble(x)[:, 0].sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in ensemble.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ensemble([]), "at least one network"),
        (lambda: Ensemble([unet()], weights=[1, 2]), r"invalid weights=\[1, 2\].*1 network"),
        (lambda: Ensemble([unet(), unet()], weights=[1, 0]), "one positive number for each"),
        (lambda: Ensemble([unet()], weights=[float("inf")]), "one positive number for each"),
        (lambda: Ensemble([unet()], "votes"), "average='votes'"),
        (lambda: MirrorTTA(unet(), activation="relu"), "activation='relu'"),
        (lambda: MirrorTTA(unet(), [0, 0]), "distinct spatial axes"),
        (lambda: MirrorTTA(unet(), [-1]), "counted from 0"),
    ],
)
def test_options_that_cannot_be_are_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def test_images_and_outputs_that_do_not_fit_are_refused():
    with pytest.raises(SizeError, match=r"axes=\[2\] out of range for an image with 2 spatial axes"):
        MirrorTTA(unet(), [2])(image(1, 1, 8, 8))
    with pytest.raises(SizeError, match=r"shape mismatch .*: \(1, 3, 8, 8\) and \(1, 1, 8, 8\)"):
        Ensemble([unet(), nn.Identity()], "logits")(image(1, 1, 8, 8))
    with pytest.raises(RequestError, match=r"softmax.*one output channel"):
        Ensemble([nn.Identity(), nn.Identity()])(image(1, 1, 8, 8))
    lists = nn.Identity()
    lists.forward = lambda x: [x]
    with pytest.raises(RequestError, match="returned a list, expected one tensor"):
        Ensemble([lists])(image(1, 1, 8, 8))
