"""How the commands talk to people: results on standard output, messages on standard error.

With `--log-format json` every message is one JSON object on a line of its own.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from medseg.errors import MedsegError, visible
from medseg.files import replace_text

__all__ = [
    "Messages",
    "PlainConsole",
    "Verbosity",
    "alerts",
    "errors",
    "notes",
    "output",
    "print_error",
    "reserve_stdout",
    "reset",
    "stderr",
    "verbosity",
    "write_json",
]

_STDOUT: Final = "-"


@dataclass
class Verbosity:
    """What the global options choose.

    Attributes:
        quiet: Errors and results only.
        verbose: Every skipped file, and the debug log of medseg.
        as_json: Messages and progress as JSON objects.
    """

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False


verbosity = Verbosity()


class PlainConsole(Console):
    """A console that prints names and messages from files as they are: no markup unless asked for, no controls."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "soft_wrap": True, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a text into what is printed."""
        return super().render_str(visible(text), **options)


output = PlainConsole()
stderr = PlainConsole(stderr=True)


class Messages:
    """Messages of one level on standard error.

    Args:
        level: Name of a logging level in lower case; errors are printed even with `--quiet`.
    """

    def __init__(self, level: str) -> None:
        self.level = level

    def print(self, text: str, *, markup: bool = False, **options: Any) -> None:
        """Print a message, or write it as a JSON object."""
        if verbosity.quiet and self.level != "error":
            return
        if verbosity.as_json:
            plain = Text.from_markup(text).plain if markup else text
            self.event("message", message=plain.removeprefix("warning: "))
        else:
            stderr.print(text, markup=markup, **options)

    def event(self, kind: str, **content: Any) -> None:
        """Write a JSON object on a line of its own."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        sys.stderr.write(json.dumps({"time": now, "level": self.level, "event": kind, **content}) + "\n")
        sys.stderr.flush()


errors = Messages("error")
notes = Messages("info")
alerts = Messages("warning")


def print_error(error: MedsegError) -> None:
    """Print an error of ours that ends the command."""
    if verbosity.as_json:
        errors.event("error", **error.to_json())
    else:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", markup=True)


def reset() -> None:
    """Start a command line afresh: the options of an earlier one in this process no longer count.

    A stream that cannot encode a character of a name, such as a pipe on Windows, prints a replacement.
    """
    verbosity.quiet = verbosity.verbose = verbosity.as_json = output.quiet = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def reserve_stdout(target: str | None) -> None:
    """Keep standard output for JSON where that is its target."""
    output.quiet = target == _STDOUT


def write_json(content: Any, target: str | None) -> None:
    """Write a result as JSON.

    Args:
        content: JSON values without NaN or Inf; paths become texts.
        target: Path of a file, "-" for standard output, None for nowhere.

    Raises:
        OutputError: The file cannot be written.
    """
    if target is None:
        return
    # In a terminal even hidden characters of file names are shown: ASCII alone
    text = json.dumps(content, indent=2, ensure_ascii=target == _STDOUT, allow_nan=False, default=str) + "\n"
    if target == _STDOUT:
        sys.stdout.write(text)
    else:
        replace_text(Path(target), text)
