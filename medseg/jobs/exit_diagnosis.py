"""Why a process that trains has died, and what to change: signals, memory, exceptions and the case they came with.

Nothing beyond the standard library is imported.
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
    "use less memory: --set cache_memory=0, a smaller batch_size, patch_size or num_workers, fewer --devices; on a "
    "cluster ask for more"
)
_SIGNALS: Final[Mapping[str, tuple[str, str]]] = {
    "SIGKILL": ("which the system sends when memory runs out, and people and job schedulers send too", _LESS_MEMORY),
    "SIGTERM": ("which asks it to stop, as job schedulers do at a time limit", "ask for more time, or go on later"),
    "SIGINT": ("which asks it to stop, as Ctrl-C does", "go on later"),
    "SIGXCPU": ("since its limit of processor time was used up", "ask for more time, or go on later"),
    "SIGBUS": (
        "which comes when shared memory or the disk behind a file in memory is full",
        "--set num_workers=0, or more shared memory (docker run --shm-size=4g)",
    ),
    "SIGSEGV": (
        "a crash inside a library",
        "try --devices 1 and --set num_workers=0; if it stays, install torch and MONAI anew in the tested versions",
    ),
    "SIGABRT": ("since a library gave up; its last words are in the log", "look at the log"),
    "SIGILL": (
        "since a library uses an instruction that this processor does not have",
        "install packages that were built for this processor",
    ),
    "SIGFPE": ("a division by zero inside a library", "look at the log; try --set precision=float32"),
}
# What an exception says -> what to change. The first that fits counts.
_ADVICE: Final[tuple[tuple[str, str], ...]] = (
    (r"CUDA out of memory|OutOfMemoryError", "use less of the device: a smaller batch_size or patch_size, precision"),
    (r"MemoryError|[Cc]an't allocate memory|Cannot allocate memory|bad_alloc|Unable to allocate", _LESS_MEMORY),
    (r"No space left on device", "make room on the disk, or train to another one with --output"),
    (r"Too many open files", "raise the limit (ulimit -n 4096), or --set num_workers=0"),
    (r"EADDRINUSE|[Aa]ddress already in use", "start it again: another program took the port in that moment"),
    (r"unable to open shared memory|insufficient shared memory", _SIGNALS["SIGBUS"][1]),
    (r"NCCL|ncclSystemError", "set NCCL_DEBUG=INFO and look at the log; --device cpu does without NCCL"),
)
# What the others say when one of them is gone.
_CONNECTION: Final = re.compile(
    r"[Cc]onnection (?:closed|reset|refused)|gloo[/\\]transport|Broken pipe|DistBackendError|DistNetworkError|"
    r"Socket Timeout|ncclRemoteError|recvValue failed|remote process exited"
)
# Where MONAI builds the parts of a config, and runs the one that runs the training.
_INSTANTIATES: Final = "monai.utils.module"
_SHOWN: Final = 400
_MEMORY_EVENTS: Final = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


@dataclass(frozen=True)
class Note:
    """What an exception leaves behind for whoever tells people about it.

    Attributes:
        time: when, in seconds since the epoch.
        kind: class of the exception.
        message: what it says, shortened.
        place: file and line where it was raised.
        case: name of the case that was worked on; empty if none is known.
        own: An error of ours as JSON values, which speaks for itself; None for any other.
        connection: whether it only tells that another process is gone.
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
        """What the command line returns for an error of ours; 0 for any other."""
        return error_from_json(self.own).exit_code if self.own else 0

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Note | None:
        """Read one back; None if none was written, or not to its end."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def advice(self) -> str:
        """What to change; empty if that cannot be told from the exception."""
        text = f"{self.kind}: {self.message}"
        return next((advice for pattern, advice in _ADVICE if re.search(pattern, text, re.DOTALL)), "")

    def error(self) -> MedsegError:
        """Return an error of ours as it was, without what it was raised in."""
        return error_from_json(self.own) if self.own else MedsegError(self.message)


def note_of(error: BaseException) -> Note:
    """Return what is to be told of an exception."""
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
    """Return what went wrong within a part of a config, of which MONAI's own error only says which part it was."""
    while error.__cause__ is not None and _module_of(error) == _INSTANTIATES:
        error = error.__cause__
    return error


def _module_of(error: BaseException) -> str:
    """Return the module that raised an error; empty if it was not raised."""
    *_, frame = (None, *(frame for frame, _ in traceback.walk_tb(error.__traceback__)))
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def case_of(error: BaseException) -> str:
    """Return the name of the case that was worked on when an exception was raised; empty if it cannot be told.

    It is looked for in the innermost function that has a case (a mapping with `name` and `image`) among its values.
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
    """Return the error of ours to raise for an exception that ended a training in this process.

    Args:
        error: any exception.
        log: file that holds its whole traceback.
    """
    note = note_of(error)
    if note.exit_code:
        return note.error()
    lines = [f"training stopped: {note.kind}: {note.message} ({note.place})"]
    lines += [f"  case: {note.case}"] if note.case else []
    lines += [f"  log: {log}"] if log else []
    lines += [f"  what to do: {note.advice}"] if note.advice else []
    return MedsegError("\n".join(lines))


def describe_exit(code: int, *, out_of_memory: bool = False) -> tuple[str, str]:
    """Return how a process ended, in words, and what to change.

    Args:
        code: as `subprocess` gives it: negative for a signal.
        out_of_memory: whether the system is known to have ended a process for memory meanwhile.
    """
    if code >= 0:
        return f"ended with exit code {code} and left no message", "look at the log"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    cause, advice = _SIGNALS.get(name, ("sent from outside", "look at the log"))
    if name == "SIGKILL" and out_of_memory:
        cause = "since the memory of this container or job ran out"
    return f"was ended by {name}, {cause}", advice


def memory_kills() -> int:
    """Return how many processes the system has ended for memory in this container or job; 0 where it does not tell."""
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
