"""What the commands share in talking to people: consoles, progress with time left, common options."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from medseg.errors import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.text import Text

__all__ = [
    "BundleName",
    "Device",
    "PlainConsole",
    "Settings",
    "Strict",
    "Trust",
    "errors",
    "output",
    "progress",
    "with_options",
]


class PlainConsole(Console):
    """A console on which names and messages from files stay what they are: no markup unless asked for, no controls."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a text into what is printed."""
        return super().render_str(visible(text), **options)


output = PlainConsole()
errors = PlainConsole(stderr=True)

BundleName = Annotated[str, typer.Argument(help="A bundle folder, or the name of a shipped bundle.", metavar="BUNDLE")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a knob of the bundle: name=value, JSON or text. Repeatable."),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Trust = Annotated[
    str | None,
    typer.Option(metavar="SHA256", help="Run a bundle that is not declarative, if it has this fingerprint."),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Treat warnings as errors: a case with one fails, and nothing is written for it."),
]

_SECONDS_BETWEEN_LINES = 20.0


def with_options(settings: list[str] | None, **knobs: str | float | None) -> list[str]:
    """Return the settings with the knobs among them that have options of their own, as far as those were given."""
    return [
        *(settings or []),
        *(f"{name}={json.dumps(value)}" for name, value in knobs.items() if value not in (None, "")),
    ]


@contextmanager
def progress(unit: str) -> Iterator[Callable[[float, int, str], None]]:
    """Show a bar with the time left in a terminal, or a line now and then in a log.

    Args:
        unit: what is counted, in the plural; "" where the notes say it, since it changes on the way.
    """
    if errors.is_terminal:
        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=errors,
        ) as bar:
            task = bar.add_task("starting", total=None, count="")

            def show(done: float, total: int, note: str) -> None:
                bar.update(
                    task,
                    completed=done,
                    total=total,
                    description=visible(note),
                    count=f"{int(done)}/{total} {unit}".rstrip(),
                )

            yield show
    else:
        yield _Lines(unit)


class _Lines:
    """Progress for logs: one line every twenty seconds."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.start = (time.monotonic(), 0.0)
        self.last = (-1.0, 0)
        self.printed = time.monotonic()

    def __call__(self, done: float, total: int, note: str) -> None:
        now = time.monotonic()
        if done < self.last[0] or total != self.last[1]:
            # Something else is counted now, or for the first time
            self.start = (now, done)
        self.last = (done, total)
        if now - self.printed < _SECONDS_BETWEEN_LINES:
            return
        self.printed = now
        since, first = self.start
        speed = (done - first) / (now - since) if now > since else 0.0
        left = f", about {(total - done) / speed / 60:.1f} min left" if speed else ""
        counted = ", ".join(filter(None, (self.unit, note)))
        sys.stderr.write(f"{done:.1f}/{total} {visible(counted)}{left}\n")
        sys.stderr.flush()
