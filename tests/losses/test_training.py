"""The loss over a training output."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss

from medseg.errors import RequestError, SizeError
from medseg.losses.training import TrainingLoss
from medseg.losses.weighted import WeightedCrossEntropyLoss
from medseg.networks import UNet


def test_the_loss_is_that_of_the_logits_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=generator)
    label = torch.randint(0, 3, (2, 1, 8, 8), generator=generator)
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    whole = TrainingLoss(loss)
    expected = loss(logits, label)
    assert torch.equal(whole({"logits": logits}, label), expected)
    assert torch.equal(whole({"logits": logits}, MetaTensor(label)), expected)
    half = whole({"logits": logits.bfloat16()}, label)
    assert half.dtype == torch.float32
    assert torch.equal(half, loss(logits.bfloat16().float(), label))


@pytest.mark.parametrize(("dims", "margin"), [(2, 3), (2, (1, 4)), (3, (0, 1, 2))])
def test_labels_and_weights_are_cropped_by_the_margin_of_an_unpadded_network(
    dims: int, margin: int | tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    lost = (margin,) * dims if isinstance(margin, int) else margin
    logits = torch.randn(2, 3, *[5] * dims, generator=generator)
    whole = [5 + 2 * n for n in lost]
    target = torch.stack(
        [
            torch.randint(0, 3, (2, *whole), generator=generator).float(),
            torch.rand(2, *whole, generator=generator),
        ],
        dim=1,
    )
    inner = target[(..., *[slice(n, n + 5) for n in lost])]
    loss = WeightedCrossEntropyLoss()
    assert torch.equal(TrainingLoss(loss, margin=margin)({"logits": logits}, target), loss(logits, inner))


@pytest.mark.parametrize(
    ("margin", "size"), [(0, (8, 10)), (1, (8, 8)), (2, (10, 10)), ((1, 0), (8, 8)), ((1,), (10, 10)), (9, (8, 8))]
)
def test_labels_that_are_not_the_logits_and_their_margin_are_refused(
    margin: int | tuple[int, ...], size: tuple[int, int]
) -> None:
    whole = TrainingLoss(DiceCELoss(softmax=True, to_onehot_y=True), margin=margin)
    with pytest.raises(SizeError, match="logits of 8x8 with a margin of"):
        whole({"logits": torch.zeros(1, 2, 8, 8)}, torch.zeros(1, 1, *size))


@pytest.mark.parametrize("margin", [-1, (2, -1)])
def test_a_margin_below_0_is_refused(margin: int | tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="is negative"):
        TrainingLoss(DiceCELoss(), margin=margin)


def test_the_margin_is_what_an_unpadded_unet_takes_off() -> None:
    network = UNet(2, 1, 2, (2, 3, 4), padding="valid")
    image, label = torch.rand(1, 1, 92, 76), torch.ones(1, 2, 92, 76)
    margin = network.margin
    loss = TrainingLoss(WeightedCrossEntropyLoss(), margin=margin)(network.forward_train(image), label)
    loss.backward()
    assert margin == (20, 20)
    assert all(weight.grad is not None for weight in network.parameters())
