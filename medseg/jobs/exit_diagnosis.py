"""Diagnosis of a training process that died: signals, memory and exceptions, the case at work, and advice.

Only the standard library is imported.
"""

from __future__ import annotations

import json
import re
import signal
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from medseg.errors import MedsegError, error_from_json, links, own_error

__all__ = ["Note", "case_of", "describe_exit", "explain", "memory_kills", "note_of"]

_LESS_MEMORY: Final = (
    "use less memory: --set cache_memory=0, a smaller batch_size, patch_size or num_workers, or fewer --devices; on a "
    "cluster, request more memory"
)
_SIGNALS: Final[Mapping[str, tuple[str, str]]] = {
    "SIGKILL": ("sent by the system when memory runs out, or by a user or job scheduler", _LESS_MEMORY),
    "SIGTERM": ("a request to stop, as job schedulers send at a time limit", "request more time, or continue later"),
    "SIGINT": ("a request to stop, as by Ctrl-C", "continue later"),
    "SIGXCPU": ("because its limit of CPU time was reached", "request more time, or continue later"),
    "SIGBUS": (
        "because shared memory, or the disk of a memory-mapped file, is full",
        "--set num_workers=0, or more shared memory (docker run --shm-size=4g)",
    ),
    "SIGSEGV": (
        "a crash inside a library",
        "try --devices 1 and --set num_workers=0; if it persists, reinstall torch and MONAI in the tested versions",
    ),
    "SIGABRT": ("because a library aborted; its message is in the log", "check the log"),
    "SIGILL": (
        "because a library uses an instruction that this processor lacks",
        "install packages built for this processor",
    ),
    "SIGFPE": ("a division by zero inside a library", "check the log; try --set precision=float32"),
}
# (pattern in the text of an exception, advice). The first match counts.
_ADVICE: Final[tuple[tuple[str, str], ...]] = (
    (
        r"CUDA out of memory|OutOfMemoryError",
        "use less device memory: a smaller batch_size or patch_size, or --set precision=bfloat16",
    ),
    (r"MemoryError|[Cc]an't allocate memory|Cannot allocate memory|bad_alloc|Unable to allocate", _LESS_MEMORY),
    (r"No space left on device", "free disk space, or write to another disk with --output"),
    (r"Too many open files", "raise the limit (ulimit -n 4096), or --set num_workers=0"),
    (r"EADDRINUSE|[Aa]ddress already in use", "start it again: another program has taken the port"),
    (r"unable to open shared memory|insufficient shared memory", _SIGNALS["SIGBUS"][1]),
    (r"NCCL|ncclSystemError", "set NCCL_DEBUG=INFO and check the log; --device cpu trains without NCCL"),
)
# Errors of the other processes after one has died.
_CONNECTION: Final = re.compile(
    r"[Cc]onnection (?:closed|reset|refused)|gloo[/\\]transport|Broken pipe|DistBackendError|DistNetworkError|"
    r"Socket Timeout|ncclRemoteError|recvValue failed|remote process exited"
)
# The module in which MONAI instantiates the components of a config, including the one that runs the training.
_INSTANTIATES: Final = "monai.utils.module"
_SHOWN: Final = 400
_MEMORY_EVENTS: Final = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


@dataclass(frozen=True)
class Note:
    """Record of an exception in a training process, for the message to the user.

    Attributes:
        time: Time of the exception, in seconds since the epoch.
        kind: Name of its class.
        message: Its message, shortened.
        place: File and line where it was raised.
        case: Name of the case being processed; empty if unknown.
        own: The error as JSON values if it is a `MedsegError`; None for any other.
        connection: Whether it only reports the loss of another process.
    """

    time: float
    kind: str
    message: str
    place: str
    case: str
    own: dict[str, Any] | None
    connection: bool

    @property
    def exit_code(self) -> int:
        """Exit code of the command line for a `MedsegError`; 0 for any other exception."""
        return error_from_json(self.own).exit_code if self.own else 0

    def write(self, path: Path) -> None:
        """Write the record to a JSON file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Note | None:
        """Read a record; None if there is none, or an incomplete one."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def advice(self) -> str:
        """Advice for the user; empty if the exception suggests none."""
        text = f"{self.kind}: {self.message}"
        return next((advice for pattern, advice in _ADVICE if re.search(pattern, text, re.DOTALL)), "")

    def error(self) -> MedsegError:
        """Return the original `MedsegError`, without the exceptions that wrapped it."""
        return error_from_json(self.own) if self.own else MedsegError(self.message)


def note_of(error: BaseException) -> Note:
    """Return the record of an exception."""
    own = own_error(error)
    shown = own or _unwrapped(error)
    message = str(shown).strip()
    frames = traceback.extract_tb(shown.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return Note(
        time=time.time(),
        kind=type(shown).__name__,
        message=message if own else message[:_SHOWN],
        place=place,
        case=case_of(error),
        own=own.to_json() if own else None,
        connection=own is None and bool(_CONNECTION.search(f"{type(shown).__name__}: {shown}")),
    )


def _unwrapped(error: BaseException) -> BaseException:
    """Return the cause of an error that MONAI wraps when a component of a config fails."""
    while error.__cause__ is not None and _module_of(error) == _INSTANTIATES:
        error = error.__cause__
    return error


def _module_of(error: BaseException) -> str:
    """Return the name of the module that raised an error; empty if it was not raised."""
    *_, frame = (None, *(frame for frame, _ in traceback.walk_tb(error.__traceback__)))
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def case_of(error: BaseException) -> str:
    """Return the name of the case being processed when an exception was raised; empty if unknown.

    The case is that of the innermost function with a mapping of `name` and `image` among its local variables.
    """
    for link in reversed(list(links(error))):
        found = ""
        trace = link.__traceback__
        while trace is not None:
            found = next(_names(trace.tb_frame.f_locals), "") or found
            trace = trace.tb_next
        if found:
            return found
    return ""


def explain(error: BaseException, log: Path | None = None) -> MedsegError:
    """Return the `MedsegError` for an exception that ended a training in this process.

    Args:
        error: Any exception.
        log: Log file with its full traceback.
    """
    note = note_of(error)
    if note.exit_code:
        return note.error()
    lines = [f"Training failed with {note.kind}: {note.message} ({note.place})"]
    lines += [f"  case: {note.case}"] if note.case else []
    lines += [f"  log: {log}"] if log else []
    lines += [f"  what to do: {note.advice}"] if note.advice else []
    return MedsegError("\n".join(lines))


def describe_exit(code: int, *, out_of_memory: bool = False) -> tuple[str, str]:
    """Return a description of how a process ended, and advice.

    Args:
        code: Return code as in `subprocess`, negative for a signal.
        out_of_memory: Whether the system has killed a process for lack of memory in the meantime.
    """
    if code >= 0:
        return f"ended with exit code {code} and without a message", "check the log"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    cause, advice = _SIGNALS.get(name, ("sent from outside", "check the log"))
    if name == "SIGKILL" and out_of_memory:
        cause = "because the memory of this container or job ran out"
    return f"was killed by {name}, {cause}", advice


def memory_kills() -> int:
    """Return how many processes of this container or job were killed for lack of memory; 0 where unknown."""
    for path in _MEMORY_EVENTS:
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text(encoding="ascii"), re.MULTILINE)
        except (OSError, ValueError):
            continue
        if found:
            return int(found[1])
    return 0


def _names(values: Mapping[str, Any]) -> Iterator[str]:
    for value in list(values.values()):
        if isinstance(value, Mapping) and "image" in value and isinstance(value.get("name"), str):
            yield value["name"]
