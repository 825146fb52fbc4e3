"""Which cases a step takes: full batches, each case as often as any other, the same in any number of processes."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from typing import Any

import pytest

from medseg.errors import RequestError
from medseg.training import sampling
from medseg.training.sampling import InfiniteBatchSampler

Key = tuple[int, int]


def _take(batches: InfiniteBatchSampler, steps: int) -> list[list[Key]]:
    return list(itertools.islice(batches, steps))


@pytest.mark.parametrize(("cases", "batch_size"), [(7, 2), (4, 4), (3, 5), (1, 1)])
def test_every_batch_is_full_and_every_case_comes_once_in_each_pass(cases: int, batch_size: int) -> None:
    keys = [key for batch in _take(InfiniteBatchSampler(range(cases), batch_size, seed=1), 3 * cases) for key in batch]
    assert len(keys) == 3 * cases * batch_size
    laps = 3 * batch_size
    assert Counter(keys) == Counter((epoch, index) for epoch in range(laps) for index in range(cases))


def test_the_order_depends_on_the_seed_and_the_pass() -> None:
    first = _take(InfiniteBatchSampler(range(50), 50, seed=1), 2)
    assert _take(InfiniteBatchSampler(range(50), 50, seed=1), 2) == first
    assert _take(InfiniteBatchSampler(range(50), 50, seed=2), 2) != first
    assert [index for _, index in first[0]] != [index for _, index in first[1]]


def test_starting_later_gives_the_rest() -> None:
    batches = InfiniteBatchSampler(range(7), 2, seed=3)
    whole = _take(batches, 9)
    batches.start = 4
    assert _take(batches, 5) == whole[4:]


def test_an_epoch_is_one_pass_rounded_up_to_whole_steps_of_the_optimizer() -> None:
    assert len(InfiniteBatchSampler(range(7), 2)) == 4
    assert len(InfiniteBatchSampler(range(7), 2, accumulate=3)) == 6
    assert len(InfiniteBatchSampler(range(7), 2, steps=5)) == 5
    assert len(InfiniteBatchSampler(range(7), 2, steps=5, accumulate=2)) == 6


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_that_one_would_take(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = InfiniteBatchSampler(range(7), 6, seed=3)
    whole = _take(batches, 5)
    monkeypatch.setattr(sampling, "process_count", lambda: processes)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(sampling, "process_rank", lambda rank=rank: rank)
        shares.append(_take(batches, 5))
    for step, batch in enumerate(whole):
        assert sorted(key for share in shares for key in share[step]) == sorted(batch)
        assert {len(share[step]) for share in shares} == {6 // processes}


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "process_count", lambda: 4)
    with pytest.raises(RequestError, match="batch_size=6 is not divisible by 4 processes"):
        next(iter(InfiniteBatchSampler(range(7), 6)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1, "accumulate": 0}, "accumulate=0"),
        ({"batch_size": 1, "steps": -1}, "steps_per_epoch=-1"),
        ({"batch_size": 1, "cases": []}, "no training cases"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        InfiniteBatchSampler(**{"cases": range(3), **arguments})


def test_it_can_be_sent_to_another_process() -> None:
    batches = InfiniteBatchSampler(range(7), 2, seed=3)
    assert _take(pickle.loads(pickle.dumps(batches)), 4) == _take(batches, 4)
