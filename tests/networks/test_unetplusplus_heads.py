"""Heads of UNet++: what they compute, which gradient they send, and pruning to one of them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn
from torch.nn.modules.conv import _ConvNd

from medseg.errors import RequestError, SizeError
from medseg.networks import UNetPlusPlus


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def small(dims: int = 2, features: tuple[int, ...] = (4, 5, 6, 7), **options) -> UNetPlusPlus:
    torch.manual_seed(0)
    return UNetPlusPlus(dims, 1, 2, features, **options)


def image(dims: int = 2, size: tuple[int, ...] = (16, 24, 16), batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, *size[:dims], generator=torch.Generator().manual_seed(1))


def node(network: UNetPlusPlus, row: int, column: int) -> nn.Module:
    """Return X(row,column)."""
    diagonal = network.diagonals[row + column]
    return diagonal.nodes[column - 1] if column else diagonal.encoder


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("dims", [2, 3])
def test_any_depth_gives_one_full_size_head_per_level_shallow_first(depth, dims):
    network = small(dims, (2, 3, 4, 5, 6, 7)[: depth + 1]).eval()
    size = (2**depth,) * dims
    with torch.no_grad():
        output = network.forward_train(image(dims, size, batch=1))
        assert [tuple(a.shape) for a in output["aux"]] == [(1, 2, *size)] * depth
        for level, head in zip(network.levels, output["aux"], strict=True):
            network.set_output("head", head=level)
            assert torch.equal(network(image(dims, size, batch=1)), head)
    assert torch.equal(output["logits"], output["aux"][-1])


def test_taps_are_the_deepest_of_the_nested_networks():
    network = small().eval()
    seen = {}
    for row in range(4):
        for column in range(4 - row):
            node(network, row, column).register_forward_hook(
                lambda module, inputs, output, key=(row, column): seen.update({key: output})
            )
    features = network.forward_train(image())["features"]
    expected = {"E1": (0, 0), "E2": (1, 0), "E3": (2, 0), "B": (3, 0), "D3": (2, 1), "D2": (1, 2), "D1": (0, 3)}
    assert list(features) == list(expected)
    assert all(features[name] is seen[key] for name, key in expected.items())


def test_without_deep_supervision_only_the_deepest_head_exists():
    network = small(deep_supervision=False)
    assert network.levels == (3,)
    assert list(network.heads) == ["3"]
    output = network.forward_train(image())
    assert len(output["aux"]) == 1
    assert output["aux"][0] is output["logits"]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dims", [2, 3])
def test_accurate_mode_is_the_mean_of_the_heads_probabilities(dims, activation):
    network = small(dims, output_mode="mean", head_activation=activation).double().eval()
    probability = torch.sigmoid if activation == "sigmoid" else lambda z: z.softmax(1)
    with torch.no_grad():
        output = network.forward_train(image(dims).double())
        mean = torch.stack([probability(z) for z in output["aux"]]).mean(0)
        torch.testing.assert_close(probability(network(image(dims).double())), mean, atol=1e-12, rtol=1e-12)
    assert (mean - probability(torch.stack(output["aux"]).mean(0))).abs().max() > 1e-6


LOG3 = float(np.log(3))


class Fixed(nn.Module):
    """A head that says one number per channel."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        return self.logits.view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(200.0, 200.0, 200.0), (-90.0, -90.0, -90.0), (200.0, -200.0, 0.0), (30.0, 40.0, 30.693102), (-150.0, 0.0, -LOG3)],
)
def test_mean_of_sure_heads_neither_overflows_nor_saturates(first, second, expected):
    network = UNetPlusPlus(2, 1, 1, (2, 2, 2), output_mode="mean")
    network.heads["1"], network.heads["2"] = Fixed(first), Fixed(second)
    assert network(image(size=(4, 4)))[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_softmax_mean_of_sure_heads_neither_overflows_nor_saturates():
    network = small(features=(2, 2, 2), output_mode="mean", head_activation="softmax")
    network.heads["1"], network.heads["2"] = Fixed(300.0, -300.0), Fixed(100.0, -100.0)
    logits = network(image(size=(4, 4)))[0, :, 0, 0]
    assert (logits[0] - logits[1]).item() == pytest.approx(200 + np.log(2))


def test_mean_passes_gradient_to_every_head_even_where_all_are_sure():
    network = UNetPlusPlus(2, 1, 1, (2, 2, 2), output_mode="mean")
    for head in network.heads.values():
        nn.init.constant_(head.bias, 60.0)
    network(image(size=(8, 8))).sum().backward()
    grads = [head.bias.grad for head in network.heads.values()]
    assert all(g.isfinite().all() and g.any() for g in grads)


def test_half_precision_mean_is_computed_in_float32():
    network = UNetPlusPlus(2, 1, 1, (2, 2, 2), output_mode="mean")
    network.heads["1"], network.heads["2"] = Fixed(9.0), Fixed(11.0)
    expected = network(image(size=(4, 4)))
    for fixed in network.heads.values():
        fixed.logits = fixed.logits.bfloat16()
    assert torch.equal(network(image(size=(4, 4))), expected.bfloat16())


def count_convolutions(network: nn.Module, x: torch.Tensor) -> int:
    calls = []
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in network.modules() if isinstance(m, _ConvNd)]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return len(calls)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_fast_mode_computes_only_the_nodes_that_its_head_needs(level, training):
    network = small(features=(2, 3, 4, 5, 6)).train(training)
    network.set_output("head", head=level)
    nodes, ups = (level + 1) * (level + 2) // 2, level * (level + 1) // 2
    assert count_convolutions(network, image(size=(16, 16))) == 2 * nodes + ups + 1
    assert count_convolutions(network.prune(level), image(size=(16, 16))) == 2 * nodes + ups + 1


