"""What is particular to the U-Net: its sizes, counts and options."""

from __future__ import annotations

import itertools
from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from medseg.errors import RequestError, SizeError
from medseg.networks import UNet

WIDTHS_2018 = (32, 64, 128, 256, 512)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("options", "in_2d", "in_3d"),
    [
        ({"out_channels": 2}, 31_030_658, 90_292_738),
        ({"out_channels": 2, "last_upconv_channels": 128}, 31_100_354, 90_468_930),
        ({"out_channels": 1, "features": WIDTHS_2018}, 7_759_521, 22_575_329),
        ({"out_channels": 1, "features": (35, 70, 140, 280, 560)}, 9_282_246, 27_006_176),
        (
            {"out_channels": 1, "features": WIDTHS_2018, "upsample": "interp", "norm": "batch"},
            7_851_969,
            23_538_177,
        ),
    ],
    ids=["paper", "release", "unet-of-unetpp", "wide-unet", "interp-batchnorm"],
)
def test_published_forms_have_their_published_parameter_counts(options, in_2d, in_3d):
    with torch.device("meta"):
        counts = [parameters(UNet(dims, 1, **options)) for dims in (2, 3)]
    assert counts == [in_2d, in_3d]


def test_padding_changes_no_parameter():
    with torch.device("meta"):
        assert parameters(UNet(2, 1, 2, padding="valid")) == 31_030_658


@pytest.mark.parametrize("dims", [2, 3])
def test_paper_network_has_23_convolutions(dims):
    with torch.device("meta"):
        network = UNet(dims, 1, 2)
    assert sum(isinstance(m, _ConvNd) for m in network.modules()) == 23


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_follow_the_he_rule_and_biases_are_zero(dims):
    torch.manual_seed(0)
    network = UNet(dims, 16, 64, (48, 64, 64))
    for name, module in network.named_modules():
        if isinstance(module, _ConvNd):
            inputs = module.in_channels * torch.Size(module.kernel_size).numel()
            deviation = float(module.weight.detach().std())
            assert deviation == pytest.approx(sqrt(2 / inputs), rel=0.06), name
            assert not module.bias.any(), name


def test_valid_output_sizes_are_those_of_the_paper():
    network = UNet(2, 1, 2, (2, 2, 2, 2, 2), padding="valid")
    assert network.output_size((572, 572)) == (388, 388)
    assert network.margin == (92, 92)
    assert network(torch.zeros(1, 1, 188, 204)).shape[2:] == (4, 20)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_valid_output_size_is_the_predicted_one(depth, dims):
    network = UNet(dims, 1, 2, (2,) * (depth + 1), padding="valid")
    size = network.valid_sizes.smallest
    size = (size[0] + network.step[0], *size[1:])
    assert network(torch.zeros(1, 1, *size)).shape[2:] == network.output_size(size)


@pytest.mark.parametrize("upsample", ["deconv", "interp"])
@pytest.mark.parametrize("skip", ["cat", "add"])
def test_valid_network_sees_its_input_shifted_by_the_margin(upsample, skip):
    """Every crop is centered: shifting the image by one step shifts the logits by one step."""
    torch.manual_seed(0)
    network = UNet(2, 1, 1, (4, 5, 6), padding="valid", upsample=upsample, skip=skip, interp_align_corners=False).eval()
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        whole, low, high = network(image), network(image[..., :60, :]), network(image[..., 4:, :])
    inner = slice(4, -4)  # interpolation at a map's edge differs from the same place inside a larger map
    torch.testing.assert_close(low[..., inner, :], whole[..., :-4, :][..., inner, :])
    torch.testing.assert_close(high[..., inner, :], whole[..., 4:, :][..., inner, :])


def test_valid_size_error_names_the_sizes_below_and_above():
    network = UNet(2, 1, 2, (2, 2, 2, 2, 2), padding="valid")
    with pytest.raises(SizeError, match=r"200x100.*axis 0 \(200 voxels\): use 188 or 204.*axis 1 .* use 188 "):
        network(torch.zeros(1, 1, 200, 100))
    with pytest.raises(ValueError, match="396 or 412"):
        network(torch.zeros(1, 1, 204, 400))


def test_smallest_padded_image_is_one_voxel_at_the_bottom():
    network = UNet(2, 1, 2, (2, 2, 2))
    assert network(torch.zeros(1, 1, 4, 4)).shape[2:] == (4, 4)
    with pytest.raises(SizeError, match=r"3x9.*nearest valid size is 4x9"):
        network(torch.zeros(1, 1, 3, 9))


