"""What a training step of a network takes, counted without running it: the same on every machine.

The network runs on tensors that have a shape and no content. Counted are the tensors that its backward pass keeps, and
the largest tensor, of which convolutions make copies while they work.
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

# Weights, their gradients, two moments of AdamW, and the average.
_COPIES_OF_WEIGHTS = 5
# Input, output and gradient of the largest layer in the order that the kernels want.
_COPIES_OF_LARGEST = 3
# Of the kernels, whatever the size.
_WORKSPACE = 100 << 20
# Of each logit: probabilities, one-hot target, products, and their gradients.
_COPIES_OF_LOGITS = 8


@dataclass(frozen=True)
class Cost:
    """What one training step takes, in float32.

    Attributes:
        parameters: number of weights.
        memory: bytes of weights, optimizer, activations, gradients and loss at the peak.
    """

    parameters: int
    memory: int


def count(network_def: Mapping[str, Any], patch: Sequence[int], batch: int) -> Cost:
    """Count a training step of a network of `medseg.networks`.

    Args:
        network_def: `_target_` and arguments.
        patch: voxels per axis.
        batch: patches per step.
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