def test_scripted_fast_mode_gives_the_logits_of_its_head():
    network = small(norm="batch").eval()
    network.set_output("head", head=2)
    torch.testing.assert_close(torch.jit.script(network)(image(size=(5, 9))), network(image(size=(5, 9))))


def test_accurate_mode_computes_every_node_once():
    network = small(features=(2, 3, 4, 5, 6), output_mode="mean", head_activation="softmax")
    assert count_convolutions(network, image(size=(16, 16))) == 2 * 15 + 10 + 4


def test_fast_mode_needs_the_image_size_of_its_head_only():
    network = small(features=(2, 3, 4, 5, 6)).eval()
    with pytest.raises(SizeError, match=r"needs at least.*5x8.*valid size is 16x16"):
        network(image(size=(5, 8)))
    network.set_output("head", head=2)
    assert network(image(size=(5, 8))).shape[2:] == (5, 8)


def test_a_sliding_window_gives_the_logits_of_the_whole_image():
    network = small(3, output_mode="mean", head_activation="softmax").eval()
    x = image(3, (16, 16, 16))
    with torch.no_grad():
        found = SlidingWindowInferer((16, 16, 16), overlap=0.5)(x, network)
        torch.testing.assert_close(found, network(x))


def without_gradient(network: UNetPlusPlus, heads: slice) -> set[tuple[int, int]]:
    """Return the nodes that the losses of some heads do not reach."""
    aux = network.forward_train(image())["aux"]
    sum(logits.square().mean() for logits in aux[heads]).backward()
    depth = len(network.diagonals) - 1
    return {
        (row, column)
        for row in range(depth + 1)
        for column in range(depth + 1 - row)
        if any(p.grad is None or not p.grad.any() for p in node(network, row, column).parameters() if p.dim() > 1)
    }


INNER = {(0, 1), (0, 2), (1, 1)}


def test_long_skips_alone_leave_inner_nodes_without_gradient_from_the_last_head():
    assert without_gradient(small(skip_mode="long"), slice(-1, None)) == INNER


@pytest.mark.parametrize("skip_mode", ["dense", "short"])
def test_dense_and_short_skips_pass_gradient_from_the_last_head_to_every_node(skip_mode):
    assert without_gradient(small(skip_mode=skip_mode), slice(-1, None)) == set()


@pytest.mark.parametrize("skip_mode", ["dense", "short", "long"])
def test_all_heads_together_reach_every_node_in_every_skip_mode(skip_mode):
    assert without_gradient(small(skip_mode=skip_mode), slice(None)) == set()


def test_skip_modes_differ_only_by_what_a_node_joins():
    """Dense weights whose surplus inputs are zero give the long and the short network."""
    kept = {"long": lambda j: [0, j], "short": lambda j: [j - 1, j]}
    for skip_mode, maps in kept.items():
        network, dense = small(skip_mode=skip_mode).eval(), small().eval()
        state = dict(network.state_dict())
        for name, target in dense.state_dict().items():
            if name.endswith("convs.0.conv.weight"):
                _, diagonal, _, place, *_ = name.split(".")
                j, width = int(place) + 1, network.arguments["features"][int(diagonal) - int(place) - 1]
                wide = torch.zeros_like(target)
                for n, source in enumerate(maps(j)):
                    wide[:, source * width : (source + 1) * width] = state[name][:, n * width : (n + 1) * width]
                state[name] = wide
        dense.load_state_dict(state)
        torch.testing.assert_close(dense(image()), network(image()))


