"""The loss over a training output."""

from __future__ import annotations

import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss

from medseg.losses import TrainingLoss


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
