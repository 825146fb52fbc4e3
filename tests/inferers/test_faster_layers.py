"""Faster layers against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg.inferers.faster_layers import with_faster_layers

REPLACED = {
    "_PointwiseConv3d": [nn.Conv3d(6, 5, 1), nn.Conv3d(6, 5, 1, bias=False)],
    "_OneDnnConv3d": [nn.Conv3d(6, 40, 1), nn.Conv3d(6, 5, 3, padding=1), nn.Conv3d(6, 6, 3, stride=2, groups=2)],
    "_DoublingConv3d": [nn.ConvTranspose3d(6, 7, 2, 2), nn.ConvTranspose3d(6, 7, 2, 2, bias=False)],
    "_HalvingMaxPool3d": [nn.MaxPool3d(2), nn.MaxPool3d((2, 2, 2), stride=2)],
    "_GroupedInstanceNorm3d": [nn.InstanceNorm3d(6, affine=True), nn.InstanceNorm3d(6)],
}
KEPT = [
    nn.Conv3d(6, 5, 3, padding="same"),
    nn.Conv3d(6, 5, 3, padding=1, padding_mode="reflect"),
    nn.ConvTranspose3d(6, 7, (1, 2, 2), (1, 2, 2)),
    nn.ConvTranspose3d(6, 6, 2, 2, groups=2),
    nn.ConvTranspose3d(6, 7, 2, 2, output_padding=1),
    nn.MaxPool3d(2, ceil_mode=True),
    nn.MaxPool3d(3, 2, padding=1),
    nn.MaxPool3d((1, 2, 2)),
    nn.InstanceNorm3d(6, track_running_stats=True),
]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, layers in REPLACED.items() for layer in layers])
def test_a_faster_layer_has_the_values_of_torch(name: str, layer: nn.Module, count: int) -> None:
    image = torch.randn(count, 6, 10, 11, 13, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    faster = with_faster_layers(nn.Sequential(layer))[0]
    assert type(faster).__name__ == name
    with torch.no_grad():
        expected, found = layer.eval()(image), faster.eval()(image)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 5e-6
    assert torch.equal(image, before)


@pytest.mark.parametrize("layer", KEPT)
def test_layers_with_other_options_stay(layer: nn.Module) -> None:
    network = nn.Sequential(layer)
    assert with_faster_layers(network) is network


def test_weights_are_shared() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ConvTranspose3d(2, 2, 2, 2))
    faster = with_faster_layers(network)
    assert [id(p) for p in faster.parameters()] == [id(p) for p in network.parameters()]
