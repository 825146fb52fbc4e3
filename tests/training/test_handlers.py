"""Seeds, clipping, averaged weights and the wrapper that trains a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn

from medseg.errors import RequestError
from medseg.networks import UNet
from medseg.training.checkpoint import Checkpoints
from medseg.training.handlers import (
    EMA,
    ClipGradients,
    EarlyStop,
    SeedEpochs,
    SeedSteps,
    Validation,
    completes_step,
    needs_scaler,
)
from medseg.training.wrapper import TrainingWrapper


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
    EMA(network, validator, decay).attach(trainer)

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
    average = EMA(network, Engine(lambda e, b: None), 0.9)
    nn.init.ones_(network.weight)
    average.update()
    other = EMA(nn.Linear(2, 2), Engine(lambda e, b: None), 0.9)
    other.load_state_dict(average.state_dict())
    assert other.steps == 1
    assert all(torch.equal(other.average[name], value) for name, value in average.average.items())


def test_the_wrapper_gives_the_whole_output_and_adds_no_weights() -> None:
    network = UNet(2, 1, 2, (4, 8), dropout=0.0)
    wrapped = TrainingWrapper(network)
    image = torch.rand(1, 1, 16, 16)
    output = wrapped(image)
    assert torch.equal(output["logits"], network(image))
    assert list(output["features"]) == ["E1", "B", "D1"]
    assert set(map(id, wrapped.parameters())) == set(map(id, network.parameters()))


def test_a_network_without_training_outputs_gives_its_logits() -> None:
    network = nn.Conv2d(1, 2, 1)
    assert set(TrainingWrapper(network)(torch.rand(1, 1, 4, 4))) == {"logits"}


def test_bfloat16_is_used_in_the_network_and_gradients_stay_float32() -> None:
    network = nn.Conv2d(1, 2, 3)
    logits = TrainingWrapper(network, precision="bfloat16")(torch.rand(1, 1, 8, 8))["logits"]
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.dtype == torch.float32


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown precision 'half'"):
        TrainingWrapper(nn.Conv2d(1, 1, 1), precision="half")


def _train(batch: int, accumulate: int, steps: int, *, clip: float = 0.0, epochs: int = 1) -> nn.Module:
    """Train on the same 12 samples in batches of different sizes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 2, 1))
    images, labels = torch.randn(12, 1, 8, 8), torch.randint(0, 2, (12, 6, 6))
    data = [{"image": images[i : i + batch], "label": labels[i : i + batch]} for i in range(0, batch * steps, batch)]
    trainer = SupervisedTrainer(
        torch.device("cpu"),
        epochs,
        data,
        network,
        torch.optim.SGD(network.parameters(), 0.1, momentum=0.9),
        nn.CrossEntropyLoss(),
        train_handlers=[ClipGradients(network, clip)],
        accumulation_steps=accumulate,
        decollate=False,
    )
    trainer.run()
    return network


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulated_gradients_equal_those_of_a_larger_batch(clip: float) -> None:
    large = _train(batch=4, accumulate=1, steps=3, clip=clip, epochs=2)
    small = _train(batch=2, accumulate=2, steps=6, clip=clip, epochs=2)
    other = _train(batch=2, accumulate=1, steps=6, clip=clip, epochs=2)
    for name, weight in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(other.state_dict()[name], w, atol=1e-4) for name, w in large.state_dict().items())


@pytest.mark.parametrize(
    ("accumulate", "length", "due"), [(1, 3, [1, 2, 3, 4, 5, 6]), (2, 4, [2, 4, 6, 8]), (2, 3, [2, 3, 5, 6])]
)
def test_the_optimizer_moves_after_each_group_and_at_the_end_of_an_epoch(
    accumulate: int, length: int, due: list[int]
) -> None:
    moved = []
    trainer = Engine(lambda engine, batch: moved.append(engine.state.iteration) if completes_step(engine) else None)
    trainer.accumulation_steps = accumulate
    trainer.run([0] * length, max_epochs=2)
    assert moved == due


def test_the_average_counts_steps_of_the_optimizer() -> None:
    network = nn.Linear(1, 1)
    average = EMA(network, Engine(lambda e, b: None), 0.9)
    trainer = Engine(lambda engine, batch: None)
    trainer.accumulation_steps = 2
    average.attach(trainer)
    trainer.run([0] * 4, max_epochs=2)
    assert average.steps == 4


def test_what_a_step_draws_depends_on_seed_and_step_alone() -> None:
    def draws(seed: int, start: int = 0) -> list[tuple[float, float]]:
        found = []
        trainer = Engine(lambda engine, batch: found.append((float(torch.rand(())), float(np.random.rand()))))
        SeedSteps(seed).attach(trainer)
        trainer.state.max_epochs, trainer.state.epoch_length = 3, 3
        trainer.state.epoch, trainer.state.iteration = start // 3, start
        trainer.run([0] * 3)
        return found

    whole = draws(1)
    assert len(set(whole)) == 9
    assert draws(1, 4) == whole[4:]
    assert not set(draws(2)) & set(whole)