@pytest.mark.parametrize(
    ("norm", "train", "batch", "works"),
    [
        ("instance", False, 2, False),
        ("instance", True, 2, False),
        ("batch", True, 1, False),
        ("batch", True, 2, True),
        ("batch", False, 1, True),
        (("group", {"num_groups": 2}), True, 1, True),
        (("group", {"num_groups": 4}), False, 1, False),
        (None, True, 1, True),
    ],
)
def test_one_voxel_under_a_norm_is_refused_exactly_where_torch_would(norm, train, batch, works):
    network = UNet(3, 1, 2, (4, 4, 4), norm=norm).train(train)
    image = torch.randn(batch, 1, 4, 5, 6)
    if works:
        assert network(image).shape[2:] == (4, 5, 6)
        return
    with pytest.raises(SizeError, match=r"4x5x6.*single voxel.*8x5x6 or 4x8x6 or 4x5x8"):
        network(image)
    assert network(torch.randn(batch, 1, 8, 5, 6)).shape[2:] == (8, 5, 6)
    # The rule is torch's own: without our check the same input fails inside torch.
    with pytest.raises(ValueError, match="when training"):
        network.bottleneck(torch.randn(batch, 4, 1, 1, 1))


@pytest.mark.parametrize("upsample", ["deconv", "interp"])
@pytest.mark.parametrize("skip", ["cat", "add"])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("dims", [2, 3])
def test_all_combinations_run_and_learn(dims, padding, skip, upsample):
    network = UNet(dims, 1, 3, (4, 6), padding=padding, skip=skip, upsample=upsample, norm="instance", act="leakyrelu")
    size = (20, 22, 24)[:dims]
    logits = network(torch.randn(1, 1, *size))
    assert logits.shape == (1, 3, *network.output_size(size))
    logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_strides_per_axis_keep_thin_axes():
    network = UNet(3, 1, 2, (4, 6, 8), strides=((1, 2, 2), 2))
    assert network.step == (2, 4, 4)
    output = network.forward_train(torch.randn(1, 1, 5, 16, 18))
    assert output["logits"].shape[2:] == (5, 16, 18)
    assert {n: tuple(f.shape[2:]) for n, f in output["features"].items()} == {
        "E1": (5, 16, 18),
        "E2": (5, 8, 9),
        "B": (2, 4, 4),
        "D2": (5, 8, 9),
        "D1": (5, 16, 18),
    }


def test_strides_per_axis_set_the_valid_sizes():
    network = UNet(3, 1, 2, (2, 2, 2), strides=((1, 2, 2), (2, 2, 2)), padding="valid")
    size = network.valid_sizes.smallest
    assert network(torch.zeros(1, 1, *size)).shape[2:] == network.output_size(size)
    with pytest.raises(SizeError, match="axis 0"):
        network(torch.zeros(1, 1, size[0] + 1, *size[1:]))


def test_release_relu_and_width_stand_after_the_up_convolutions():
    network = UNet(2, 1, 2, (4, 6, 8), upconv_relu=True, last_upconv_channels=7)
    assert [type(layer).__name__ for layer in network.decoder[0].up] == ["ConvTranspose2d", "ReLU"]
    assert network.decoder[1].up[0].out_channels == 7
    assert network.decoder[1].convs[0].conv.in_channels == 7 + 4


def test_concatenation_order_moves_the_weights_halves():
    torch.manual_seed(0)
    first = UNet(2, 1, 2, (3, 5)).eval()
    second = UNet(2, 1, 2, (3, 5), cat_order="skip_first").eval()
    state = first.state_dict()
    name = "decoder.0.convs.0.conv.weight"
    state[name] = torch.cat([state[name][:, 3:], state[name][:, :3]], dim=1)
    second.load_state_dict(state)
    image = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(second(image), first(image))


def test_addition_needs_no_more_channels_than_one_map():
    with torch.device("meta"):
        network = UNet(2, 1, 2, (4, 6, 8), skip="add")
    assert [level.convs[0].conv.in_channels for level in network.decoder] == [6, 4]


