"""Workaround for wrong gradients of bfloat16 `Conv3d` layers on the CPU.

In torch 2.13 the weight gradient of a bfloat16 `Conv3d` on the CPU contains uninitialized memory if the feature map is
thinner than the kernel along the first spatial axis. Such feature maps occur in the deepest levels of a network. Their
convolutions are computed in float32 instead, at almost no cost.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["thin_maps_in_float32"]


@contextmanager
def thin_maps_in_float32(network: nn.Module) -> Iterator[None]:
    """Compute 3D convolutions in float32 where the feature map is thinner than the kernel.

    Args:
        network: Network whose convolutions are patched inside the context and restored on exit.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv3d) and _extent(module) > 1]
    for module in convolutions:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in convolutions:
            del module.forward


def _forward(module: nn.Conv3d, x: Tensor) -> Tensor:
    if x.shape[2] >= _extent(module):
        return type(module).forward(module, x)
    with torch.autocast(x.device.type, enabled=False):
        return type(module).forward(module, x.float())


def _extent(module: nn.Conv3d) -> int:
    """Return the extent of the dilated kernel along the first spatial axis, in voxels."""
    return int(module.dilation[0] * (module.kernel_size[0] - 1) + 1)