def _stopping(scores: list[float], patience: int, state: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Train with validations that give these scores; return the epochs that were trained, and the handler's state."""
    given = iter(scores)
    validator = Engine(lambda engine, batch: None)
    validator.state.key_metric_name = "dice"

    @validator.on(Events.EPOCH_COMPLETED)
    def _measure(engine: Engine) -> None:
        engine.state.metrics = {"dice": next(given)}

    ended: list[int] = []
    trainer = Engine(lambda engine, batch: None)
    stop = EarlyStop(validator, patience)
    if state is not None:
        stop.load_state_dict(state)
    stop.attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def _validate(engine: Engine) -> None:
        validator.state.epoch = engine.state.epoch
        validator.fire_event(Events.EPOCH_COMPLETED)
        ended.append(engine.state.epoch)

    trainer.run([0], max_epochs=len(scores))
    return len(ended), dict(stop.state_dict())


@pytest.mark.parametrize(
    ("scores", "patience", "epochs"),
    [
        ([0.5, 0.4, 0.4, 0.6, 0.1, 0.1, 0.1], 3, 7),
        ([0.5, 0.4, 0.4, 0.4, 0.9], 3, 4),
        ([0.5, 0.4, 0.4, 0.4, 0.9], 0, 5),
        ([0.5, 0.5, 0.9], 1, 2),
        ([float("nan"), 0.5, float("nan"), float("nan"), 0.9], 2, 4),
    ],
)
def test_training_ends_when_nothing_improves_for_too_long(scores: list[float], patience: int, epochs: int) -> None:
    assert _stopping(scores, patience)[0] == epochs


@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(interrupted: int) -> None:
    scores = [0.5, 0.4, 0.6, 0.55, 0.1, 0.9]
    whole, end = _stopping(scores, 2)
    _, state = _stopping(scores[:interrupted], 2)
    epochs, resumed = _stopping(scores[interrupted:], 2, state)
    assert (interrupted + epochs, resumed) == (whole, end)
    assert whole == 5


def test_a_run_that_had_stopped_does_not_go_on() -> None:
    _, stopped = _stopping([0.5, 0.4, 0.4, 0.9], 2)
    assert _stopping([0.9, 0.9], 2, stopped)[0] == 0
    assert _stopping([0.4, 0.9], 3, stopped)[0] == 1


@pytest.mark.parametrize(("interval", "epochs", "expected"), [(2, 5, [2, 4, 5]), (2, 4, [2, 4]), (9, 1, [1])])
def test_the_last_epoch_is_always_validated(interval: int, epochs: int, expected: list[int]) -> None:
    seen: list[int] = []
    validator = SupervisedEvaluator(
        torch.device("cpu"), [{"image": torch.zeros(1), "label": torch.zeros(1)}], nn.Identity()
    )
    trainer = Engine(lambda engine, batch: None)
    validator.add_event_handler(Events.COMPLETED, lambda: seen.append(trainer.state.epoch))
    Validation(interval, validator).attach(trainer)
    trainer.run([0], max_epochs=epochs)
    assert seen == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Validation(0, None), "val_interval=0"),
        (lambda: EarlyStop(Engine(lambda e, b: None), -1), "patience=-1"),
        (lambda: EMA(nn.Linear(2, 2), Engine(lambda e, b: None), 1.0), "ema_decay=1.0"),
        (lambda: EMA(nn.Linear(2, 2), Engine(lambda e, b: None), -0.5), "ema_decay=-0.5"),
        (lambda: ClipGradients(nn.Linear(2, 2), float("nan")), "gradient_clip=nan"),
        (lambda: Checkpoints("", "", Engine(lambda e, b: None), {}, save_minutes=-1.0), "save_minutes=-1.0"),
        (lambda: needs_scaler("float16", "cpu"), "precision=float16 needs a CUDA device"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


def test_only_float16_is_scaled() -> None:
    assert [needs_scaler(each, "cuda") for each in ("float32", "bfloat16", "float16")] == [False, False, True]


def test_a_compiled_network_is_refused_with_taps() -> None:
    with pytest.raises(RequestError, match="compile=true does not support taps"):
        TrainingWrapper(nn.Sequential(nn.Conv2d(1, 1, 1)), taps={"E1": "0"}, compile=True)


@pytest.mark.parametrize(("max_norm", "expected"), [(1.0, 1.0), (100.0, 6.0)])
def test_scaled_gradients_are_clipped_at_their_true_size(max_norm: float, expected: float) -> None:
    network = nn.Linear(4, 1, bias=False)
    trainer = Engine(lambda engine, batch: None)
    trainer.register_events(*IterationEvents)
    trainer.optimizer = torch.optim.SGD(network.parameters(), 1.0)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ClipGradients(network, max_norm).attach(trainer)
    trainer.scaler.scale((3.0 * network.weight).sum()).backward()
    trainer.fire_event(IterationEvents.BACKWARD_COMPLETED)
    assert network.weight.grad is not None
    assert float(network.weight.grad.norm()) == pytest.approx(expected)
    before = network.weight.detach().clone()
    trainer.scaler.step(trainer.optimizer)
    assert float((before - network.weight.detach()).norm()) == pytest.approx(expected)
