"""Layers of the same arithmetic as torch's own, which run faster on a CPU or with less rounding in other engines."""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["with_faster_layers"]


def with_faster_layers(network: nn.Module, *, convolutions: bool) -> nn.Module:
    """Return a copy that shares all weights, with faster layers; the network itself if it has none to replace.

    Instances are normalized as groups of one channel. Results differ by rounding, about 1e-6.

    Args:
        network: without gradients; is left as it is.
        convolutions: whether 3D convolutions call oneDNN, which torch does not do for single windows with few voxels.
            Such a copy runs in float32 on the CPU and cannot be exported.
    """
    found = [_faster_norm(module) for module in network.modules()]
    if convolutions:
        found = [kind or _faster_convolution(module) for kind, module in zip(found, network.modules(), strict=True)]
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


# Exact types: a subclass has reasons of its own.
_NORMS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.InstanceNorm2d: _GroupedInstanceNorm2d,
    nn.InstanceNorm3d: _GroupedInstanceNorm3d,
}


def _faster_norm(module: nn.Module) -> type[nn.Module] | None:
    return None if getattr(module, "track_running_stats", False) else _NORMS.get(type(module))


def _faster_convolution(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is not nn.Conv3d or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    usual = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return _OneDnnConv3d if usual and module.weight.dtype == torch.float32 else None
