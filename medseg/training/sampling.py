"""Which cases a training step takes, in one process or in several."""

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
    """Batches out of an endless row of shuffled passes over the cases.

    Pass `epoch` is a permutation that depends on (seed, epoch) alone, and step `n` takes the next `batch_size` cases of
    the row. So all batches are full, each case comes as often as any other, and what a step takes depends on its number
    alone. An epoch is `len()` steps: one pass, rounded up to whole steps.

    Where several processes train together, each takes its share of every batch; the batches stay the same.

    Args:
        cases: what is drawn from.
        batch_size: cases per step, over all processes.
        seed: of the permutations.
        accumulate: steps whose gradients make one step of the optimizer; an epoch is a multiple of them.
        steps: length of an epoch; 0 for one pass.

    Attributes:
        start: step with which iterating begins.

    Raises:
        RequestError: there are no cases, or a number is too small.
    """

    def __init__(self, cases: Sized, batch_size: int, *, seed: int = 0, accumulate: int = 1, steps: int = 0) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("accumulate", accumulate, 1),
            ("steps_per_epoch", steps, 0),
        ):
            if value < least:
                raise RequestError(f"{name}={value}: expected a whole number from {least}")
        if not len(cases):
            raise RequestError("there are no cases to train on: look at the split of the data set")
        self.count = len(cases)
        self.batch_size = batch_size
        self.seed = seed
        wanted = steps or -(-self.count // batch_size)
        self.steps = -(-wanted // accumulate) * accumulate
        self.start = 0
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return self.steps

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield for each step from `start` on, without end, this process's cases as (epoch, index).

        Raises:
            RequestError: the batch cannot be shared equally among the processes.
        """
        rank, processes = process_rank(), process_count()
        if self.batch_size % processes:
            raise RequestError(
                f"batch_size={self.batch_size} cannot be shared by {processes} processes: choose a multiple of them"
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
