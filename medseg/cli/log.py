"""What a command's loggers print: the warnings of medseg at its end, each kind once; nothing of other packages."""

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
    """Gather the warnings of medseg's loggers, and print them when the command ends, however it ends."""
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
    """Print, until the command ends, what medseg's loggers write below warnings."""
    logger = logging.getLogger(_OURS)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(_debug_log)


def let_everyone_log() -> None:
    """Leave all records to the log of a server, which begins here, for the rest of the command."""
    _QuietLogger.quiet = False
    logger = logging.getLogger(_OURS)
    for handler in list(logger.handlers):
        if isinstance(handler, _Gathered):
            logger.removeHandler(handler)


class _DebugLog(logging.Handler):
    """Prints records; warnings come at the end of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            Messages(record.levelname.lower()).print(f"{record.name}: {record.getMessage()}", style="dim")


_debug_log = _DebugLog()


class _Gathered(logging.Handler):
    """Keeps warnings, with the names of their cases."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[tuple[str, CaseWarning]] = []

    def emit(self, record: logging.LogRecord) -> None:
        warning = getattr(record, "case_warning", None) or CaseWarning("other", record.getMessage())
        self.warnings.append((getattr(record, "case", ""), warning))


class _QuietLogger(logging.Logger):
    """A logger that prints nothing while a command runs, unless it is ours; libraries bring handlers of their own."""

    quiet = False

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802  (a method of logging.Logger)
        if not self.quiet or self.name.partition(".")[0] == _OURS:
            super().callHandlers(record)


@contextmanager
def _without_libraries() -> Iterator[None]:
    """Keep what other packages log and warn of out of the terminal; our errors and warnings say what matters."""
    usual, no_handler = logging.getLoggerClass(), logging.NullHandler()
    # Loggers are made whenever a package is imported, which for most comes later.
    for logger in logging.root.manager.loggerDict.values():
        if type(logger) is logging.Logger:
            logger.__class__ = _QuietLogger
    logging.setLoggerClass(_QuietLogger)
    # Without any handler Python would print what reaches the root.
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