def test_dropout_stands_at_the_end_of_the_contracting_path_and_drops_the_deepest_skip():
    torch.manual_seed(0)
    network = UNet(2, 1, 2, (8, 8, 8), dropout=0.5).train()
    dropped = [name for name, module in network.named_modules() if isinstance(module, nn.Dropout)]
    assert dropped == ["encoder.1.dropout", "bottleneck.dropout"]
    image = torch.rand(1, 1, 32, 32)
    active = network.eval().forward_train(image)["features"]["E2"] > 0
    skip = network.train().forward_train(image)["features"]["E2"]
    assert (skip[active] == 0).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("rate", [0, 0.0])
def test_without_dropout_there_is_no_dropout_layer(rate):
    assert not any(isinstance(m, nn.Dropout) for m in UNet(2, 1, 2, (4, 4), dropout=rate).modules())


def test_odd_sizes_repeat_the_high_side():
    """An image whose last row is missing gives what the map padded by replication gives."""
    torch.manual_seed(0)
    network = UNet(2, 1, 2, (4, 6)).eval()
    level, x, skip = network.decoder[0], torch.randn(1, 6, 3, 4), torch.randn(1, 4, 7, 8)
    up = level.up(x)
    repeated = torch.cat([up, up[:, :, -1:]], dim=2)
    torch.testing.assert_close(level(x, skip), level.convs(torch.cat([repeated, skip], dim=1)))


SUBSETS = [levels for n in range(5) for levels in itertools.combinations((1, 2, 3, 4), n)]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("skip_levels", SUBSETS, ids=str)
def test_every_subset_of_skips_runs_learns_and_keeps_odd_sizes(dims, skip_levels):
    network = UNet(dims, 1, 2, (2, 3, 4, 5, 6), skip_levels=skip_levels, dropout=0.0)
    size = (17, 19, 16)[:dims]
    logits = network(torch.randn(1, 1, *size))
    assert logits.shape == (1, 2, *size)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.skip_levels == skip_levels
    read = [level.convs[0].conv.in_channels for level in network.decoder]
    assert read == [width * (1 + (level in skip_levels)) for level, width in ((4, 5), (3, 4), (2, 3), (1, 2))]


@pytest.mark.parametrize(
    "options",
    [{"padding": "valid"}, {"upsample": "interp"}, {"skip": "add"}, {"skip": "add", "upsample": "interp"}],
    ids=str,
)
def test_without_skips_the_encoder_reaches_the_logits_through_the_bottleneck_alone(options):
    network = UNet(2, 1, 2, (3, 4, 5), skip_levels="none", dropout=0.0, **options)
    x = torch.randn(1, 1, 44, 48)
    _, deep = network._encode(x)
    taps = network.forward_train(x)["features"]
    cut = torch.autograd.grad(network.head(taps["D1"]).sum(), [taps["E1"], taps["B"]])
    assert all(gradient.any() for gradient in cut)
    skips = [torch.zeros_like(taps["E1"]), torch.zeros_like(taps["E2"])]
    for level in network.decoder:
        deep = level(deep, skips.pop())
    torch.testing.assert_close(network.head(deep), network(x))


def test_all_and_none_are_names_of_levels():
    assert UNet(2, 1, 2, (2, 2, 2)).skip_levels == UNet(2, 1, 2, (2, 2, 2), skip_levels=[2, 1]).skip_levels == (1, 2)
    assert UNet(2, 1, 2, (2, 2, 2), skip_levels="none").skip_levels == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "reflect"}, "padding='reflect'.*'same', 'valid'"),
        ({"upsample": "bilinear"}, "'deconv', 'interp'"),
        ({"skip": "sum"}, "'cat', 'add'"),
        ({"cat_order": "up"}, "'up_first', 'skip_first'"),
        ({"features": (8,)}, r"features=\(8,\).*two or more"),
        ({"features": (8, 0)}, "at least 1"),
        ({"spatial_dims": 4}, "spatial_dims=4; expected 2 or 3"),
        ({"strides": (2,)}, "2 entries for 3 levels"),
        ({"strides": (2, (2, 2, 2))}, "2 of them"),
        ({"strides": (2, 0)}, "at least 1"),
        ({"upsample": "interp", "upconv_relu": True}, 'upsample="deconv"'),
        ({"upsample": "interp", "last_upconv_channels": 8}, 'upsample="deconv"'),
        ({"skip": "add", "last_upconv_channels": 8}, "equal width"),
        ({"skip_levels": (1, 3)}, r"skip_levels=\(1, 3\).*to 2"),
        ({"skip_levels": "some"}, "skip_levels='some'"),
        ({"skip_levels": 2}, "skip_levels=2;"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        UNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": (4, 6, 8), **options})