def test_concatenation_order_moves_the_up_sampled_channels():
    first, last = small(cat_order="up_first").eval(), small().eval()
    state = dict(first.state_dict())
    for name, weight in state.items():
        if name.endswith("convs.0.conv.weight"):
            state[name] = torch.cat([weight[:, len(weight) :], weight[:, : len(weight)]], dim=1)
    last.load_state_dict(state)
    torch.testing.assert_close(last(image()), first(image()))


FORMS = {
    "deconv": {},
    "batch-interp": {"norm": "batch", "upsample": "interp"},
    "instance-conv": {"norm": "instance", "down": "conv", "act": "leakyrelu", "up_bias": False, "head_bias": False},
    "long": {"skip_mode": "long"},
    "short": {"skip_mode": "short", "norm": "batch", "bias": False},
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("dims", [2, 3])
def test_pruned_network_is_its_head_bit_for_bit_at_every_level(dims, form):
    network = small(dims, **FORMS[form])
    network.forward_train(image(dims))  # moves the statistics of batch norm
    network.eval()
    x = image(dims, (17, 19, 18), batch=1)
    with torch.no_grad():
        heads = network.forward_train(x)["aux"]
        for level, head in zip(network.levels, heads, strict=True):
            pruned = network.prune(level)
            assert torch.equal(pruned(x), head)
            assert torch.equal(network.prune(level, keep_heads=True).forward_train(x)["aux"][0], heads[0])


@pytest.mark.parametrize("keep_heads", [False, True])
@pytest.mark.parametrize("level", [1, 2])
def test_pruned_state_is_a_smaller_part_of_the_whole_with_the_same_names(level, keep_heads):
    network = small(norm="batch")
    whole = network.state_dict()
    part = network.prune(level, keep_heads=keep_heads).state_dict()
    dropped = {"diagonals": range(level + 1), "heads": range(1 if keep_heads else level, level + 1)}
    kept = {name for name in whole if int(name.split(".")[1]) in dropped[name.split(".")[0]]}
    assert set(part) == kept
    assert len(kept) < len(whole)
    assert all(torch.equal(part[name], whole[name]) for name in part)


def file_size(network: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.tell()


def test_every_level_is_smaller_in_memory_and_on_disk():
    network = small(features=(8, 16, 32, 64))
    levels = [network.prune(level) for level in network.levels]
    counts = [parameters(pruned) for pruned in levels]
    assert counts == sorted(counts)
    assert counts == [size.parameters for size in network.level_sizes()[:-1]]
    assert counts[-1] < parameters(network)
    files = [file_size(pruned) for pruned in levels]
    assert files[0] < files[1] < files[2] < file_size(network)


def test_pruned_network_has_its_own_weights_and_the_mode_of_the_whole():
    network = small(norm="batch")
    pruned = network.train().prune(2)
    assert pruned.training
    assert not network.eval().prune(2).training
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        for tensor in pruned.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(p.requires_grad for p in pruned.parameters())


def test_pruning_draws_no_random_numbers():
    network = small()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    network.prune(2)
    assert torch.equal(torch.rand(1), expected)


def test_pruned_network_trains_is_pruned_again_scripted_and_rebuilt_from_its_arguments(tmp_path):
    network = small(norm="batch", output_mode="mean", head_activation="softmax", strides=(2, (1, 2), 2))
    pruned = network.prune(2, keep_heads=True)
    output = pruned.forward_train(image())
    sum(logits.square().mean() for logits in output["aux"]).backward()
    assert all(p.grad is not None for p in pruned.parameters())
    pruned.eval()
    again = pruned.prune(1)
    assert again.levels == (1,)
    with torch.no_grad():
        assert torch.equal(again(image()), pruned.forward_train(image())["aux"][0])
        torch.testing.assert_close(torch.jit.script(again)(image()), again(image()))
    torch.save(again.state_dict(), tmp_path / "model.pt")
    rebuilt = UNetPlusPlus(**json.loads(json.dumps(again.arguments))).eval()
    rebuilt.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(rebuilt(image()), again(image()))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_pruning_lowers_the_smallest_image_to_the_depth_left(level):
    pruned = small().eval().prune(level)
    n = 2**level
    assert pruned(image(size=(n, n))).shape[2:] == (n, n)
    with pytest.raises(SizeError, match=f"{n}x{n}"):
        pruned(image(size=(n - 1, n)))


def test_pruning_needs_heads_that_were_built_for_training():
    with pytest.raises(RequestError, match=r"level 2: only head 3 was built \(deep_supervision=False\)"):
        small(deep_supervision=False).prune(2)
    with pytest.raises(RequestError, match="level 4: choose one of 1, 2, 3"):
        small().prune(4)
