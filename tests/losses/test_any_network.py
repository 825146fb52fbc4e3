"""The regularizer on the features of every network of the package."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss

from medseg.losses.selfreg import SelfRegLoss, SelfRegularizedLoss
from medseg.losses.training import TrainingLoss
from medseg.networks import NETWORKS, small


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", [entry.load() for entry in NETWORKS.values()], ids=lambda network: network.__name__)
def test_selfreg_trains_every_network_on_its_own_features(network, dims):
    torch.manual_seed(0)
    subject = network(dims, 1, 2, **small(network.__name__, dims)).train()
    size = (64, 64) if dims == 2 else (32, 32, 32)
    image, label = torch.randn(2, 1, *size), torch.randint(0, 2, (2, 1, *size))
    plain = TrainingLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    whole = SelfRegularizedLoss(plain, SelfRegLoss())
    optimizer = torch.optim.Adam(subject.parameters(), lr=1e-3)
    values = []
    for _ in range(4):
        optimizer.zero_grad()
        output = subject.forward_train(image)
        loss = whole(output, label)
        assert loss > plain(output, label)
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0]
