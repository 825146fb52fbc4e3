"""Epochs, validations and what they take. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from medseg.errors import RequestError

__all__ = [
    "Schedule",
    "Throughput",
    "epoch_steps",
    "fixed_schedule",
    "needed_steps",
    "schedule_for",
    "schedule_without_limit",
    "shown_time",
    "steps_within",
]

# Of the time that was given; the rest is for what a probe of a minute does not see.
_USED = 0.92
_START_SECONDS = 20.0
_CHECKPOINT_SECONDS = 0.2
_VALIDATION_SHARE = 0.1
_VALIDATIONS = 10
_STEPS = 6000
_EPOCHS = (40, 1000)
_NEEDED_EPOCHS = 20
_NEEDED_STEPS = (1500, 5000)
# Shorter epochs spend their time on what is done once an epoch.
_FEWEST_STEPS = 25
_STEPS_OF_FEW = 50


@dataclass(frozen=True)
class Throughput:
    """How long things take, in seconds.

    Attributes:
        step: one training step with its data.
        validation: one validation.
        load: to prepare all cases once.
        steps: training steps of an epoch.
    """

    step: float
    validation: float
    load: float
    steps: int

    @property
    def epoch(self) -> float:
        """One epoch without validation."""
        return self.steps * self.step + _CHECKPOINT_SECONDS


@dataclass(frozen=True)
class Schedule:
    """How long to train.

    Attributes:
        epochs: passes over the training cases.
        interval: epochs between two validations.
        seconds: what all of it takes; 0 where nothing was measured.
        reason: why these epochs.
    """

    epochs: int
    interval: int
    seconds: float
    reason: str

    @property
    def validations(self) -> int:
        """How many there are, that of the last epoch among them."""
        return math.ceil(self.epochs / self.interval)


def needed_steps(steps_per_epoch: int) -> int:
    """Return the training steps without which a wider network or a larger patch is of no use."""
    return min(max(_NEEDED_EPOCHS * steps_per_epoch, _NEEDED_STEPS[0]), _NEEDED_STEPS[1])


def steps_within(budget: float, pace: Throughput) -> float:
    """Return how many training steps a budget holds beside loading and validation."""
    room = budget * _USED - _START_SECONDS - pace.load
    return max(room, 0.0) * (1 - _VALIDATION_SHARE) / pace.epoch * pace.steps


def schedule_for(budget: float, pace: Throughput) -> Schedule:
    """Return the schedule that fills a budget.

    Raises:
        RequestError: not even one epoch and its validation fit.
    """
    room = budget * _USED - _START_SECONDS - pace.load
    least = pace.epoch + pace.validation
    if room < least:
        needed = (least + _START_SECONDS + pace.load) / _USED
        raise RequestError(
            f"A budget of {shown_time(budget)} does not hold one epoch and its validation, even of the smallest plan: "
            f"give at least {shown_time(60 * math.ceil(needed / 60))}, or fewer cases."
        )
    wanted = max(2, min(_VALIDATIONS, int(room * _VALIDATION_SHARE / pace.validation))) if pace.validation else 1
    wanted = min(wanted, int((room - pace.epoch) / pace.validation)) if pace.validation else wanted
    epochs = max(1, int((room - wanted * pace.validation) / pace.epoch))
    interval = _interval(epochs, max(wanted, 1))
    schedule = Schedule(epochs, interval, 0.0, "")
    return Schedule(
        epochs,
        interval,
        _total(schedule, pace),
        f"{epochs} epochs of {pace.steps} steps take about {shown_time(_total(schedule, pace))} of the "
        f"{shown_time(budget)} given: {pace.step:.2g} s a step and {shown_time(pace.validation)} a validation here",
    )


def schedule_without_limit(steps_per_epoch: int, pace: Throughput | None) -> Schedule:
    """Return a schedule for which no time was given."""
    epochs = min(max(math.ceil(_STEPS / steps_per_epoch), _EPOCHS[0]), _EPOCHS[1])
    interval = _interval(epochs, _VALIDATIONS)
    schedule = Schedule(epochs, interval, 0.0, "")
    reason = (
        f"no --budget was given: about {_STEPS:,} training steps, in {_EPOCHS[0]} to {_EPOCHS[1]} epochs of "
        f"{steps_per_epoch}"
    )
    return Schedule(epochs, interval, _total(schedule, pace) if pace else 0.0, reason)


def fixed_schedule(epochs: int, interval: int | None, pace: Throughput | None) -> Schedule:
    """Return the schedule of a number of epochs that the user set."""
    schedule = Schedule(epochs, interval or _interval(epochs, _VALIDATIONS), 0.0, "set by the user")
    return Schedule(epochs, schedule.interval, _total(schedule, pace) if pace else 0.0, schedule.reason)


def _total(schedule: Schedule, pace: Throughput) -> float:
    work = schedule.epochs * pace.epoch + schedule.validations * pace.validation
    return _START_SECONDS + pace.load + work


def _interval(epochs: int, wanted: int) -> int:
    """Return the epochs between validations, of which the last epoch has one too."""
    return math.ceil(epochs / wanted)


def shown_time(seconds: float) -> str:
    """Return a time for people: "45 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def epoch_steps(cases: int, batch_size: int, given: Any = None) -> int:
    """Return the training steps of an epoch: one pass over the cases, or 50 where that would be below 25.

    Args:
        cases: for training.
        batch_size: cases per step.
        given: what the user set; 0 and None leave it to the rule.
    """
    if isinstance(given, int) and given > 0:
        return given
    steps = -(-cases // batch_size)
    return steps if steps >= _FEWEST_STEPS else _STEPS_OF_FEW
