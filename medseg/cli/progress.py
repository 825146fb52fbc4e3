"""Progress with elapsed and remaining time: a bar in a terminal, periodic lines in a log, or JSON objects."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

from medseg.cli.console import notes, stderr, verbosity
from medseg.cli.layout import wrap
from medseg.errors import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from medseg.types import Progress as Report

__all__ = ["progress"]

_SECONDS_BETWEEN_LINES: Final = 20.0
_BAR_WIDTH: Final = 20
_LOADING: Final = "loading ..."
# Invalid requests fail before this, and importing torch takes longer.
_SECONDS_BEFORE_LOADING: Final = 0.3


@contextmanager
def progress(unit: str) -> Iterator[Report]:
    """Show the progress of the body.

    Args:
        unit: Unit of the count, in the plural; empty if it varies and the notes name it.

    Yields:
        Function that takes the amount done, the total and a note.
    """
    if verbosity.quiet:
        yield lambda *_: None
    elif stderr.is_interactive and not verbosity.as_json:
        with _display() as bar:
            try:
                yield _Bar(bar, unit)
            except BaseException:
                bar.live.transient = True  # only the error remains
                raise
    else:
        lines = _Lines(unit)
        try:
            yield lines
        finally:
            lines.loading.cancel()


class _Times:
    """Elapsed time, and remaining time at the mean speed of the current count."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._start = (self.began, 0.0)
        self._last = (-1.0, 0)
        self._end: float | None = None

    def update(self, done: float, total: int) -> None:
        """Update the amount done."""
        now = time.monotonic()
        if done < self._last[0] or total != self._last[1]:
            # A new count starts.
            self._start = (now, done)
        self._last = (done, total)
        since, first = self._start
        self._end = now + (total - done) * (now - since) / (done - first) if done > first and now > since else None

    @property
    def elapsed(self) -> float:
        """Elapsed time in seconds."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float | None:
        """Remaining time in seconds, or None while the speed is unknown."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def __str__(self) -> str:
        left = self.left
        return f"elapsed {_clock(self.elapsed)}" + ("" if left is None else f", {_clock(left)} left")


class _TimesColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Show the times of a task."""
        return Text(str(task.fields["times"]), style="progress.elapsed", no_wrap=True)


class _Display(Progress):
    """Bar with the note on a separate line, so that neither is truncated."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the lines."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text("\n".join(wrap(task.description, stderr.width)))


def _display() -> Progress:
    columns = (TaskProgressColumn(), TextColumn("{task.fields[count]}", markup=False), _TimesColumn())
    return _Display(BarColumn(_BAR_WIDTH), *columns, console=stderr, transient=True)


class _Bar:
    """Progress for terminals."""

    def __init__(self, bar: Progress, unit: str) -> None:
        self.bar = bar
        self.unit = unit
        self.times = _Times()
        self.task = bar.add_task(_LOADING, total=None, count="", times=self.times)
        bar.refresh()  # the refresh thread may be blocked by the import of torch

    def __call__(self, done: float, total: int, note: str) -> None:
        self.bar.live.transient = False
        self.times.update(done, total)
        count = f"{int(done)}/{total} {self.unit}".rstrip()
        self.bar.update(self.task, completed=done, total=total, description=visible(note), count=count)


class _Lines:
    """Progress for logs: a line shortly after the start, then one every twenty seconds."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.times = _Times()
        self.printed = time.monotonic()
        self.loading = threading.Timer(_SECONDS_BEFORE_LOADING, _print_loading)
        self.loading.daemon = True
        self.loading.start()

    def __call__(self, done: float, total: int, note: str) -> None:
        self.loading.cancel()
        self.times.update(done, total)
        if time.monotonic() - self.printed < _SECONDS_BETWEEN_LINES:
            return
        self.printed = time.monotonic()
        if verbosity.as_json:
            self._write_event(done, total, note)
        else:
            counted = ", ".join(filter(None, (self.unit, note)))
            _write(f"{done:.1f}/{total} {counted}, {self.times}")

    def _write_event(self, done: float, total: int, note: str) -> None:
        elapsed, left = round(self.times.elapsed, 1), self.times.left
        seconds = {"elapsed_seconds": elapsed, "seconds_left": left if left is None else round(left, 1)}
        notes.event("progress", done=round(done, 3), total=total, unit=self.unit, note=note, **seconds)


def _print_loading() -> None:
    if verbosity.as_json:
        notes.event("progress", note=_LOADING)
    else:
        _write(_LOADING)


def _write(line: str) -> None:
    sys.stderr.write(visible(line) + "\n")
    sys.stderr.flush()


def _clock(seconds: float) -> str:
    """Format a time as `M:SS`, or as `H:MM:SS` from one hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
