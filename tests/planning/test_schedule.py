"""Epochs that fill a budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import RequestError
from medseg.planning.schedule import (
    Throughput,
    epoch_steps,
    fixed_schedule,
    needed_steps,
    schedule_for,
    schedule_without_limit,
    shown_time,
    steps_within,
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


PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
PACES = st.builds(
    Throughput,
    step=st.floats(0.001, 20.0),
    validation=st.just(0.0) | st.floats(0.001, 600.0),
    load=st.floats(0.0, 300.0),
    steps=st.integers(1, 2000),
)


@PROPERTY
@given(st.floats(60.0, 1e6), PACES)
def test_any_schedule_fits_its_budget_or_there_is_no_room_for_an_epoch(budget: float, pace: Throughput) -> None:
    least = pace.epoch + pace.validation + pace.load + 20
    try:
        schedule = schedule_for(budget, pace)
    except RequestError:
        assert least > 0.92 * budget - 1e-6
        return
    assert least <= schedule.seconds + 1e-6
    assert schedule.seconds <= budget
    assert 1 <= schedule.interval <= schedule.epochs
    assert 1 <= schedule.validations <= 10
    work = schedule.epochs * pace.epoch + schedule.validations * pace.validation
    assert schedule.seconds == pytest.approx(20 + pace.load + work)


@PROPERTY
@given(st.floats(60.0, 1e5), st.floats(1.0, 10.0), PACES)
def test_more_time_never_gives_fewer_epochs(budget: float, factor: float, pace: Throughput) -> None:
    try:
        fewer = schedule_for(budget, pace)
    except RequestError:
        return
    more = schedule_for(budget * factor, pace)
    # A longer budget may also validate more often; an epoch or so of each ten validations goes into that.
    assert more.epochs * pace.epoch >= fewer.epochs * pace.epoch - 10 * pace.validation - pace.epoch


@PROPERTY
@given(PACES, st.floats(0.01, 0.99))
def test_the_budget_that_a_refusal_names_is_enough(pace: Throughput, share: float) -> None:
    least = (pace.epoch + pace.validation + 20 + pace.load) / 0.92
    with pytest.raises(RequestError):
        schedule_for(share * least, pace)
    assert schedule_for(60 * math.ceil(least / 60) + 1e-3, pace).epochs >= 1


@PROPERTY
@given(st.floats(0.0, 1e6), PACES)
def test_steps_within_a_budget_leave_a_tenth_for_validation(budget: float, pace: Throughput) -> None:
    steps = steps_within(budget, pace)
    assert steps >= 0
    assert steps / pace.steps * pace.epoch <= 0.9 * max(0.92 * budget - 20 - pace.load, 0) + 1e-6
    assert steps_within(2 * budget, pace) >= steps


@pytest.mark.parametrize(("epochs", "interval"), [(1, 1), (9, 1), (10, 1), (11, 2), (95, 10), (1000, 100)])
def test_there_are_at_most_ten_validations_and_one_of_the_last_epoch(epochs: int, interval: int) -> None:
    schedule = fixed_schedule(epochs, None, None)
    assert schedule.interval == interval
    assert schedule.validations == math.ceil(epochs / interval) <= 10


def test_a_given_interval_is_kept_and_its_validations_are_counted() -> None:
    pace = Throughput(step=0.5, validation=7.0, load=3.0, steps=10)
    schedule = fixed_schedule(9, 4, pace)
    assert (schedule.epochs, schedule.interval, schedule.validations) == (9, 4, 3)
    assert schedule.seconds == pytest.approx(20 + 3 + 9 * (10 * 0.5 + 0.2) + 3 * 7)


def test_without_a_budget_the_time_is_forecast_where_it_was_measured() -> None:
    pace = Throughput(step=0.1, validation=1.0, load=0.0, steps=100)
    schedule = schedule_without_limit(100, pace)
    assert schedule.epochs == 60
    assert schedule.seconds == pytest.approx(20 + 60 * (10 + 0.2) + schedule.validations)


@pytest.mark.parametrize(
    ("cases", "batch", "own", "steps"),
    [
        (50, 2, None, 25),
        (48, 2, None, 50),
        (1, 2, None, 50),
        (101, 4, None, 26),
        (1000, 4, None, 250),
        (1000, 4, 7, 7),
        (1000, 4, 0, 250),
        (1000, 4, "7", 250),
    ],
)
def test_an_epoch_is_one_pass_unless_that_is_too_short(cases: int, batch: int, own: Any, steps: int) -> None:
    assert epoch_steps(cases, batch, own) == steps
