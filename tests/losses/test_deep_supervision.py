"""The loss over all heads of a training output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from torch import nn

from medseg.errors import RequestError
from medseg.losses.deep_supervision import BCEDiceLoss, DeepSupervision
from medseg.losses.training import TrainingLoss
from medseg.networks import UNet, UNetPlusPlus
from medseg.networks.convert import from_reference
from medseg.training.wrapper import TrainingWrapper

GOLDEN = Path(__file__).parents[1] / "golden"


def logits(channels: int, heads: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, 8, 6, generator=generator) for _ in range(heads)]


def classes(count: int) -> torch.Tensor:
    return torch.randint(0, count, (2, 1, 8, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["unetpp2d", "unetpp3d"])
def test_reference_losses_of_every_head_are_reproduced(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(a) for key, a in file.items() if key != "meta"}
    state = {key.removeprefix("state/"): a for key, a in arrays.items() if key.startswith("state/")}
    network = from_reference("unetpp-port", state)
    with torch.no_grad():
        output = network.forward_train(arrays["input"])
    expected = arrays["loss/per_head_bce_dice_total"].float()
    target = arrays["target"]
    for head, (bce, dice, total) in zip(output["aux"], expected, strict=True):
        assert BCEDiceLoss(bce_weight=0)(head, target).item() == pytest.approx(1 - dice.item(), abs=1e-5)
        whole = BCEDiceLoss()(head, target)
        assert whole.item() == pytest.approx(total.item() + 1, abs=1e-5)
        assert (BCEDiceLoss(bce_weight=1)(head, target) - whole).item() == pytest.approx(bce.item() / 2, abs=1e-5)
    mean = DeepSupervision()(output, target)
    assert mean.item() == pytest.approx(expected[:, 2].mean().item() + 1, abs=1e-5)


def test_binary_loss_is_monais_with_the_same_settings():
    head, label = logits(1)[0], classes(2)
    monai = DiceCELoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1, lambda_ce=0.5)
    torch.testing.assert_close(BCEDiceLoss()(head, label), monai(head, label))


def test_empty_masks_that_agree_cost_nothing():
    assert BCEDiceLoss()(torch.full((1, 1, 4, 4), -40.0), torch.zeros(1, 1, 4, 4)).item() == pytest.approx(0, abs=1e-6)


def test_one_label_channel_does_not_stand_for_many_classes():
    with pytest.raises(RequestError, match=r"\(2, 3, 8, 6\) and \(2, 1, 8, 6\).*DiceCELoss"):
        BCEDiceLoss()(logits(3)[0], classes(3))


def test_loss_is_the_mean_over_the_heads():
    heads, label = logits(1), classes(2)
    expected = sum(BCEDiceLoss()(head, label) for head in heads) / 3
    torch.testing.assert_close(DeepSupervision()({"logits": heads[-1], "aux": heads}, label), expected)


@pytest.mark.parametrize("weights", [(1, 2, 3), (0.5, 0, 0.25), (0, 0, 7)])
def test_weights_make_a_weighted_mean_shallow_first(weights):
    heads, label = logits(1), classes(2)
    losses = [BCEDiceLoss()(head, label) for head in heads]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    found = DeepSupervision(weights=weights)({"logits": heads[-1], "aux": heads}, label)
    torch.testing.assert_close(found, expected)


def test_any_loss_serves_several_exclusive_classes():
    heads, label = logits(4), classes(4)
    loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True, lambda_ce=0.5)
    expected = sum(loss(head, label) for head in heads) / 3
    torch.testing.assert_close(DeepSupervision(loss)({"logits": heads[-1], "aux": heads}, label), expected)


def test_without_heads_it_is_the_loss_of_the_logits():
    output, label = UNet(2, 1, 1, (2, 3)).forward_train(torch.randn(2, 1, 8, 6)), classes(2)
    assert torch.equal(DeepSupervision()(output, label), TrainingLoss(BCEDiceLoss())(output, label))


def test_half_precision_is_widened_and_metadata_left_behind():
    heads, label = [head.bfloat16() for head in logits(1)], classes(2)
    output = {"logits": heads[-1], "aux": heads}
    found = DeepSupervision()(output, MetaTensor(label))
    wide = [head.float() for head in heads]
    assert torch.equal(found, DeepSupervision()({"logits": wide[-1], "aux": wide}, label))
    assert type(found) is torch.Tensor
    assert found.dtype == torch.float32


def test_every_weighted_head_gets_gradient():
    heads = [head.requires_grad_() for head in logits(1)]
    DeepSupervision(weights=(1, 0, 2))({"logits": heads[-1], "aux": heads}, classes(2)).backward()
    assert [bool(head.grad.any()) for head in heads] == [True, False, True]


def test_another_number_of_weights_than_heads_is_refused():
    heads = logits(1)
    with pytest.raises(RequestError, match=r"2 weights=.* for 3 head"):
        DeepSupervision(weights=(1, 1))({"logits": heads[-1], "aux": heads}, classes(2))


@pytest.mark.parametrize("weights", [(0, 0), (1, -1), ()])
def test_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(RequestError, match="above 0"):
        DeepSupervision(weights=weights)


@pytest.mark.parametrize(
    ("channels", "loss"),
    [
        (1, {"_target_": "medseg.components.BCEDiceLoss"}),
        (3, {"_target_": "monai.losses.DiceCELoss", "softmax": True, "to_onehot_y": True, "include_background": False}),
    ],
    ids=["binary", "softmax"],
)
def test_a_config_trains_with_it_in_monais_trainer(channels, loss):
    config = {"loss": {"_target_": "medseg.components.DeepSupervision", "loss": loss, "weights": [1, 0.5]}}
    torch.manual_seed(0)
    network = UNetPlusPlus(2, 1, channels, (4, 6, 8), norm="batch")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    label = classes(max(channels, 2))
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=6,
        train_data_loader=[{"image": label + 0.1 * torch.randn(2, 1, 8, 6), "label": label}],
        network=TrainingWrapper(network),
        optimizer=torch.optim.Adam(network.parameters(), 5e-3),
        loss_function=ConfigParser(config).get_parsed_content("loss"),
        decollate=False,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"]))
    trainer.run()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in network.named_parameters() if p.dim() > 1)


def test_it_is_a_module_without_weights():
    assert isinstance(DeepSupervision(), nn.Module)
    assert not DeepSupervision().state_dict()
