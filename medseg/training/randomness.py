"""Reproducible random numbers, seeded per sample and per step.

The random numbers of sample `index` in epoch `epoch` depend only on (seed, epoch, index), those of step `n` on
(seed, n). They do not depend on the process that draws them, on the order or on interruptions of the run.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.random import RandomState

__all__ = [
    "deterministic_kernels",
    "generator_states",
    "isolated_seed",
    "random_state",
    "restore_generators",
    "seed_everything",
    "seed_from",
]


def seed_from(*numbers: int) -> int:
    """Return a seed below 2**32, derived from all numbers in order."""
    return int(_sequence(numbers).generate_state(1)[0])


def random_state(*numbers: int) -> RandomState:
    """Return a `RandomState`, whose numbers are the same in all versions of NumPy."""
    return np.random.RandomState(np.random.MT19937(_sequence(numbers)))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def isolated_seed(seed: int) -> Iterator[None]:
    """Seed the global CPU generators inside the context and restore their states on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def deterministic_kernels(enabled: bool = True) -> None:
    """Make torch use deterministic kernels where it has them.

    Args:
        enabled: Whether to use deterministic kernels; False lets cuDNN choose the fastest ones.
    """
    # On CUDA, torch would warn of every operation without a deterministic kernel.
    torch.use_deterministic_algorithms(enabled and not torch.cuda.is_available(), warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = not enabled


def generator_states() -> dict[str, Any]:
    """Return the states of the global generators as tensors and plain numbers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Restore the states from `generator_states`; the CUDA ones only if the number of devices is the same."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _sequence(numbers: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence([number % 2**64 for number in numbers])
