"""Layers shared by several networks."""

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
    """Return whether sizes are concrete numbers, that is outside of tracing, compilation and export."""
    return not (_is_tracing() or torch.compiler.is_compiling())


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def activation(name: LayerName) -> nn.Module:
    """Return a MONAI activation layer, in-place if its gradient allows it.

    Args:
        name: MONAI factory name or (name, arguments) of the activation.
    """
    layer: nn.Module = get_act_layer(name)
    if isinstance(layer, nn.ReLU) or (isinstance(layer, nn.LeakyReLU) and layer.negative_slope >= 0):
        layer.inplace = True
    return layer


class ConvUnit(nn.Sequential):
    """Convolution with kernel size 3, followed by optional normalization, activation and optional dropout.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        stride: Stride of the convolution.
        padding: Padding of the convolution; 1 keeps the size, 0 removes two voxels per axis.
        norm: MONAI factory name or (name, arguments) of the normalization; None for no normalization.
        act: MONAI factory name or (name, arguments) of the activation.
        dropout: Dropout rate, or MONAI factory name and arguments; 0 for no dropout.
        bias: Whether the convolution has a bias.
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
    """Return the two `ConvUnit`s of a U-Net block.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of input channels.
        out_channels: Number of output channels of both.
        stride: Stride of the first convolution.
        **options: Additional arguments of both `ConvUnit`s.
    """
    return nn.Sequential(
        ConvUnit(spatial_dims, in_channels, out_channels, stride=stride, **options),
        ConvUnit(spatial_dims, out_channels, out_channels, **options),
    )


class Interpolate(nn.Module):
    """Upsample by integer factors with linear (bilinear, trilinear) interpolation.

    Args:
        scale: Integer factor per spatial axis.
        align_corners: Whether to align the corner voxels, as in `torch.nn.functional.interpolate`.
    """

    def __init__(self, scale: Sequence[int], *, align_corners: bool = True) -> None:
        super().__init__()
        self.scale = list(scale)
        self.align_corners = align_corners
        self.mode = "bilinear" if len(self.scale) == 2 else "trilinear"

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, C, *spatial * scale)`."""
        # Sizes instead of scale factors, which are exact with symbolic shapes.
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
    """Return the upsampling between two levels of a decoder.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        stride: Upsampling factor per axis.
        mode: "deconv", a transposed convolution with kernel size equal to stride, or "interp", linear interpolation. If
            the number of channels changes, a 1^d convolution precedes the interpolation, where it is cheaper (the two
            commute).
        bias: Whether the convolution has a bias.
        align_corners: Whether the interpolation aligns the corner voxels.
    """
    if mode == "deconv":
        up = Conv[Conv.CONVTRANS, spatial_dims]
        return nn.Sequential(up(in_channels, out_channels, kernel_size=tuple(stride), stride=tuple(stride), bias=bias))
    layers = nn.Sequential(Interpolate(stride, align_corners=align_corners))
    if in_channels != out_channels:
        layers.insert(0, Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel_size=1, bias=bias))
    return layers


def match_size(x: Tensor, like: Tensor) -> Tensor:
    """Pad an upsampled feature map to the size of its skip connection by repeating the last voxels of each axis.

    Args:
        x: Upsampled feature map `(B, C, *spatial)`.
        like: Feature map of the target size.

    Returns:
        Padded feature map; `x` itself if the sizes agree.
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
    """Return a center-cropped view of `x` with the spatial size of `like`."""
    for axis in range(2, x.dim()):
        size = like.shape[axis]
        x = x.narrow(axis, (x.shape[axis] - size) // 2, size)
    return x


def he_init(network: nn.Module) -> None:
    """Initialize all convolutions from N(0, sqrt(2/N)), N = kernel voxels * input channels, and the biases with 0.

    This is the initialization in section 3 of the U-Net paper. It is also correct for transposed convolutions, whose
    fan-in the initializers of torch take from the wrong axis.
    """
    for module in network.modules():
        if isinstance(module, _ConvNd):
            inputs = prod(module.kernel_size) * module.in_channels // module.groups
            nn.init.normal_(module.weight, std=sqrt(2 / inputs))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
