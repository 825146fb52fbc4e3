"""Layers of the same arithmetic as torch's own, that run faster on a CPU or round less in other engines."""

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
    """Return a copy for float32 on the CPU that shares all weights; the network itself if it has nothing to replace.

    3D convolutions call oneDNN, which torch does not do for single windows with few voxels; instances are normalized as
    groups of one channel. Results differ by rounding, about 1e-6. The copy makes no gradients and cannot be exported.
    """
    return _replaced(network, lambda module: _faster_convolution(module) or _norm(module, _GROUPED))


def with_exact_norms(network: nn.Module) -> nn.Module:
    """Return a copy to be exported that shares all weights; the network itself if it has no instance norm.

    Some engines sum a window up voxel by voxel in float32, which leaves errors of 1e-4 and more. Here they sum planes,
    then the sums of planes.
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


class _Grouped(_InstanceNorm):
    """Instance norm as group norm."""

    def forward(self, input: Tensor) -> Tensor:
        if input[0, 0].numel() == 1:
            return super().forward(input)  # says that one voxel has no variance
        # The kernel for channels last adds up in float32, one by one: errors of 1e-4.
        return F.group_norm(input.contiguous(), input.shape[1], self.weight, self.bias, self.eps)


class _GroupedInstanceNorm2d(_Grouped, nn.InstanceNorm2d):
    """For `(B, C, H, W)`."""


class _GroupedInstanceNorm3d(_Grouped, nn.InstanceNorm3d):
    """For `(B, C, D, H, W)`."""


class _Planewise(_InstanceNorm):
    """Instance norm from the mean and variance of every plane (in 2D, of every row)."""

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


# Exact types: a subclass has reasons of its own.
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


def _faster_convolution(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is not nn.Conv3d or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    usual = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return _OneDnnConv3d if usual and module.weight.dtype == torch.float32 else None
