"""Convolutions that a CPU must not train in bfloat16.

In torch 2.13 the weight gradient of a bfloat16 `Conv3d` on the CPU is wrong where the first spatial axis is shorter
than the kernel: it holds values of uninitialized memory, of any size, and others each time. Such maps are found at the
bottom of deep networks, so these convolutions are computed in float32, which costs next to nothing.
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
    """Keep the 3D convolutions of a network from bfloat16 where their map is thinner than their kernel.

    Args:
        network: unchanged outside of the context.
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
    """Voxels along the first axis that the kernel reaches over."""
    return int(module.dilation[0] * (module.kernel_size[0] - 1) + 1)
