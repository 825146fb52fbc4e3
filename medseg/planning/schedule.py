"""Number of epochs and validations, and the time they take. No torch."""

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

# Fraction of the budget that is planned; the rest is reserve for what a short probe does not see.
_USED = 0.92
_START_SECONDS = 20.0
_CHECKPOINT_SECONDS = 0.2
_VALIDATION_SHARE = 0.1
_VALIDATIONS = 10
_STEPS = 6000
_EPOCHS = (40, 1000)
_NEEDED_EPOCHS = 20
_NEEDED_STEPS = (1500, 5000)
# Shorter epochs would spend much of their time on checkpoints and other work between epochs.
_FEWEST_STEPS = 25
_STEPS_OF_FEW = 50


@dataclass(frozen=True)
class Throughput:
    """Times of the parts of a training, in seconds.

    Attributes:
        step: Time of a training step with its data.
        validation: Time of a validation.
        load: Time to load and prepare all cases once.
        steps: Number of training steps per epoch.
    """

    step: float
    validation: float
    load: float
    steps: int

    @property
    def epoch(self) -> float:
        """Time of an epoch without validation."""
        return self.steps * self.step + _CHECKPOINT_SECONDS


@dataclass(frozen=True)
class Schedule:
    """Length of a training.

    Attributes:
        epochs: Number of epochs.
        interval: Number of epochs between two validations.
        seconds: Estimated time of the training in seconds; 0 where nothing was measured.
        reason: Reason of the number of epochs.
    """

    epochs: int
    interval: int
    seconds: float
    reason: str

    @property
    def validations(self) -> int:
        """Number of validations, with the one after the last epoch."""
        return math.ceil(self.epochs / self.interval)


def needed_steps(steps_per_epoch: int) -> int:
    """Return the number of training steps below which a wider network or a larger patch does not pay off."""
    return min(max(_NEEDED_EPOCHS * steps_per_epoch, _NEEDED_STEPS[0]), _NEEDED_STEPS[1])


def steps_within(budget: float, pace: Throughput) -> float:
    """Return the number of training steps in a budget in seconds, after loading and validation."""
    room = budget * _USED - _START_SECONDS - pace.load
    return max(room, 0.0) * (1 - _VALIDATION_SHARE) / pace.epoch * pace.steps


def schedule_for(budget: float, pace: Throughput) -> Schedule:
    """Return the longest schedule within a budget in seconds.

    Raises:
        RequestError: A budget too short for one epoch and its validation.
    """
    room = budget * _USED - _START_SECONDS - pace.load
    least = pace.epoch + pace.validation
    if room < least:
        needed = (least + _START_SECONDS + pace.load) / _USED
        raise RequestError(
            f"Budget too short: {shown_time(budget)} is not enough for one epoch and its validation, even with the "
            f"smallest network. Set --budget to at least {shown_time(60 * math.ceil(needed / 60))}, or use fewer cases."
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
    """Return the schedule without a budget."""
    epochs = min(max(math.ceil(_STEPS / steps_per_epoch), _EPOCHS[0]), _EPOCHS[1])
    interval = _interval(epochs, _VALIDATIONS)
    schedule = Schedule(epochs, interval, 0.0, "")
    reason = (
        f"about {_STEPS:,} training steps, at {steps_per_epoch} per epoch and within {_EPOCHS[0]} to {_EPOCHS[1]} "
        "epochs, because no --budget is set"
    )
    return Schedule(epochs, interval, _total(schedule, pace) if pace else 0.0, reason)


def fixed_schedule(epochs: int, interval: int | None, pace: Throughput | None) -> Schedule:
    """Return the schedule for a number of epochs that the user set."""
    schedule = Schedule(epochs, interval or _interval(epochs, _VALIDATIONS), 0.0, "set by the user")
    return Schedule(epochs, schedule.interval, _total(schedule, pace) if pace else 0.0, schedule.reason)


def _total(schedule: Schedule, pace: Throughput) -> float:
    work = schedule.epochs * pace.epoch + schedule.validations * pace.validation
    return _START_SECONDS + pace.load + work


def _interval(epochs: int, wanted: int) -> int:
    """Return the number of epochs between validations; the last epoch is validated too."""
    return math.ceil(epochs / wanted)


def shown_time(seconds: float) -> str:
    """Format a time in seconds, as in "45 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def epoch_steps(cases: int, batch_size: int, given: Any = None) -> int:
    """Return the number of training steps per epoch: one pass over the cases, or 50 if a pass has fewer than 25.

    Args:
        cases: Number of training cases.
        batch_size: Number of cases per step.
        given: Number of steps that the user set; None or 0 for the rule above.
    """
    if isinstance(given, int) and given > 0:
        return given
    steps = -(-cases // batch_size)
    return steps if steps >= _FEWEST_STEPS else _STEPS_OF_FEW
