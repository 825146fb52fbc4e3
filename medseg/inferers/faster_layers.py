"""Replacements for torch layers that are faster on a CPU, or more accurate in exported networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["with_exact_norms", "with_faster_layers"]


def with_faster_layers(network: nn.Module) -> nn.Module:
    """Return a copy with faster layers for float32 on the CPU that shares all weights, or the network itself.

    3D convolutions use oneDNN, which torch does not use for single windows with few voxels; 1 x 1 x 1 convolutions and
    transposed convolutions that double the size are computed as matrix products; max-pooling by two as the maximum of
    strided views; instance norm as group norm with one channel per group. Results differ by rounding, about 1e-6. The
    copy supports neither gradients nor export.
    """
    return _replaced(network, lambda module: _faster_layer(module) or _norm(module, _GROUPED))


def with_exact_norms(network: nn.Module) -> nn.Module:
    """Return a copy for export with accurate instance norm that shares all weights, or the network itself.

    Some engines sum all voxels of a window sequentially in float32, with errors of 1e-4 and more. The replacement sums
    each plane, and then the sums of the planes.
    """
    return _replaced(network, lambda module: _norm(module, _PLANEWISE))


def _replaced(network: nn.Module, choose: Callable[[nn.Module], type[nn.Module] | None]) -> nn.Module:
    found = [choose(module) for module in network.modules()]
    if not any(found):
        return network
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    changed = copy.deepcopy(network, shared)
    for module, kind in zip(changed.modules(), found, strict=True):
        if kind is not None:
            module.__class__ = kind
    return changed


class _OneDnnConv3d(nn.Conv3d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = (self.padding, self.stride, self.dilation, self.groups)
        return torch.mkldnn_convolution(input, weight, bias, *options)  # type: ignore[arg-type]


class _PointwiseConv3d(nn.Conv3d):
    """A 1 x 1 x 1 convolution."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(weight.flatten(1), input, bias)


class _DoublingConv3d(nn.ConvTranspose3d):
    """A transposed convolution with kernel size and stride 2."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None:
            return super().forward(input, output_size)
        count, _, *size = input.shape
        corners = _product(self.weight.flatten(1).t(), input, None).view(count, self.out_channels, 2, 2, 2, *size)
        doubled = corners.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(count, self.out_channels, *(2 * n for n in size))
        return doubled if self.bias is None else doubled.add_(self.bias.view(-1, 1, 1, 1))


class _HalvingMaxPool3d(nn.MaxPool3d):
    """Max-pooling over 2 x 2 x 2 voxels, computed axis by axis."""

    def forward(self, input: Tensor) -> Tensor:
        for axis in (2, 3, 4):
            even = input.narrow(axis, 0, input.shape[axis] // 2 * 2)
            step = [slice(None)] * axis
            input = torch.maximum(even[(*step, slice(0, None, 2))], even[(*step, slice(1, None, 2))])
        return input


def _product(matrix: Tensor, input: Tensor, bias: Tensor | None) -> Tensor:
    """Return `matrix @ input` over the channels of `(B, C, *spatial)`."""
    column = None if bias is None else bias[:, None]
    each = [matrix @ one if column is None else torch.addmm(column, matrix, one) for one in input.flatten(2)]
    result = each[0] if len(each) == 1 else torch.stack(each)
    return result.view(len(input), len(matrix), *input.shape[2:])


class _Grouped(_InstanceNorm):
    """Instance norm as group norm."""

    def forward(self, input: Tensor) -> Tensor:
        if input[0, 0].numel() == 1:
            return super().forward(input)  # raises the error for a single voxel
        # The kernel for channels last sums sequentially in float32, with errors of 1e-4.
        return F.group_norm(input.contiguous(), input.shape[1], self.weight, self.bias, self.eps)


class _GroupedInstanceNorm2d(_Grouped, nn.InstanceNorm2d):
    """For `(B, C, H, W)`."""


class _GroupedInstanceNorm3d(_Grouped, nn.InstanceNorm3d):
    """For `(B, C, D, H, W)`."""


class _Planewise(_InstanceNorm):
    """Instance norm from the mean and variance of each plane (of each row in 2D)."""

    def forward(self, input: Tensor) -> Tensor:
        if input[0, 0].numel() == 1:
            return super().forward(input)
        inner = tuple(range(3, input.dim()))
        shape = (1, -1, *(1 for _ in range(2, input.dim())))
        means = input.mean(inner, keepdim=True)
        rest = input - means
        offsets = means - means.mean(2, keepdim=True)
        variance = ((rest * rest).mean(inner, keepdim=True) + offsets * offsets).mean(2, keepdim=True)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is None:
            return rest * scale + offsets * scale
        scale = scale * self.weight.view(shape)
        return rest * scale + (offsets * scale + self.bias.view(shape))


class _PlanewiseInstanceNorm2d(_Planewise, nn.InstanceNorm2d):
    """For `(B, C, H, W)`."""


class _PlanewiseInstanceNorm3d(_Planewise, nn.InstanceNorm3d):
    """For `(B, C, D, H, W)`."""


# Up to this many output channels a matrix product is faster than oneDNN's 1 x 1 x 1 convolution.
_FEW: Final = 16
# Exact types, since subclasses may behave differently.
_GROUPED: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.InstanceNorm2d: _GroupedInstanceNorm2d,
    nn.InstanceNorm3d: _GroupedInstanceNorm3d,
}
_PLANEWISE: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.InstanceNorm2d: _PlanewiseInstanceNorm2d,
    nn.InstanceNorm3d: _PlanewiseInstanceNorm3d,
}


def _norm(module: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> type[nn.Module] | None:
    return None if getattr(module, "track_running_stats", False) else kinds.get(type(module))


def _faster_layer(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.MaxPool3d:
        return _HalvingMaxPool3d if _halves(module) else None
    if type(module) is nn.ConvTranspose3d:
        return _DoublingConv3d if _doubles(module) and module.weight.dtype == torch.float32 else None
    return _faster_convolution(module) if type(module) is nn.Conv3d else None


def _faster_convolution(module: nn.Conv3d) -> type[nn.Module] | None:
    usual = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if not usual or module.weight.dtype != torch.float32:
        return None
    plain = {*module.kernel_size, *module.stride} == {1} and module.groups == 1 and not any(module.padding)
    if plain and module.out_channels <= _FEW:
        return _PointwiseConv3d
    return _OneDnnConv3d if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]


def _halves(module: nn.MaxPool3d) -> bool:
    return (
        _all(module.kernel_size, 2)
        and _all(module.stride, 2)
        and _all(module.padding, 0)
        and _all(module.dilation, 1)
        and not (module.ceil_mode or module.return_indices)
    )


def _doubles(module: nn.ConvTranspose3d) -> bool:
    # Weights are (in, out, 2, 2, 2); the product sums over the first axis.
    plain = not (any(module.padding) or any(module.output_padding)) and set(module.dilation) == {1}
    return plain and set(module.kernel_size) == set(module.stride) == {2} and module.groups == 1


def _all(value: int | tuple[int, ...], wanted: int) -> bool:
    return set(value if isinstance(value, tuple) else (value,)) == {wanted}
