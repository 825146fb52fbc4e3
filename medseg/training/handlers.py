"""Ignite handlers for what MONAI's trainer leaves open: seeds, clipping, averaged weights, stopping early."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Events
from ignite.handlers import EarlyStopping
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler

from medseg.errors import RequestError
from medseg.training.distributed import process_rank
from medseg.training.randomness import seed_everything, seed_from

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ignite.engine import Engine
    from torch import nn

__all__ = [
    "EMA",
    "ClipGradients",
    "EarlyStop",
    "SeedEpochs",
    "SeedSteps",
    "Validation",
    "completes_step",
    "needs_scaler",
]

logger = logging.getLogger(__name__)


def completes_step(engine: Engine) -> bool:
    """Tell whether the optimizer moves the weights at the present iteration of a trainer that accumulates gradients."""
    accumulated = getattr(engine, "accumulation_steps", 1)
    length = engine.state.epoch_length or accumulated
    done = (engine.state.iteration - 1) % length + 1
    return bool(done % accumulated == 0 or done == length)


def needs_scaler(precision: str, device: torch.device | str) -> bool:
    """Tell whether gradients have to be scaled so that they stay within the range of the arithmetic.

    Raises:
        RequestError: float16 without a CUDA device.
    """
    if precision != "float16":
        return False
    if torch.device(device).type != "cuda":
        raise RequestError("precision=float16 needs a CUDA device to train on: use bfloat16, or float32")
    return True


class SeedEpochs:
    """Seed sampling and augmentation of one of MONAI's data sets anew at the start of each epoch.

    An epoch's random numbers then depend on the seed and the epoch's number alone, so a run that is resumed between two
    epochs draws what the uninterrupted one would have drawn. `SeededDataset` needs `SeedSteps` instead.

    Args:
        seed: the run's seed.
        dataset: a MONAI dataset with a random `transform`.
    """

    def __init__(self, seed: int, dataset: Any) -> None:
        self.seed = seed
        self.dataset = dataset

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer's epochs."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the epoch that begins."""
        seed = seed_from(self.seed, engine.state.epoch)
        seed_everything(seed)
        self.dataset.transform.set_random_state(seed=seed)


class SeedSteps:
    """Seed the global random generators, from which dropout and some losses draw, anew at each step.

    What a step draws then depends on the seed, its number and the process alone, wherever a run was interrupted.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer's steps."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the step that begins."""
        seed_everything(seed_from(self.seed, engine.state.iteration, process_rank()))


class ClipGradients:
    """Scale the gradient of a step down to a largest norm.

    Args:
        network: whose gradient.
        max_norm: largest L2 norm over all parameters; 0 leaves gradients alone.

    Raises:
        RequestError: the norm is below 0.
    """

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        if not max_norm >= 0:
            raise RequestError(f"gradient_clip={max_norm}: expected a norm above 0, or 0 for no clipping")
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer's backward passes."""
        if self.max_norm > 0:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip the gradient of the step that is about to be taken, the sum of those that were accumulated."""
        if not completes_step(engine):
            return
        scaler = getattr(engine, "scaler", None)
        if scaler is not None:
            scaler.unscale_(engine.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class EMA:
    """Keep an exponential average of the weights, and validate and save with it.

    While the validator runs, the network holds the averaged weights; afterwards it holds the trained ones again. The
    decay rises with the number of steps `n` as `(1 + n) / (10 + n)` until it reaches `decay`, so that the average
    forgets the initial weights.

    Args:
        network: the network that is trained.
        validator: engine that validates it.
        decay: share of the average that one step of the optimizer keeps, 0 (no averaging) to below 1.

    Raises:
        RequestError: the share is outside of that range.
    """

    def __init__(self, network: nn.Module, validator: Engine, decay: float) -> None:
        if not 0 <= decay < 1:
            raise RequestError(f"ema_decay={decay}: expected a share from 0 (no averaging) to below 1, such as 0.99")
        self.network = network
        self.validator = validator
        self.decay = decay
        self.steps = 0
        self.average = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer's steps and to the validator's runs."""
        if self.decay > 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._stepped)
            self.validator.add_event_handler(Events.STARTED, self.swap)
            self.validator.add_event_handler(Events.COMPLETED, self.swap)

    def _stepped(self, engine: Engine) -> None:
        if completes_step(engine):
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in self._tensors():
            self.average[name].lerp_(tensor, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's weights and the average."""
        for name, tensor in self._tensors():
            kept = tensor.detach().clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier run."""
        self.steps = int(state["steps"])
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.network.state_dict().items():
            if tensor.is_floating_point():
                yield name, tensor


class Validation(ValidationHandler):  # type: ignore[misc]  # MONAI publishes no types
    """Validate every few epochs, and after the last one, without which a short training would leave no weights.

    Args:
        interval: epochs between two validations.
        validator: engine that validates.

    Raises:
        RequestError: the interval is below 1.
    """

    def __init__(self, interval: int, validator: Engine) -> None:
        if interval < 1:
            raise RequestError(f"val_interval={interval}: expected a number of epochs from 1")
        super().__init__(interval, validator)

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer's epochs."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._is_due), self)

    def _is_due(self, engine: Engine, epoch: int) -> bool:
        return bool(epoch % self.interval == 0 or epoch == engine.state.max_epochs)


class EarlyStop(EarlyStopping):  # type: ignore[misc]  # ignite publishes no types
    """End the training when a number of validations in a row brought no better key metric.

    This is ignite's handler with three additions: it is made before the trainer that it stops, it counts a metric
    without a finite value as no improvement, and a resumed run that had stopped does not go on.

    Args:
        validator: Engine with the key metric.
        patience: Number of validations without improvement after which training ends; 0 never ends it.

    Raises:
        RequestError: The patience is negative.
    """

    def __init__(self, validator: Engine, patience: int) -> None:
        if patience < 0:
            raise RequestError(f"patience={patience}: expected a number of validations, or 0 for no early stop")
        super().__init__(max(patience, 1), _key_metric, trainer=validator)
        self.validator = validator
        self.is_active = patience > 0
        # ignite's own logger writes to the terminal by itself.
        self.logger = logger

    def attach(self, engine: Engine) -> None:
        """Listen to the validator's results, and to the start of the trainer's epochs."""
        self.trainer = engine
        if self.is_active:
            self.validator.add_event_handler(Events.EPOCH_COMPLETED, self)
            engine.add_event_handler(Events.EPOCH_STARTED, self.stop_if_due)

    def stop_if_due(self) -> None:
        """End a resumed training that had stopped before."""
        if self.counter >= self.patience:
            self.trainer.terminate()


def _key_metric(validator: Engine) -> float:
    """Return the key metric of a validation; the lowest value if it is not finite, which ignite would call better."""
    value = float(validator.state.metrics[validator.state.key_metric_name])
    return value if math.isfinite(value) else -math.inf
