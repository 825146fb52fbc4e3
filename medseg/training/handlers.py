"""Ignite handlers: seeding, gradient clipping, EMA of the weights, validation intervals and early stopping."""

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
    """Return whether the optimizer steps at the current iteration, with gradient accumulation."""
    accumulated = getattr(engine, "accumulation_steps", 1)
    length = engine.state.epoch_length or accumulated
    done = (engine.state.iteration - 1) % length + 1
    return bool(done % accumulated == 0 or done == length)


def needs_scaler(precision: str, device: torch.device | str) -> bool:
    """Return whether training in this precision needs a gradient scaler.

    Raises:
        RequestError: float16 without a CUDA device.
    """
    if precision != "float16":
        return False
    if torch.device(device).type != "cuda":
        raise RequestError("precision=float16 needs a CUDA device: use bfloat16 or float32")
    return True


class SeedEpochs:
    """Seed the sampling and augmentation of a MONAI dataset at the start of each epoch.

    The random numbers of an epoch then depend only on the seed and the epoch, so a run resumed between two epochs draws
    the same numbers as an uninterrupted run. With `SeededDataset` use `SeedSteps` instead.

    Args:
        seed: Seed of the run.
        dataset: MONAI dataset with a random `transform`.
    """

    def __init__(self, seed: int, dataset: Any) -> None:
        self.seed = seed
        self.dataset = dataset

    def attach(self, engine: Engine) -> None:
        """Register the handler at the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the epoch that starts."""
        seed = seed_from(self.seed, engine.state.epoch)
        seed_everything(seed)
        self.dataset.transform.set_random_state(seed=seed)


class SeedSteps:
    """Seed the global random generators, which dropout and some losses use, before each step.

    The random numbers of a step then depend only on the seed, the iteration and the rank, even in a resumed run.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register the handler at the trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the step that starts."""
        seed_everything(seed_from(self.seed, engine.state.iteration, process_rank()))


class ClipGradients:
    """Clip the gradient norm before each optimizer step.

    Args:
        network: Network whose gradients are clipped.
        max_norm: Maximum L2 norm of the gradient over all parameters; 0 disables clipping.

    Raises:
        RequestError: Negative norm.
    """

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        if not max_norm >= 0:
            raise RequestError(f"gradient_clip={max_norm}: expected a norm above 0, or 0 for no clipping")
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Register the handler at the trainer."""
        if self.max_norm > 0:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip the accumulated gradient before an optimizer step."""
        if not completes_step(engine):
            return
        scaler = getattr(engine, "scaler", None)
        if scaler is not None:
            scaler.unscale_(engine.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class EMA:
    """Exponential moving average of the weights, used for validation and for the best weights.

    During validation the network holds the averaged weights; afterwards the trained weights are restored. The decay is
    warmed up as `min(decay, (1 + n) / (10 + n))` over the steps `n`, so that the initial weights are forgotten.

    Args:
        network: Network to train.
        validator: Engine that validates the network.
        decay: Decay per optimizer step, in [0, 1); 0 disables averaging.

    Raises:
        RequestError: Decay out of range.
    """

    def __init__(self, network: nn.Module, validator: Engine, decay: float) -> None:
        if not 0 <= decay < 1:
            raise RequestError(f"ema_decay={decay}: expected a value in [0, 1), such as 0.99, or 0 for no averaging")
        self.network = network
        self.validator = validator
        self.decay = decay
        self.steps = 0
        self.average = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def attach(self, engine: Engine) -> None:
        """Register the handlers at the trainer and at the validator."""
        if self.decay > 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._stepped)
            self.validator.add_event_handler(Events.STARTED, self.swap)
            self.validator.add_event_handler(Events.COMPLETED, self.swap)

    def _stepped(self, engine: Engine) -> None:
        if completes_step(engine):
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in self._tensors():
            self.average[name].lerp_(tensor, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Swap the weights of the network and the average."""
        for name, tensor in self._tensors():
            kept = tensor.detach().clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of an earlier run."""
        self.steps = int(state["steps"])
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.network.state_dict().items():
            if tensor.is_floating_point():
                yield name, tensor


class Validation(ValidationHandler):  # type: ignore[misc]  # MONAI publishes no types
    """Validate every `interval` epochs and after the last one, so that even a short training saves weights.

    Args:
        interval: Number of epochs between validations, at least 1.
        validator: Engine that validates.

    Raises:
        RequestError: Interval below 1.
    """

    def __init__(self, interval: int, validator: Engine) -> None:
        if interval < 1:
            raise RequestError(f"val_interval={interval}: expected at least 1 epoch")
        super().__init__(interval, validator)

    def attach(self, engine: Engine) -> None:
        """Register the handler at the trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._is_due), self)

    def _is_due(self, engine: Engine, epoch: int) -> bool:
        return bool(epoch % self.interval == 0 or epoch == engine.state.max_epochs)


class EarlyStop(EarlyStopping):  # type: ignore[misc]  # ignite publishes no types
    """Stop training when the key metric has not improved for a number of validations.

    Extends ignite's handler: it is created before the trainer, counts a non-finite metric as no improvement, and stops
    a resumed run that had already stopped.

    Args:
        validator: Engine with the key metric.
        patience: Number of validations without improvement after which training stops; 0 disables early stopping.

    Raises:
        RequestError: Negative patience.
    """

    def __init__(self, validator: Engine, patience: int) -> None:
        if patience < 0:
            raise RequestError(f"patience={patience}: expected a number of validations, or 0 for no early stopping")
        super().__init__(max(patience, 1), _key_metric, trainer=validator)
        self.validator = validator
        self.is_active = patience > 0
        # ignite's own logger would print to the terminal.
        self.logger = logger

    def attach(self, engine: Engine) -> None:
        """Register the handlers at the validator and at the trainer."""
        self.trainer = engine
        if self.is_active:
            self.validator.add_event_handler(Events.EPOCH_COMPLETED, self)
            engine.add_event_handler(Events.EPOCH_STARTED, self.stop_if_due)

    def stop_if_due(self) -> None:
        """Stop a resumed training that had already stopped."""
        if self.counter >= self.patience:
            self.trainer.terminate()


def _key_metric(validator: Engine) -> float:
    """Return the key metric of a validation; -inf if it is not finite, which ignite would count as an improvement."""
    value = float(validator.state.metrics[validator.state.key_metric_name])
    return value if math.isfinite(value) else -math.inf
