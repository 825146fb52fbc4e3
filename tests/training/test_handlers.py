"""Seeds, clipping, averaged weights and the wrapper that trains a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import nn

from medseg.errors import RequestError
from medseg.networks import UNet
from medseg.training import ClipGradients, SeedEpochs, TrainingOutputs, WeightAverage


class _Transform:
    def set_random_state(self, seed: int) -> None:
        self.seed = seed


class _Dataset:
    def __init__(self) -> None:
        self.transform = _Transform()


def _draws(seed: int, epochs: int) -> list[tuple[float, float, int]]:
    dataset = _Dataset()
    trainer = Engine(lambda engine, batch: None)
    SeedEpochs(seed, dataset).attach(trainer)
    drawn: list[tuple[float, float, int]] = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def _record() -> None:
        drawn.append((float(torch.rand(())), float(np.random.rand()), dataset.transform.seed))

    trainer.run([0], max_epochs=epochs)
    return drawn


def test_an_epochs_random_numbers_depend_on_seed_and_epoch_alone() -> None:
    first = _draws(3, 4)
    assert _draws(3, 4) == first
    assert len(set(first)) == 4
    assert not set(_draws(4, 4)) & set(first)


@pytest.mark.parametrize(("max_norm", "expected"), [(1.0, 1.0), (0.0, 6.0), (10.0, 6.0)])
def test_gradients_are_clipped_to_the_norm(max_norm: float, expected: float) -> None:
    network = nn.Linear(4, 1, bias=False)
    trainer = Engine(lambda engine, batch: None)
    trainer.register_events(*IterationEvents)
    ClipGradients(network, max_norm).attach(trainer)
    network.weight.grad = torch.full((1, 4), 3.0)
    trainer.fire_event(IterationEvents.BACKWARD_COMPLETED)
    assert float(network.weight.grad.norm()) == pytest.approx(expected)


def _averaging(decay: float, steps: int) -> tuple[nn.Linear, list[float], list[float]]:
    """Train a weight through the values 1, 2, 3, ... and return what the validator saw and what was there after it."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    seen: list[float] = []
    after: list[float] = []
    validator = Engine(lambda engine, batch: seen.append(float(network.weight.detach())))

    def step(engine: Engine, batch: Any) -> None:
        network.weight.data.fill_(float(engine.state.iteration))

    trainer = Engine(step)
    WeightAverage(network, validator, decay).attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def _validate() -> None:
        validator.run([0])
        after.append(float(network.weight.detach()))

    trainer.run([0] * steps, max_epochs=1)
    return network, seen, after


def test_the_validator_sees_the_averaged_weights_and_the_trainer_its_own() -> None:
    _, seen, after = _averaging(decay=0.99, steps=3)
    expected = 0.0
    for step in (1, 2, 3):
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert seen == [pytest.approx(expected)]
    assert after == [3.0]


def test_without_averaging_the_validator_sees_the_trained_weights() -> None:
    assert _averaging(decay=0.0, steps=3)[1] == [3.0]


def test_the_average_survives_a_round_trip() -> None:
    network = nn.Linear(2, 2)
    average = WeightAverage(network, Engine(lambda e, b: None), 0.9)
    nn.init.ones_(network.weight)
    average.update()
    other = WeightAverage(nn.Linear(2, 2), Engine(lambda e, b: None), 0.9)
    other.load_state_dict(average.state_dict())
    assert other.steps == 1
    assert all(torch.equal(other.average[name], value) for name, value in average.average.items())


def test_the_wrapper_gives_the_whole_output_and_adds_no_weights() -> None:
    network = UNet(2, 1, 2, (4, 8), dropout=0.0)
    wrapped = TrainingOutputs(network)
    image = torch.rand(1, 1, 16, 16)
    output = wrapped(image)
    assert torch.equal(output["logits"], network(image))
    assert list(output["features"]) == ["E1", "B", "D1"]
    assert set(map(id, wrapped.parameters())) == set(map(id, network.parameters()))


def test_a_network_without_training_outputs_gives_its_logits() -> None:
    network = nn.Conv2d(1, 2, 1)
    assert set(TrainingOutputs(network)(torch.rand(1, 1, 4, 4))) == {"logits"}


def test_bfloat16_is_used_in_the_network_and_gradients_stay_float32() -> None:
    network = nn.Conv2d(1, 2, 3)
    logits = TrainingOutputs(network, precision="bfloat16")(torch.rand(1, 1, 8, 8))["logits"]
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.dtype == torch.float32


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown precision 'half'"):
        TrainingOutputs(nn.Conv2d(1, 1, 1), precision="half")
