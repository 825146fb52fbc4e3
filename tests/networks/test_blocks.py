"""Layers shared by the networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg.networks.blocks import (
    ConvUnit,
    Interpolate,
    activation,
    center_crop,
    conv_pair,
    he_init,
    match_size,
    upsampler,
)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("align", [True, False])
def test_interpolation_by_sizes_equals_interpolation_by_factors(dims, align):
    x = torch.randn(1, 2, *(5, 4, 3)[:dims])
    mode = "bilinear" if dims == 2 else "trilinear"
    expected = nn.functional.interpolate(x, scale_factor=2, mode=mode, align_corners=align)
    torch.testing.assert_close(Interpolate((2,) * dims, align_corners=align)(x), expected)


def test_interpolation_leaves_an_axis_of_factor_one_alone():
    x = torch.randn(1, 1, 3, 4, 4)
    y = Interpolate((1, 2, 2))(x)
    assert y.shape[2:] == (3, 8, 8)
    torch.testing.assert_close(y[..., ::7, ::7], x[..., ::3, ::3])


@pytest.mark.parametrize("dims", [2, 3])
def test_projection_before_interpolation_equals_projection_after(dims):
    torch.manual_seed(0)
    up = upsampler(dims, 6, 4, (2,) * dims, mode="interp")
    x = torch.randn(1, 6, *(4, 5, 3)[:dims])
    torch.testing.assert_close(up(x), up[0](up[1](x)))


def test_upsamplers_change_channels_only_where_asked():
    assert [type(m).__name__ for m in upsampler(2, 6, 6, (2, 2), mode="interp")] == ["Interpolate"]
    assert [type(m).__name__ for m in upsampler(3, 6, 4, (1, 2, 2), mode="deconv")] == ["ConvTranspose3d"]
    assert upsampler(3, 6, 4, (1, 2, 2), mode="deconv", bias=False)[0].bias is None


def test_match_size_repeats_the_last_voxels_and_copies_nothing_otherwise():
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert match_size(x, torch.zeros(1, 4, 2, 3)) is x
    assert match_size(x, torch.zeros(1, 4, 3, 5))[0, 0].tolist() == [[0, 1, 2, 2, 2], [3, 4, 5, 5, 5], [3, 4, 5, 5, 5]]


def test_match_size_in_3d_keeps_axes_apart():
    x = torch.randn(1, 1, 2, 3, 4)
    y = match_size(x, torch.zeros(1, 1, 3, 3, 5))
    assert y.shape[2:] == (3, 3, 5)
    torch.testing.assert_close(y[:, :, :2, :, :4], x)
    torch.testing.assert_close(y[:, :, 2, :, 4], x[:, :, 1, :, 3])


def test_center_crop_takes_the_smaller_half_from_the_low_side():
    x = torch.arange(7.0).expand(1, 1, 6, 7)
    y = center_crop(x, torch.zeros(1, 1, 2, 4))
    assert y[0, 0].tolist() == [[1, 2, 3, 4]] * 2
    assert y.data_ptr() != x.data_ptr()
    assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_unit_holds_only_the_layers_asked_for():
    assert [name for name, _ in ConvUnit(2, 1, 2).named_children()] == ["conv", "act"]
    full = ConvUnit(2, 1, 2, norm="batch", dropout=0.1, bias=False)
    assert [name for name, _ in full.named_children()] == ["conv", "norm", "act", "dropout"]
    assert full.conv.bias is None


def test_pair_strides_in_its_first_convolution():
    pair = conv_pair(3, 1, 4, stride=(1, 2, 2))
    assert pair(torch.zeros(1, 1, 4, 6, 8)).shape == (1, 4, 4, 3, 4)
    assert [unit.conv.stride for unit in pair] == [(1, 2, 2), (1, 1, 1)]


@pytest.mark.parametrize("name", ["relu", ("leakyrelu", {"negative_slope": 0.01}), ["relu", {}]])
def test_activations_work_in_place_and_gradients_agree_with_the_plain_ones(name):
    torch.manual_seed(0)
    layer = activation(name)
    assert layer.inplace
    unit = ConvUnit(2, 1, 3, norm="instance", act=name).double()
    x = torch.randn(1, 1, 5, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(unit, (x,))


def test_other_activations_stay_as_monai_builds_them():
    assert isinstance(activation("prelu"), nn.PReLU)


def test_he_rule_counts_channels_per_group():
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, groups=64)
    he_init(layer)
    assert float(layer.weight.detach().std()) == pytest.approx((2 / 9) ** 0.5, rel=0.1)
