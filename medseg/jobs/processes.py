"""Run processes together through torch's elastic multiprocessing: one session each, stopped together, none forgotten.

torch starts the processes, and stops them with SIGTERM and, if need be, SIGKILL, each with the workers of its loader.
Three things it leaves open are added here: after a failure the others get a moment to end by themselves, since torch
stops them at once and dates failures in whole seconds, so that the first could not be told from those that followed;
what a dead process leaves behind is ended; and the signal handlers of the calling program stay its own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException, SubprocessContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["Exit", "run_together"]

_POLL: Final = 0.1
_STOP: Final = 10
_KILL: Final = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has none
# The signals that torch's context takes over when it starts.
_SIGNALS: Final = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_LOGGER: Final = "torch.distributed.elastic.multiprocessing"


@dataclass(frozen=True)
class Exit:
    """How one process ended.

    Attributes:
        rank: Number of the process.
        code: Exit code; negative for a signal.
        stopped: Whether it was stopped because of another one.
    """

    rank: int
    code: int
    stopped: bool


def run_together(
    arguments: Sequence[tuple[str, ...]],
    environments: Sequence[Mapping[str, str]],
    *,
    tick: Callable[[], None],
    grace: float,
) -> list[Exit]:
    """Run this Python several times until all processes have ended; if one fails, stop the others.

    Args:
        arguments: Command line of each process, after the name of the interpreter.
        environments: Environment variables of each process, added to those of this one.
        tick: Called ten times a second, and once after the last process has ended. If it raises, all are stopped.
        grace: Seconds that the others have to end by themselves after the first failure.

    Returns:
        How each process ended, by rank.
    """
    context = SubprocessContext(
        name="train",
        entrypoint=sys.executable,
        args=dict(enumerate(arguments)),
        envs={rank: dict(environment) for rank, environment in enumerate(environments)},
        logs_specs=_InheritedStreams(),
    )
    with _quiet_torch():
        try:
            with _own_signal_handlers():
                context.start()
            _follow(context, tick, grace)
            running = {rank for rank, handler in context.subprocess_handlers.items() if handler.proc.poll() is None}
        finally:
            context.close(timeout=_STOP)
            _sweep(context)
    codes = {rank: handler.proc.poll() for rank, handler in context.subprocess_handlers.items()}
    return [Exit(rank, -_KILL if code is None else code, rank in running) for rank, code in codes.items()]


class _InheritedStreams(LogsSpecs):
    """No files of torch's: each process writes into the log that its command line names."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return that no stream is redirected."""
        none = dict.fromkeys(envs, "")
        return LogsDest(stdouts=none, stderrs=none, error_files=none)

    @property
    def root_log_dir(self) -> str:
        """The folder of torch's own logs: none."""
        return os.devnull


def _follow(context: SubprocessContext, tick: Callable[[], None], grace: float) -> None:
    failed_at: float | None = None
    while True:
        codes = [handler.proc.poll() for handler in context.subprocess_handlers.values()]
        tick()
        if None not in codes:
            return
        if any(codes) and failed_at is None:
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > grace:
            return
        time.sleep(_POLL)


def _sweep(context: SubprocessContext) -> None:
    """End what a process that died has left behind, such as the workers of its loader."""
    if hasattr(os, "killpg"):
        for handler in context.subprocess_handlers.values():
            if handler.proc.poll():
                with suppress(OSError):
                    os.killpg(handler.proc.pid, _KILL)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the handlers of the calling program, so that Ctrl-C stays a `KeyboardInterrupt`."""
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    kept = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}
    try:
        yield
    except SignalException as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep torch from telling on the terminal that it stops processes: the error says so."""
    torch_logger = logging.getLogger(_LOGGER)
    level = torch_logger.level
    torch_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        torch_logger.setLevel(level)
