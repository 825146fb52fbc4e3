"""Counting a training step, against one that is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medseg import networks
from medseg.networks import NETWORKS
from medseg.planning.estimate import count
from medseg.planning.geometry import lay_out
from medseg.planning.network_sizing import max_poolings, network_def

UNET = {
    "_target_": "medseg.components.UNet",
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "features": [4, 8],
    "dropout": 0.0,
}


def test_twice_the_batch_takes_twice_the_activations() -> None:
    one, two = count(UNET, (64, 64), 2), count(UNET, (64, 64), 4)
    fixed = 4 * 5 * one.parameters + (100 << 20)
    assert two.memory - fixed == pytest.approx(2 * (one.memory - fixed), rel=0.01)


def test_counting_is_repeatable() -> None:
    assert count(UNET, (48, 64), 2) == count(UNET, (48, 64), 2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_is_counted_and_keeps_at_least_what_its_backward_pass_needs(name: str, dims: int) -> None:
    shape = (64, 64) if dims == 2 else (32, 32, 32)
    layout = lay_out(shape, (1.0,) * dims, 10**6, max_poolings(name, dims))
    definition: dict[str, Any] = network_def(name, dims, 1, 3, 8, layout, "batch" if dims == 2 else "instance")
    cost = count(definition, layout.patch, 2)
    network = getattr(networks, name)(**{key: value for key, value in definition.items() if key != "_target_"})
    assert cost.parameters == sum(weight.numel() for weight in network.parameters())
    image = torch.rand(2, 1, *layout.patch)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        network.train().forward_train(image)
    assert sum(kept.values()) < cost.memory < 4 * sum(kept.values()) + (100 << 20)
