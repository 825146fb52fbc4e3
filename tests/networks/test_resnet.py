"""The dilated ResNet: dilations, strides, first weights and published ones."""

from __future__ import annotations

import logging
import pickle
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from medseg.errors import RequestError, WeightsError
from medseg.networks import BANet
from medseg.networks.resnet import BLOCKS, ResNetDilated, load_pretrained, per_axis


def narrow(
    dims: int = 2, in_channels: int = 3, blocks: tuple[int, ...] = (1, 2, 1, 1), **options: Any
) -> ResNetDilated:
    torch.manual_seed(0)
    return ResNetDilated(dims, in_channels, blocks, **{"base_width": 4, **options})


@pytest.mark.parametrize(
    ("blocks", "options", "expected"),
    [
        (BLOCKS["resnet50"], {}, ([1] * 3, [1] * 4, [1, 2, 2, 2, 2, 2], [4, 4, 4])),
        (BLOCKS["resnet50"], {"multi_grid": None}, ([1] * 3, [1] * 4, [1, 2, 2, 2, 2, 2], [2, 4, 4])),
        ((2, 2, 2, 3), {"multi_grid": None, "dilations": (2, 2)}, ([1, 1], [1, 1], [1, 2], [1, 2, 2])),
        ((1, 1, 1, 5), {"multi_grid": (1, 2, 4)}, ([1], [1], [1], [1, 2, 4, 1, 2])),
        ((1, 1, 2, 2), {"multi_grid": None, "dilations": (1, 5)}, ([1], [1], [1, 1], [2, 5])),
    ],
)
def test_dilations_of_the_blocks(blocks, options, expected):
    with torch.device("meta"):
        network = ResNetDilated(2, 3, blocks, **options)
    for stage, dilations in zip(("layer1", "layer2", "layer3", "layer4"), expected, strict=True):
        convolutions = [block.conv2 for block in getattr(network, stage)]
        assert [c.dilation for c in convolutions] == [(d, d) for d in dilations]
        assert [c.padding for c in convolutions] == [(d, d) for d in dilations]


@pytest.mark.parametrize("dims", [2, 3])
def test_default_strides_are_4_8_8_8_rounded_up(dims):
    network = narrow(dims)
    size = (65, 40, 18)[:dims]
    maps = network(torch.randn(2, 3, *size))
    assert [m.shape[1] for m in maps] == list(network.channels) == [16, 32, 64, 128]
    for m, stride in zip(maps, (4, 8, 8, 8), strict=True):
        assert tuple(m.shape[2:]) == tuple(-(-n // stride) for n in size)
    assert network.stage_strides == [(4,) * dims, *[(8,) * dims] * 3]


def test_axes_that_the_pooling_does_not_shrink_are_not_pooled():
    network = narrow(3, strides=((1, 2, 2), (1, 2, 2), 1, 2, 1, 1))
    assert network.maxpool.kernel_size == (1, 3, 3)
    assert network.stage_strides[-1] == (2, 8, 8)
    assert isinstance(narrow(strides=(2, 1, 1, 2, 1, 1)).maxpool, nn.Identity)


@pytest.mark.parametrize("dims", [2, 3])
def test_first_weights_follow_the_rule_of_channels_written(dims):
    for name, module in narrow(dims, in_channels=8, base_width=16).named_modules():
        if isinstance(module, _ConvNd):
            written = module.out_channels * torch.Size(module.kernel_size).numel()
            assert float(module.weight.detach().std()) == pytest.approx(sqrt(2 / written), rel=0.1), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1, 1, 1)}, "each of the 4 stages"),
        ({"blocks": (1, 0, 1, 1)}, "each of the 4 stages"),
        ({"strides": (2, 2, 1, 2)}, "6 entries"),
        ({"strides": (2, 2, 1, (2, 0), 1, 1)}, "at least 1"),
        ({"dilations": (2,)}, "two integers"),
        ({"dilations": (0, 4)}, "two integers"),
        ({"dilations": (2, 2)}, r"multi_grid=\(4, 4, 4\).*contradicts dilations=\(2, 2\)"),
        ({"multi_grid": (0, 4)}, "contradicts"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        narrow(**options)


def test_a_number_is_spelled_out_per_axis():
    assert per_axis("x", 3, 2) == (3, 3)
    assert per_axis("x", [0, 1, 2], 3, least=0) == (0, 1, 2)
    with pytest.raises(RequestError, match=r"\(1, 2\) in x; .*3 of them"):
        per_axis("x", (1, 2), 3)


# Published weights


def published(blocks: tuple[int, ...], width: int, colors: int = 3) -> dict[str, Tensor]:
    """Return random weights under the names and in the shapes of published ResNets with bottlenecks."""
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}

    def add(convolution: str, norm: str, *shape: int) -> None:
        state[f"{convolution}.weight"] = torch.randn(*shape, generator=generator)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{leaf}"] = torch.rand(shape[0], generator=generator)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    add("conv1", "bn1", width, colors, 7, 7)
    read = width
    for stage, count in enumerate(blocks):
        planes = width * 2**stage
        for n in range(count):
            name = f"layer{stage + 1}.{n}"
            add(f"{name}.conv1", f"{name}.bn1", planes, read, 1, 1)
            add(f"{name}.conv2", f"{name}.bn2", planes, planes, 3, 3)
            add(f"{name}.conv3", f"{name}.bn3", 4 * planes, planes, 1, 1)
            if n == 0:
                add(f"{name}.downsample.0", f"{name}.downsample.1", 4 * planes, read, 1, 1)
            read = 4 * planes
    return {**state, "fc.weight": torch.zeros(1000, read), "fc.bias": torch.zeros(1000)}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(published((1, 2, 1, 1), 4), path)
    return path


