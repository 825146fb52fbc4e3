import pytest
import torch
from torch import nn

from medseg.networks import UNet
from medseg.training.bf16_conv3d_workaround import thin_maps_in_float32
from medseg.training.wrapper import TrainingWrapper


def gradients(network, image, precision):
    network.zero_grad()
    output = TrainingWrapper(network, precision=precision)(image)["logits"].float()
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    # Memory that was used before shows where a kernel reads what nobody has written.
    for size in range(8, 20):
        torch.full((1 << size,), 1e30)
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv3d(16, 16, 3, padding=1), (2, 2, 2)),
        (nn.Conv3d(16, 16, 3, padding=1), (2, 8, 8)),
        (nn.Conv3d(4, 8, 5, padding=2), (4, 4, 4)),
        (nn.Conv3d(8, 8, 3, padding=1, stride=2), (1, 1, 1)),
        (nn.Conv3d(8, 8, 3, padding=2, dilation=2), (3, 6, 6)),
    ],
)
def test_thin_maps_have_the_gradients_of_float32(convolution, shape):
    torch.manual_seed(0)
    image = torch.randn(2, convolution.in_channels, *shape)
    exact = gradients(convolution, image, "float32")
    for _ in range(3):
        found = gradients(convolution, image, "bfloat16")
        for wanted, gradient in zip(exact, found, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_other_maps_are_still_bfloat16():
    seen = []
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 1))
    for layer in network:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    TrainingWrapper(network, precision="bfloat16")(torch.zeros(1, 1, 3, 4, 4))
    TrainingWrapper(network, precision="bfloat16")(torch.zeros(1, 1, 2, 4, 4))
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]


def test_a_network_with_a_bottom_of_two_voxels_repeats_its_gradients():
    torch.manual_seed(0)
    network = UNet(3, 1, 2, features=(4, 8, 16, 32), norm=("instance", {"affine": True}), dropout=0.0)
    image = torch.randn(1, 1, 16, 16, 16)
    first = gradients(network, image, "bfloat16")
    assert all(
        torch.equal(a, b) for _ in range(4) for a, b in zip(first, gradients(network, image, "bfloat16"), strict=True)
    )


def test_the_network_is_as_before_afterwards():
    network = nn.Sequential(nn.Conv3d(1, 1, 3))
    with thin_maps_in_float32(network):
        assert "forward" in vars(network[0])
    with pytest.raises(RuntimeError, match="channels"):
        TrainingWrapper(network, precision="bfloat16")(torch.zeros(1, 3, 4, 4, 4))
    assert "forward" not in vars(network[0])
