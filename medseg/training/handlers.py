"""Ignite handlers for what MONAI's trainer leaves open: seeds, gradient clipping, averaged weights."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents

if TYPE_CHECKING:
    from ignite.engine import Engine
    from torch import nn

__all__ = ["ClipGradients", "SeedEpochs", "WeightAverage", "seed_everything"]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class SeedEpochs:
    """Seed sampling and augmentation anew at the start of each epoch.

    An epoch's random numbers then depend on the seed and the epoch's number alone, so a resumed run draws what the
    uninterrupted one would have drawn.

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
        seed = int(np.random.SeedSequence((self.seed, engine.state.epoch)).generate_state(1)[0])
        seed_everything(seed)
        self.dataset.transform.set_random_state(seed=seed)


class ClipGradients:
    """Scale the gradient of a step down to a largest norm.

    Args:
        network: whose gradient.
        max_norm: largest L2 norm over all parameters; 0 leaves gradients alone.
    """

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer's backward passes."""
        if self.max_norm > 0:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip the gradient of the step that is about to be taken."""
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class WeightAverage:
    """Keep an exponential average of the weights, and validate and save with it.

    While the validator runs, the network holds the averaged weights; afterwards it holds the trained ones again. The
    decay rises with the number of steps `n` as `(1 + n) / (10 + n)` until it reaches `decay`, so that the average
    forgets the initial weights.

    Args:
        network: the network that is trained.
        validator: engine that validates it.
        decay: share of the average that one step keeps, 0 (no averaging) to below 1.
    """

    def __init__(self, network: nn.Module, validator: Engine, decay: float) -> None:
        self.network = network
        self.validator = validator
        self.decay = decay
        self.steps = 0
        self.average = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer's steps and to the validator's runs."""
        if self.decay > 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
            self.validator.add_event_handler(Events.STARTED, self.swap)
            self.validator.add_event_handler(Events.COMPLETED, self.swap)

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

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensor) for name, tensor in self.network.state_dict().items() if tensor.is_floating_point()]