def test_published_weights_load_by_name_and_the_classifier_is_left_out_with_a_word(weights, caplog):
    network = narrow()
    with caplog.at_level(logging.INFO, "medseg"):
        load_pretrained(network, weights)
    for name, tensor in published((1, 2, 1, 1), 4).items():
        if not name.startswith("fc"):
            torch.testing.assert_close(network.state_dict()[name], tensor, msg=name)
    assert "skipped: fc.bias, fc.weight" in caplog.text
    assert "resnet.pth" in caplog.text


def test_the_network_takes_them_by_path(weights):
    network = BANet(2, 3, 2, blocks=(1, 2, 1, 1), base_width=4, reduce_dim=4, aspp_dim=4, pretrained=str(weights))
    torch.testing.assert_close(network.backbone.conv1.weight.detach(), published((1, 2, 1, 1), 4)["conv1.weight"])


def test_a_gray_stem_equals_the_gray_image_in_three_colors(weights):
    color, gray = narrow().eval(), narrow(in_channels=1).eval()
    load_pretrained(color, weights)
    load_pretrained(gray, weights)
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        for found, expected in zip(gray(image), color(image.expand(1, 3, 32, 32)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.max()), rtol=1e-4)


def test_a_prefix_of_parallel_training_and_a_wrapping_are_ignored(tmp_path):
    state = published((1, 2, 1, 1), 4)
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, tmp_path / "wrapped.pth")
    network = narrow()
    load_pretrained(network, tmp_path / "wrapped.pth")
    torch.testing.assert_close(network.bn1.running_var, state["bn1.running_var"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1, 3, 1, 1)}, r"missing \(15\): layer2\.2\.conv1\.weight.* and 3 more"),
        ({"blocks": (1, 1, 1, 1)}, r"unexpected \(18\): layer2\.1\.conv1\.weight.* and 6 more"),
        ({"in_channels": 2}, r"conv1\.weight \(4, 3, 7, 7\), expected \(4, 2, 7, 7\)"),
        ({"dims": 3}, r"\(4, 3, 7, 7\), expected \(4, 3, 7, 7, 7\)"),
        ({"norm": "instance"}, r"unexpected .*bn1\.weight"),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(options, message, weights):
    network = narrow(**options)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"do not match the backbone: .*resnet\.pth.*{message}"):
        load_pretrained(network, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class _Program:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("content", [_Program(), {"conv1.weight": "text"}, [1, 2]], ids=["code", "text", "list"])
def test_a_file_that_is_no_state_dict_is_refused_and_not_run(content, tmp_path, capsys):
    path = tmp_path / "odd.pth"
    torch.save(content, path, pickle_module=pickle)
    with pytest.raises(WeightsError, match=r"(unreadable weight file|no state dict in) .*odd\.pth"):
        load_pretrained(narrow(), path)
    assert not capsys.readouterr().out


def test_a_missing_file_and_garbage_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"file not found: pretrained=.*none\.pth"):
        load_pretrained(narrow(), tmp_path / "none.pth")
    (tmp_path / "garbage.pth").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=r"unreadable weight file .*garbage\.pth"):
        load_pretrained(narrow(), tmp_path / "garbage.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"unreadable weight file .*empty\.pth"):
        load_pretrained(narrow(), tmp_path / "empty.pth")
