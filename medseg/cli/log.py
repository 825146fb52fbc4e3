"""Logging of the commands: warnings of medseg once per kind at the end, nothing of other packages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from medseg.cli.console import Messages, alerts
from medseg.notices import CaseWarning, summarize

__all__ = ["let_everyone_log", "show_debug_log", "warnings_at_the_end"]

_OURS: Final = "medseg"


@contextmanager
def warnings_at_the_end() -> Iterator[None]:
    """Collect the warnings of medseg's loggers, and print them when the command ends, even with an error."""
    gathered = _Gathered()
    logger = logging.getLogger(_OURS)
    logger.addHandler(gathered)
    level = logger.level
    try:
        with _without_libraries():
            yield
    finally:
        logger.removeHandler(gathered)
        logger.removeHandler(_debug_log)
        logger.setLevel(level)
        for line in summarize(gathered.warnings):
            alerts.print(f"warning: {line}")


def show_debug_log() -> None:
    """Print the records of medseg's loggers below warnings until the command ends."""
    logger = logging.getLogger(_OURS)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(_debug_log)


def let_everyone_log() -> None:
    """Stop collecting records, since a server configures its own logging for the rest of the command."""
    _QuietLogger.quiet = False
    logger = logging.getLogger(_OURS)
    for handler in list(logger.handlers):
        if isinstance(handler, _Gathered):
            logger.removeHandler(handler)


class _DebugLog(logging.Handler):
    """Prints records below warnings, which are printed at the end of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            Messages(record.levelname.lower()).print(f"{record.name}: {record.getMessage()}", style="dim")


_debug_log = _DebugLog()


class _Gathered(logging.Handler):
    """Collects warnings with the names of their cases."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[tuple[str, CaseWarning]] = []

    def emit(self, record: logging.LogRecord) -> None:
        warning = getattr(record, "case_warning", None) or CaseWarning("other", record.getMessage())
        self.warnings.append((getattr(record, "case", ""), warning))


class _QuietLogger(logging.Logger):
    """Logger that drops records of other packages while a command runs, even for handlers of these packages."""

    quiet = False

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802  (a method of logging.Logger)
        if not self.quiet or self.name.partition(".")[0] == _OURS:
            super().callHandlers(record)


@contextmanager
def _without_libraries() -> Iterator[None]:
    """Hide logs and Python warnings of other packages; medseg reports relevant problems itself."""
    usual, no_handler = logging.getLoggerClass(), logging.NullHandler()
    # Existing loggers are changed here; most packages are imported later and use the new logger class.
    for logger in logging.root.manager.loggerDict.values():
        if type(logger) is logging.Logger:
            logger.__class__ = _QuietLogger
    logging.setLoggerClass(_QuietLogger)
    # Without a handler, Python would print records that reach the root logger.
    logging.root.addHandler(no_handler)
    _QuietLogger.quiet = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _QuietLogger.quiet = False
        logging.root.removeHandler(no_handler)
        logging.setLoggerClass(usual)
