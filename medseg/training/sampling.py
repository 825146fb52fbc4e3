"""Batch sampler for training, in one or several processes."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler

from medseg.errors import RequestError
from medseg.training.distributed import process_count, process_rank
from medseg.training.randomness import random_state

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

__all__ = ["InfiniteBatchSampler"]

Key = tuple[int, int]


class InfiniteBatchSampler(Sampler[list[Key]]):
    """Sample batches from an infinite shuffled stream of the cases.

    The stream concatenates one permutation of the cases per pass, which depends only on (seed, epoch); step `n` takes
    the next `batch_size` cases. All batches are therefore full, all cases are drawn equally often, and the cases of a
    step depend only on its number. An epoch has `len()` steps: one pass, rounded up to whole steps.

    In distributed training each process takes its share of every batch; the batches are the same as in one process.

    Args:
        cases: Cases to sample from.
        batch_size: Cases per step over all processes.
        seed: Seed of the permutations.
        accumulate: Number of steps whose gradients are accumulated for one optimizer step; the length of an epoch is
            rounded up to a multiple of it.
        steps: Length of an epoch in steps; 0 for one pass over the cases.

    Attributes:
        start: First step of the next iteration.

    Raises:
        RequestError: No cases, or a setting out of range.
    """

    def __init__(self, cases: Sized, batch_size: int, *, seed: int = 0, accumulate: int = 1, steps: int = 0) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("accumulate", accumulate, 1),
            ("steps_per_epoch", steps, 0),
        ):
            if value < least:
                raise RequestError(f"{name}={value}: expected an integer of at least {least}")
        if not len(cases):
            raise RequestError("no training cases: check the split of the dataset")
        self.count = len(cases)
        self.batch_size = batch_size
        self.seed = seed
        wanted = steps or -(-self.count // batch_size)
        self.steps = -(-wanted // accumulate) * accumulate
        self.start = 0
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        return self.steps

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the cases of this process as (epoch, index) for each step from `start` on, infinitely.

        Raises:
            RequestError: Batch size not divisible by the number of processes.
        """
        rank, processes = process_rank(), process_count()
        if self.batch_size % processes:
            raise RequestError(
                f"batch_size={self.batch_size} is not divisible by {processes} processes: choose a multiple of "
                f"{processes}"
            )
        for step in itertools.count(self.start):
            first = step * self.batch_size
            yield [self._key(place) for place in range(first + rank, first + self.batch_size, processes)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _key(self, place: int) -> Key:
        epoch, number = divmod(place, self.count)
        return epoch, self._order(epoch)[number]

    def _permutation(self, epoch: int) -> list[int]:
        order: list[int] = random_state(self.seed, epoch).permutation(self.count).tolist()
        return order
