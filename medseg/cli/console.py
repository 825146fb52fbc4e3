"""Output of the commands: results on standard output, messages on standard error.

With `--log-format json`, each message is a JSON object on a separate line.
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
    """Values of the global options.

    Attributes:
        quiet: Whether only errors and results are printed.
        verbose: Whether every skipped file and medseg's debug log are printed.
        as_json: Whether messages and progress are JSON objects.
    """

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False


verbosity = Verbosity()


class PlainConsole(Console):
    """Console that prints file names and messages literally: without markup by default, with controls escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "soft_wrap": True, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text to print, with control characters escaped."""
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
        """Write a JSON object on a separate line."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        sys.stderr.write(json.dumps({"time": now, "level": self.level, "event": kind, **content}) + "\n")
        sys.stderr.flush()


errors = Messages("error")
notes = Messages("info")
alerts = Messages("warning")


def print_error(error: MedsegError) -> None:
    """Print the medseg error that ends a command."""
    if verbosity.as_json:
        errors.event("error", **error.to_json())
    else:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", markup=True)


def reset() -> None:
    """Reset the global options, which an earlier command in this process may have set.

    Characters that a stream cannot encode, such as a pipe on Windows, are replaced.
    """
    verbosity.quiet = verbosity.verbose = verbosity.as_json = output.quiet = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def reserve_stdout(target: str | None) -> None:
    """Reserve standard output for JSON if that is the target."""
    output.quiet = target == _STDOUT


def write_json(content: Any, target: str | None) -> None:
    """Write a result as JSON.

    Args:
        content: JSON values without NaN or Inf; paths become strings.
        target: Path of a file, "-" for standard output, or None to write nothing.

    Raises:
        OutputError: The file cannot be written.
    """
    if target is None:
        return
    # Invisible characters of file names are escaped in a terminal.
    text = json.dumps(content, indent=2, ensure_ascii=target == _STDOUT, allow_nan=False, default=str) + "\n"
    if target == _STDOUT:
        sys.stdout.write(text)
    else:
        replace_text(Path(target), text)
