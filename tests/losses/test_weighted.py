"""Weighted cross-entropy: its formula, reductions, what weight 0 means, and its place in other losses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medseg.errors import RequestError, SizeError
from medseg.losses.boundary import BoundaryMultiTaskLoss
from medseg.losses.deep_supervision import DeepSupervision
from medseg.losses.selfreg import SelfRegLoss, SelfRegularizedLoss
from medseg.losses.training import TrainingLoss
from medseg.losses.weighted import WeightedCrossEntropyLoss


def batch(channels: int, *size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, *size, generator=generator)
    label = torch.randint(0, max(channels, 2), (2, 1, *size), generator=generator)
    weight = torch.rand(2, 1, *size, generator=generator) * 9 + 0.1
    return logits, torch.cat([label.float(), weight], 1)


@pytest.mark.parametrize("size", [(7, 9), (4, 5, 6)])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_each_voxel_counts_by_its_weight(channels, size):
    logits, target = batch(channels, *size)
    both = torch.cat([torch.zeros_like(logits), logits], 1) if channels == 1 else logits
    probability = both.softmax(1).gather(1, target[:, :1].long())[:, 0]
    weight = target[:, 1]
    expected = -(weight * probability.log()).sum()
    torch.testing.assert_close(WeightedCrossEntropyLoss("sum")(logits, target), expected)
    torch.testing.assert_close(WeightedCrossEntropyLoss()(logits, target), expected / weight.numel())
    torch.testing.assert_close(WeightedCrossEntropyLoss("weighted_mean")(logits, target), expected / weight.sum())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum"])
def test_voxels_of_weight_0_do_not_count_whatever_is_there(reduction, channels):
    logits, target = batch(channels, 8, 6)
    loss = WeightedCrossEntropyLoss(reduction)
    expected = loss(logits[:, :, :5], target[:, :, :5])
    target[:, 1, 5:], target[:, 0, 5:] = 0, 255
    logits.requires_grad_()
    found = loss(logits, target)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert torch.equal(logits.grad[:, :, 5:], torch.zeros(2, channels, 3, 6))
    assert logits.grad[:, :, :5].abs().min() > 0


def test_without_any_weight_the_loss_is_0():
    logits, target = batch(2, 5, 5)
    target[:, 1] = 0
    for reduction in ("mean", "weighted_mean", "sum"):
        assert WeightedCrossEntropyLoss(reduction)(logits, target) == 0


def test_equal_weights_give_the_plain_cross_entropy():
    logits, target = batch(3, 5, 5)
    target[:, 1] = 1
    expected = F.cross_entropy(logits, target[:, 0].long())
    torch.testing.assert_close(WeightedCrossEntropyLoss()(logits, target), expected)


def test_heads_and_regularizers_pass_the_weights_on():
    logits, target = batch(2, 8, 8)
    inner = WeightedCrossEntropyLoss()
    expected = inner(logits, target)
    torch.testing.assert_close(DeepSupervision(inner)({"logits": logits, "aux": [logits, logits]}, target), expected)
    features = {name: torch.randn(2, 4, 8, 8) for name in ("E2", "D2", "D1")}
    whole = SelfRegularizedLoss(TrainingLoss(inner), SelfRegLoss(0.0, 0.0))
    torch.testing.assert_close(whole({"logits": logits, "features": features}, target), expected)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_the_boundary_loss_gives_weights_to_the_losses_that_read_them(preset):
    logits, target = batch(2, 8, 8)
    output = {"logits": logits, "aux": [logits * 0.5], "edges": [torch.randn(2, 2, 8, 8)]}
    inner = WeightedCrossEntropyLoss()
    plain = BoundaryMultiTaskLoss(preset)
    main, seg = BoundaryMultiTaskLoss(preset, main_loss=inner), BoundaryMultiTaskLoss(preset, seg_loss=inner)
    for weighted, part in ((main, logits), (seg, logits * 0.5)):
        preset_loss = plain.main_loss if weighted is main else plain.stage_loss.losses[0]
        expected = plain(output, target[:, :1]) - preset_loss(part, target[:, :1]) + inner(part, target)
        torch.testing.assert_close(weighted(output, target), expected)
    with pytest.raises(SizeError, match=r"\(2, 3, 8, 8\)"):
        main(output, torch.zeros(2, 3, 8, 8))
    with pytest.raises(SizeError, match=r"\(2, 2, 8, 8\)"):
        plain(output, target)


def test_what_does_not_fit_is_refused():
    logits, target = batch(2, 5, 5)
    with pytest.raises(SizeError, match=r"\(2, 1, 5, 5\).*\(2, 2, 5, 5\)"):
        WeightedCrossEntropyLoss()(logits, target[:, :1])
    with pytest.raises(RequestError, match="reduction='none'"):
        WeightedCrossEntropyLoss("none")
    target[0, 0, 0, 0] = 2
    with pytest.raises(RequestError, match="value 2"):
        WeightedCrossEntropyLoss()(logits, target)
