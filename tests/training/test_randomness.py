"""Random numbers that depend on what they are for, and generators that are put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from medseg.inferers.blend import one_thread
from medseg.training.randomness import (
    generator_states,
    isolated_seed,
    random_state,
    restore_generators,
    seed_everything,
    seed_from,
)


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_seed_depends_on_every_number_and_on_their_order() -> None:
    seeds = [seed_from(1, 2, 3), seed_from(1, 3, 2), seed_from(2, 2, 3), seed_from(1, 2, 4), seed_from(-1, 2, 3)]
    assert len(set(seeds)) == len(seeds)
    assert seed_from(1, 2, 3) == seeds[0]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_numbers_are_the_same_in_every_version() -> None:
    # NumPy promises these for its legacy generator
    assert random_state(1, 2).permutation(8).tolist() == [4, 6, 7, 3, 5, 0, 2, 1]
    assert seed_from(1, 2, 3) == 3822189696
    assert random_state(1, 2).permutation(100).tolist() != random_state(1, 3).permutation(100).tolist()


def test_what_is_drawn_inside_is_seeded_and_what_is_drawn_outside_does_not_notice() -> None:
    seed_everything(5)
    _draw()
    after = _draw()
    seed_everything(5)
    _draw()
    with isolated_seed(9):
        first = _draw()
    assert _draw() == after
    with isolated_seed(9):
        assert _draw() == first


def test_generators_are_put_back_even_after_an_error() -> None:
    seed_everything(5)
    expected = _draw()
    seed_everything(5)

    def fail() -> None:
        with isolated_seed(1):
            _draw()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _draw() == expected


def test_states_survive_a_file(tmp_path: Any) -> None:
    seed_everything(3)
    random.gauss(0, 1)
    np.random.randn()  # leaves a number in store
    torch.save(generator_states(), tmp_path / "states.pt")
    expected = [*_draw(), random.gauss(0, 1), float(np.random.randn())]
    seed_everything(4)
    restore_generators(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [*_draw(), random.gauss(0, 1), float(np.random.randn())] == expected


def test_one_thread_is_for_a_while() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
