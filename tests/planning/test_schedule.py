"""Epochs that fill a budget."""

from __future__ import annotations

import pytest

from medseg.errors import RequestError
from medseg.planning.schedule import (
    Throughput,
    fixed_schedule,
    needed_steps,
    schedule_for,
    schedule_without_limit,
    shown_time,
)


@pytest.mark.parametrize("budget", [300.0, 1800.0, 7200.0, 86400.0])
@pytest.mark.parametrize("step", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("validation", [0.5, 12.0, 60.0])
@pytest.mark.parametrize("steps", [1, 80, 300])
def test_a_schedule_stays_within_its_budget_and_uses_it(
    budget: float, step: float, validation: float, steps: int
) -> None:
    pace = Throughput(step=step, validation=validation, load=5.0, steps=steps)
    if pace.epoch + validation + 25 > 0.9 * budget:
        pytest.skip("one epoch does not fit")
    schedule = schedule_for(budget, pace)
    assert schedule.seconds <= budget
    assert 1 <= schedule.validations <= 10
    if schedule.epochs > 20:
        assert schedule.seconds > 0.85 * budget


def test_a_budget_without_room_for_one_epoch_is_refused_with_what_it_takes() -> None:
    with pytest.raises(RequestError, match=r"60 s is not enough for one epoch .* at least \d+ (min|s)"):
        schedule_for(60.0, Throughput(1.0, 30.0, 5.0, 100))


def test_without_a_budget_the_steps_are_given() -> None:
    assert schedule_without_limit(80, None).epochs == 75
    assert schedule_without_limit(1, None).epochs == 1000
    assert schedule_without_limit(5000, None).epochs == 40
    assert schedule_without_limit(80, None).seconds == 0


def test_a_user_sets_epochs() -> None:
    schedule = fixed_schedule(7, None, None)
    assert (schedule.epochs, schedule.interval) == (7, 1)


def test_needed_steps_are_bounded() -> None:
    assert needed_steps(1) == 1500
    assert needed_steps(80) == 1600
    assert needed_steps(1000) == 5000


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.25 s"), (45, "45 s"), (1800, "30 min"), (7200 * 2, "4.0 h")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert shown_time(seconds) == text
