"""Running processes together through torch's elastic multiprocessing, each in its own session.

torch starts the processes and stops them with SIGTERM and, if necessary, SIGKILL, together with their data workers.
This module adds three things. After a failure the others get a short time to fail on their own, because torch would
stop them at once and records failures in whole seconds, which hides the first one. Child processes of a dead process
are killed. The signal handlers of the calling program are preserved.
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
# Signals whose handlers torch's context replaces when it starts.
_SIGNALS: Final = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_LOGGER: Final = "torch.distributed.elastic.multiprocessing"


@dataclass(frozen=True)
class Exit:
    """Exit of one process.

    Attributes:
        rank: Number of the process.
        code: Exit code, negative for a signal.
        stopped: Whether it was stopped because another process failed.
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
    """Run several Python processes until all have ended; if one fails, stop the others.

    Args:
        arguments: Command-line arguments of the interpreter for each process.
        environments: Environment variables of each process, in addition to those of this one.
        tick: Called ten times per second, and once after the last process has ended. If it raises, all are stopped.
        grace: Time in seconds that the others have to end on their own after the first failure.

    Returns:
        The exits of the processes, by rank.
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
    """Log settings without files of torch: each process writes to the log named in its arguments."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return destinations without redirection."""
        none = dict.fromkeys(envs, "")
        return LogsDest(stdouts=none, stderrs=none, error_files=none)

    @property
    def root_log_dir(self) -> str:
        """Folder of torch's own logs: none."""
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
    """Kill the remaining children of a dead process, such as its data workers."""
    if hasattr(os, "killpg"):
        for handler in context.subprocess_handlers.values():
            if handler.proc.poll():
                with suppress(OSError):
                    os.killpg(handler.proc.pid, _KILL)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Preserve the signal handlers of the calling program, so that Ctrl-C remains a `KeyboardInterrupt`."""
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
    """Silence torch's log messages about stopped processes, which the error reports."""
    torch_logger = logging.getLogger(_LOGGER)
    level = torch_logger.level
    torch_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        torch_logger.setLevel(level)
