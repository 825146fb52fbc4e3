"""Layers that more than one network of this package is built from."""

from __future__ import annotations

from math import prod, sqrt
from typing import TYPE_CHECKING, Any

import torch
from monai.networks.layers import Conv, get_act_layer, get_dropout_layer, get_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

if TYPE_CHECKING:
    from collections.abc import Sequence

    LayerName = str | Sequence[Any]

__all__ = [
    "ConvUnit",
    "Interpolate",
    "activation",
    "center_crop",
    "checks_apply",
    "conv_pair",
    "he_init",
    "match_size",
    "upsampler",
]


def checks_apply() -> bool:
    """Tell whether sizes are plain numbers now: not while a graph is being traced, compiled or exported."""
    return not (_is_tracing() or torch.compiler.is_compiling())


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def activation(name: LayerName) -> nn.Module:
    """Build a MONAI activation, in place where gradients allow it (its input is always a fresh tensor here).

    Args:
        name: MONAI factory name, or a pair of name and arguments.
    """
    layer: nn.Module = get_act_layer(name)
    if isinstance(layer, nn.ReLU) or (isinstance(layer, nn.LeakyReLU) and layer.negative_slope >= 0):
        layer.inplace = True
    return layer


class ConvUnit(nn.Sequential):
    """Convolution with a kernel of 3 per axis, then normalization, activation and dropout where asked for.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels read.
        out_channels: channels written.
        stride: of the convolution.
        padding: 1 keeps the size, 0 takes two voxels off each axis.
        norm: MONAI factory name or (name, arguments); None for none.
        act: MONAI factory name or (name, arguments).
        dropout: rate, or MONAI factory name with arguments; 0 for none.
        bias: whether the convolution has one.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        stride: int | Sequence[int] = 1,
        padding: int = 1,
        norm: LayerName | None = None,
        act: LayerName = "relu",
        dropout: LayerName | float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        convolution = Conv[Conv.CONV, spatial_dims]
        self.conv = convolution(in_channels, out_channels, kernel_size=3, stride=stride, padding=padding, bias=bias)
        if norm is not None:
            self.norm = get_norm_layer(norm, spatial_dims=spatial_dims, channels=out_channels)
        self.act = activation(act)
        if dropout:
            self.dropout = get_dropout_layer(dropout)


def conv_pair(
    spatial_dims: int, in_channels: int, out_channels: int, *, stride: int | Sequence[int] = 1, **options: Any
) -> nn.Sequential:
    """Build the two `ConvUnit`s of one U-Net block; `stride` acts in the first.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels read.
        out_channels: channels written by both.
        stride: of the first convolution.
        **options: further arguments of both `ConvUnit`s.
    """
    return nn.Sequential(
        ConvUnit(spatial_dims, in_channels, out_channels, stride=stride, **options),
        ConvUnit(spatial_dims, out_channels, out_channels, **options),
    )


class Interpolate(nn.Module):
    """Enlarge by whole factors with linear interpolation (bilinear, trilinear); channels stay.

    Args:
        scale: factor per spatial axis.
        align_corners: whether corner voxels keep their places.
    """

    def __init__(self, scale: Sequence[int], *, align_corners: bool = True) -> None:
        super().__init__()
        self.scale = list(scale)
        self.align_corners = align_corners
        self.mode = "bilinear" if len(self.scale) == 2 else "trilinear"

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, C, *spatial * scale)`."""
        # Sizes instead of a scale factor: exact under symbolic shapes.
        size: list[int] = []
        for axis, factor in enumerate(self.scale):
            size.append(x.shape[axis + 2] * factor)
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)


def upsampler(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    stride: Sequence[int],
    *,
    mode: str,
    bias: bool = True,
    align_corners: bool = True,
) -> nn.Sequential:
    """Build the step from one level of a decoder to the next finer one.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels read.
        out_channels: channels written.
        stride: factor per axis.
        mode: "deconv", a transposed convolution whose kernel is its stride, or "interp", linear interpolation; where
            the channels change, a 1^d convolution comes before it (the two commute, and it is cheaper there).
        bias: of the convolution.
        align_corners: of the interpolation.
    """
    if mode == "deconv":
        up = Conv[Conv.CONVTRANS, spatial_dims]
        return nn.Sequential(up(in_channels, out_channels, kernel_size=tuple(stride), stride=tuple(stride), bias=bias))
    layers = nn.Sequential(Interpolate(stride, align_corners=align_corners))
    if in_channels != out_channels:
        layers.insert(0, Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel_size=1, bias=bias))
    return layers


def match_size(x: Tensor, like: Tensor) -> Tensor:
    """Enlarge an up-sampled map to the size of its skip by repeating the last voxels of each axis.

    Args:
        x: up-sampled map `(B, C, *spatial)`.
        like: map of the wanted size.

    Returns:
        `x` itself where the sizes agree already.
    """
    if x.shape[2:] == like.shape[2:] if torch.jit.is_scripting() else _same_size(x, like):  # type: ignore[attr-defined]
        return x
    pad: list[int] = []
    for axis in range(x.dim() - 1, 1, -1):
        pad += [0, like.shape[axis] - x.shape[axis]]
    return F.pad(x, pad, mode="replicate")


def _same_size(x: Tensor, like: Tensor) -> bool:
    if _is_tracing():
        return False
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(a == b) for a, b in zip(x.shape[2:], like.shape[2:], strict=True))
    return x.shape[2:] == like.shape[2:]


def center_crop(x: Tensor, like: Tensor) -> Tensor:
    """Cut the middle of `x` to the spatial size of `like`; the low side loses the smaller half. Makes no copy."""
    for axis in range(2, x.dim()):
        size = like.shape[axis]
        x = x.narrow(axis, (x.shape[axis] - size) // 2, size)
    return x


def he_init(network: nn.Module) -> None:
    """Draw every convolution from N(0, sqrt(2/N)), N = kernel voxels * channels read; zero the biases.

    The rule of section 3 of the U-Net paper. It also holds for transposed convolutions, whose fan torch's own
    initializers count from the wrong side.
    """
    for module in network.modules():
        if isinstance(module, _ConvNd):
            inputs = prod(module.kernel_size) * module.in_channels // module.groups
            nn.init.normal_(module.weight, std=sqrt(2 / inputs))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
