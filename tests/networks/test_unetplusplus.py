"""What is particular to UNet++: its nodes and counts, presets, sizes and options."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from medseg.errors import RequestError, SizeError
from medseg.networks import UNetPlusPlus
from medseg.networks.unetplusplus import preset

PAPER = (32, 64, 128, 256, 512)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def small(dims: int = 2, features: tuple[int, ...] = (4, 5, 6, 7), **options) -> UNetPlusPlus:
    torch.manual_seed(0)
    return UNetPlusPlus(dims, 1, 2, features, **options)


def image(dims: int = 2, size: tuple[int, ...] = (16, 24, 16), batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, *size[:dims], generator=torch.Generator().manual_seed(1))


# (row, column): channels into the first convolution, parameters in 2D and 3D with up-sampler; widths 32..512, 1 input.
NODES = {
    (0, 0): (1, 9_568, 28_576),
    (1, 0): (32, 55_424, 166_016),
    (2, 0): (64, 221_440, 663_808),
    (3, 0): (128, 885_248, 2_654_720),
    (4, 0): (256, 3_539_968, 10_617_856),
    (0, 1): (64, 35_936, 99_424),
    (1, 1): (128, 143_552, 397_504),
    (2, 1): (256, 573_824, 1_589_632),
    (3, 1): (512, 2_294_528, 6_357_760),
    (0, 2): (96, 45_152, 127_072),
    (1, 2): (192, 180_416, 508_096),
    (2, 2): (384, 721_280, 2_032_000),
    (0, 3): (128, 54_368, 154_720),
    (1, 3): (256, 217_280, 618_688),
    (0, 4): (160, 63_584, 182_368),
}


def node(network: UNetPlusPlus, row: int, column: int) -> nn.Module:
    """Return X(row,column)."""
    diagonal = network.diagonals[row + column]
    return diagonal.nodes[column - 1] if column else diagonal.encoder


def first_conv(network: UNetPlusPlus, row: int, column: int) -> _ConvNd:
    found = node(network, row, column)
    return (found.convs if column else found)[0].conv


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("row", "column"), list(NODES))
def test_every_node_has_the_channels_and_parameters_of_the_paper(dims, row, column):
    with torch.device("meta"):
        network = UNetPlusPlus(dims, 1, 1)
    channels, *counts = NODES[row, column]
    assert first_conv(network, row, column).in_channels == channels
    assert first_conv(network, row, column).out_channels == PAPER[row]
    assert parameters(node(network, row, column)) == counts[dims - 2]


def test_a_node_joins_as_many_maps_as_its_column_and_one_more():
    with torch.device("meta"):
        deconv = UNetPlusPlus(2, 1, 1)
        interp = UNetPlusPlus(2, 1, 1, upsample="interp")
    for row, column in NODES:
        if column:
            width = PAPER[row]
            assert first_conv(deconv, row, column).in_channels == (column + 1) * width
            assert first_conv(interp, row, column).in_channels == column * width + PAPER[row + 1]


@pytest.mark.parametrize("skip_mode", ["long", "short"])
def test_long_and_short_nodes_join_two_maps(skip_mode):
    with torch.device("meta"):
        network = UNetPlusPlus(2, 1, 1, skip_mode=skip_mode)
    assert all(first_conv(network, i, j).in_channels == 2 * PAPER[i] for i, j in NODES if j)


@pytest.mark.parametrize(
    ("name", "in_2d", "in_3d"),
    [
        ("paper2018", {"1": 100_961, "2": 511_105, "3": 2_204_961, "4": 9_041_601, "mean": 9_041_700},
         {"1": 294_049, "2": 1_482_433, "3": 6_389_601, "4": 26_198_273, "mean": 26_198_372}),
        ("bn_interp", {"1": 102_465, "2": 518_529, "3": 2_235_585, "4": 9_162_753, "mean": 9_162_852},
         {"1": 305_793, "2": 1_551_297, "3": 6_696_705, "4": 27_466_305, "mean": 27_466_404}),
    ],
)  # fmt: skip
def test_every_level_of_a_published_form_has_its_parameters(name, in_2d, in_3d):
    with torch.device("meta"):
        for dims, expected in ((2, in_2d), (3, in_3d)):
            network = UNetPlusPlus.from_preset(name, dims, 1, 1)
            assert {size.level: size.parameters for size in network.level_sizes()} == expected
            assert parameters(UNetPlusPlus.from_preset(name, dims, 1, 1, deep_supervision=False, output_mode="head")) \
                == expected["4"]  # fmt: skip


def test_second_level_is_eighteen_times_smaller_than_the_fourth():
    with torch.device("meta"):
        counts = {size.level: size.parameters for size in UNetPlusPlus(2, 1, 1).level_sizes()}
    assert counts["4"] / counts["2"] == pytest.approx(17.7, abs=0.05)


def test_megabytes_of_the_levels_are_those_of_their_float32_weights():
    with torch.device("meta"):
        network = UNetPlusPlus.from_preset("bn_interp", 2, 1, 1)
        sizes = [round(size.megabytes, 2) for size in network.level_sizes()]
        halves = [round(size.megabytes, 2) for size in network.half().level_sizes()]
    assert sizes == [0.41, 2.07, 8.94, 36.65, 36.65]
    assert halves == [0.2, 1.04, 4.47, 18.33, 18.33]


@pytest.mark.parametrize(("dims", "classes", "count"), [(2, 2, 24_000_032), (3, 3, 45_966_784)])
def test_nnunet_preset_has_the_parameters_of_the_authors_form(dims, classes, count):
    with torch.device("meta"):
        network = UNetPlusPlus.from_preset("nnunet", dims, 1, classes)
    assert parameters(network) == count
    assert network.levels == (1, 2, 3, 4, 5)


def test_paper_preset_is_the_network_of_2018():
    network = UNetPlusPlus.from_preset("paper2018", 2, 3, 1, features=(4, 6, 8))
    assert network.output_mode == "mean"
    layers = {type(m).__name__ for m in network.modules() if type(m).__module__.startswith("torch")}
    assert layers - {"Identity", "ModuleDict", "ModuleList", "Sequential"} == {
        *("Conv2d", "ConvTranspose2d", "Dropout", "MaxPool2d", "ReLU")
    }
    unit = network.diagonals[0].encoder[1]
    assert [name for name, _ in unit.named_children()] == ["conv", "act", "dropout"]
    assert unit.dropout.p == 0.5
    assert all(m.bias is not None for m in network.modules() if isinstance(m, _ConvNd))


def test_nnunet_preset_strides_in_convolutions_and_has_no_bias_in_ups_and_heads():
    network = UNetPlusPlus.from_preset("nnunet", 3, 1, 2, features=(4, 6, 8))
    assert not any(isinstance(m, nn.MaxPool3d) for m in network.modules())
    assert [d.encoder[0].conv.stride[0] for d in network.diagonals] == [1, 2, 2]
    norms = [m for m in network.modules() if isinstance(m, nn.InstanceNorm3d)]
    assert norms
    assert all(m.affine for m in norms)
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.01}
    ups = [m for m in network.modules() if isinstance(m, nn.ConvTranspose3d)]
    assert all(m.bias is None for m in [*ups, *network.heads.values()])
    assert network.diagonals[0].encoder[0].conv.bias is not None


def test_bn_interp_preset_has_batch_norm_and_no_up_convolution():
    network = UNetPlusPlus.from_preset("bn_interp", 2, 1, 1, features=(4, 6, 8))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 2 * 6
    assert not any(isinstance(m, nn.ConvTranspose2d) for m in network.modules())


@pytest.mark.parametrize("name", ["paper2018", "bn_interp", "nnunet"])
@pytest.mark.parametrize("dims", [2, 3])
def test_presets_run_and_can_be_written_into_a_config(name, dims):
    options = {**preset(name, dims), "features": (2, 3, 4)}
    network = UNetPlusPlus(dims, 1, 1, **json.loads(json.dumps(options))).eval()
    assert network(image(dims)).shape == (2, 1, *(16, 24, 16)[:dims])


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match=r"'paper2015'.*'paper2018', 'bn_interp', 'nnunet'"):
        UNetPlusPlus.from_preset("paper2015", 2, 1, 1)


@pytest.mark.parametrize("upsample", ["deconv", "interp"])
@pytest.mark.parametrize("down", ["maxpool", "conv"])
@pytest.mark.parametrize("size", [(17, 19, 23), (9, 30, 16)])
@pytest.mark.parametrize("dims", [2, 3])
def test_odd_sizes_come_back_as_they_were(dims, size, down, upsample):
    network = small(dims, down=down, upsample=upsample)
    output = network.forward_train(image(dims, size))
    assert all(logits.shape[2:] == size[:dims] for logits in output["aux"])
    output["logits"].sum().backward()


def test_pooling_leaves_the_high_side_to_be_repeated_and_strided_convolution_to_be_cut():
    torch.manual_seed(0)
    x, row = torch.randn(1, 5, 3, 4), [torch.randn(1, 4, 7, 8)]
    pooled = node(small(), 0, 1)
    up = pooled.up(x)
    repeated = torch.cat([up, up[:, :, -1:]], dim=2)
    torch.testing.assert_close(pooled(x, row), pooled.convs(torch.cat([*row, repeated], dim=1)))
    strided, row = node(small(down="conv"), 0, 1), [torch.randn(1, 4, 5, 8)]
    cut = strided.up(x)[:, :, :5]
    torch.testing.assert_close(strided(x, row), strided.convs(torch.cat([*row, cut], dim=1)))


@pytest.mark.parametrize("down", ["maxpool", "conv"])
@pytest.mark.parametrize("upsample", ["deconv", "interp"])
def test_strides_per_axis_keep_thin_axes(upsample, down):
    network = small(3, strides=((1, 2, 2), (1, 2, 2), 2), upsample=upsample, down=down)
    output = network.forward_train(image(3, (6, 32, 24)))
    assert {n: tuple(f.shape[2:]) for n, f in output["features"].items()} == {
        "E1": (6, 32, 24),
        "E2": (6, 16, 12),
        "E3": (6, 8, 6),
        "B": (3, 4, 3),
        "D3": (6, 8, 6),
        "D2": (6, 16, 12),
        "D1": (6, 32, 24),
    }
    assert all(logits.shape[2:] == (6, 32, 24) for logits in output["aux"])
    assert {m.kernel_size for i, j in NODES if i + j < 4 for m in [first_conv(network, i, j)]} == {(3, 3, 3)}
    pruned = network.eval().prune(2)
    with torch.no_grad():
        network.set_output("head", head=2)
        assert torch.equal(pruned(image(3, (1, 4, 4))), network(image(3, (1, 4, 4))))


@pytest.mark.parametrize("down", ["maxpool", "conv"])
def test_one_voxel_under_instance_norm_is_refused_with_the_smallest_size(down):
    network = small(down=down, norm="instance").eval()
    with pytest.raises(SizeError, match=r"8x8.*single voxel.*16x8 or 8x16"):
        network(image(size=(8, 8)))
    assert network(image(size=(16, 8))).shape[2:] == (16, 8)


def test_strided_convolutions_take_any_image_with_two_voxels_left():
    network = small(down="conv", norm="instance").eval()
    assert network(image(size=(9, 1))).shape[2:] == (9, 1)
    with pytest.raises(SizeError, match=r"7x8.*valid size is 8x8"):
        network(image(size=(7, 8)))


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_autocast_stays_close_to_float32(dtype, activation):
    network = small(3, norm="instance", output_mode="mean", head_activation=activation).eval()
    x = image(3, (16, 16, 16))
    with torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", dtype=dtype):
            found = network(x)
    assert found.dtype == dtype
    error = (found.float() - expected).abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02) * expected.abs().max()


def test_strided_form_is_exported_for_any_size():
    network = UNetPlusPlus.from_preset("nnunet", 2, 1, 1, features=(2, 3, 4), output_mode="mean").eval()
    height, width = torch.export.Dim("h", min=8, max=64), torch.export.Dim("w", min=8, max=64)
    program = torch.export.export(network, (image(size=(17, 23)),), dynamic_shapes=({2: height, 3: width},))
    for size in ((17, 23), (32, 10)):
        torch.testing.assert_close(program.module()(image(size=size)), network(image(size=size)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upsample": "bilinear"}, "'deconv', 'interp'"),
        ({"down": "avgpool"}, "'maxpool', 'conv'"),
        ({"skip_mode": "none"}, "'dense', 'long', 'short'"),
        ({"cat_order": "up"}, "'skip_first', 'up_first'"),
        ({"output_mode": "list"}, "'head', 'mean', 'mean_logits'"),
        ({"head_activation": "relu"}, "'sigmoid', 'softmax'"),
        ({"features": (8,)}, r"features=\(8,\).*two or more"),
        ({"spatial_dims": 1}, "spatial_dims=1; expected 2 or 3"),
        ({"strides": (2,)}, "2 entries for 3 levels"),
        ({"head": 3}, "head 3: choose one of 1, 2"),
        ({"head": 0}, "Unknown head 0"),
        ({"head": 1, "deep_supervision": False}, "head 1: only head 2 was built"),
        ({"head": 1, "output_mode": "mean_logits"}, "'mean_logits' uses all heads"),
        ({"output_mode": "mean"}, "2 output channels.*softmax.*sigmoid"),
        ({"output_mode": "mean", "deep_supervision": False}, "builds only one"),
        ({"out_channels": 1, "head_activation": "softmax"}, "1 everywhere"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        UNetPlusPlus(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": (4, 6, 8), **options})


def test_a_refused_output_leaves_the_network_as_it_was():
    network = small()
    before = dict(network.arguments)
    with pytest.raises(RequestError, match="Unknown head 7"):
        network.set_output("head", head=7, head_activation="softmax")
    assert network.arguments == before
    network.set_output("mean", head_activation="softmax")
    assert UNetPlusPlus(**network.arguments).output_mode == "mean"
