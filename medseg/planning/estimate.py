"""Memory of a training step, estimated without running it, so that the result is the same on every machine.

The network runs on fake tensors, which have a shape but no data. The estimate adds up the tensors saved for the
backward pass and working copies of the largest one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from medseg import networks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["Cost", "count"]

# Weights, gradients, the two moments of AdamW, and the moving average.
_COPIES_OF_WEIGHTS = 5
# Input, output and gradient of the largest layer, in the memory layout of the kernels.
_COPIES_OF_LARGEST = 3
# Workspace of the kernels, whatever the size.
_WORKSPACE = 100 << 20
# Tensors of the loss per logit: probabilities, one-hot target, products, and their gradients.
_COPIES_OF_LOGITS = 8


@dataclass(frozen=True)
class Cost:
    """Size of a network and of one training step in float32.

    Attributes:
        parameters: Number of parameters.
        memory: Peak memory in bytes of weights, optimizer, activations, gradients and loss.
    """

    parameters: int
    memory: int


def count(network_def: Mapping[str, Any], patch: Sequence[int], batch: int) -> Cost:
    """Estimate a training step of a network of `medseg.networks`.

    Args:
        network_def: `_target_` and arguments of the network.
        patch: Patch size in voxels.
        batch: Number of patches per step.
    """
    return _count(json.dumps(network_def), tuple(patch), batch)


@lru_cache(maxsize=256)
def _count(network_def: str, patch: tuple[int, ...], batch: int) -> Cost:
    arguments = json.loads(network_def)
    kind = getattr(networks, arguments.pop("_target_").rpartition(".")[2])
    kept: dict[int, int] = {}
    largest = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal largest
        size = tensor.numel() * tensor.element_size()
        kept[tensor.untyped_storage()._cdata] = max(size, kept.get(tensor.untyped_storage()._cdata, 0))
        largest = max(largest, size)
        return tensor

    with FakeTensorMode():
        network = kind(**arguments).train()
        weights = list(network.parameters())
        own = {weight.untyped_storage()._cdata for weight in weights}
        image = torch.empty(batch, arguments["in_channels"], *patch)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = network.forward_train(image)
        logits = output["logits"].numel() * (1 + len(output.get("aux", ())) + len(output.get("edges", ())))
        activations = sum(size for place, size in kept.items() if place not in own)
        parameters = sum(weight.numel() for weight in weights)
    memory = activations + 4 * parameters * _COPIES_OF_WEIGHTS + largest * _COPIES_OF_LARGEST
    memory += 4 * logits * _COPIES_OF_LOGITS + _WORKSPACE
    return Cost(parameters, memory)
