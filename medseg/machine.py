"""CPU cores, processor name and memory of this machine, with the standard library only and fallbacks everywhere.

Most values come from `/proc` on Linux; without it or the module `resource`, they are coarser or unknown.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from medseg.errors import RequestError

__all__ = [
    "available_bytes",
    "core_count",
    "cpu_name",
    "forget_peak",
    "parse_memory",
    "peak_bytes",
    "resident_bytes",
    "reuse_memory",
    "shown_bytes",
]

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PROC: Final = Path("/proc")
_PS: Final = "/bin/ps"
# Limit and usage of control groups, version 2 and 1.
_CONTAINER_FILES: Final = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_UNLIMITED: Final = 1 << 62


def core_count() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def cpu_name() -> str:
    """Return the processor's model name where the system reports it, otherwise its architecture."""
    lines = _lines(_PROC / "cpuinfo")
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def available_bytes() -> int:
    """Return the memory available to this process: of the machine, or of its container where that is less."""
    known = [_machine_bytes(), *(_container_bytes(*files) for files in _CONTAINER_FILES)]
    found = [value for value in known if value is not None]
    return min(found) if found else _UNLIMITED


def resident_bytes() -> int:
    """Return the resident memory of this process; 0 where the system does not report it."""
    return _status("VmRSS") or _listed_bytes()


def peak_bytes() -> int:
    """Return the peak memory of this process, since `forget_peak` if it was called; 0 where it is unknown."""
    if peak := _status("VmHWM"):
        return peak
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Reset `peak_bytes` where the system can; elsewhere it keeps its value, which is then an upper bound."""
    with suppress(OSError):
        (_PROC / "self" / "clear_refs").write_text("5")


def parse_memory(text: str | int) -> int:
    """Parse an amount of memory such as "2G", "1500M" or a plain number (units are powers of 1024); 0 for none.

    Raises:
        RequestError: The text is not an amount of memory.
    """
    if isinstance(text, int):
        return text
    if not text.strip():
        return 0
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise RequestError(f"invalid amount of memory '{text}': write for instance 2G or 1500M")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def shown_bytes(count: float) -> str:
    """Format a number of bytes for messages."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _status(field: str) -> int:
    found = (line.split() for line in _lines(_PROC / "self" / "status") if line.startswith(field))
    return next((int(words[1]) * 1024 for words in found), 0)


def _listed_bytes() -> int:
    """Return the memory of this process as the command `ps` lists it, as on macOS; 0 without `ps`."""
    command = [_PS, "-o", "rss=", "-p", str(os.getpid())]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        return int(subprocess.run(command, capture_output=True, timeout=5, check=True).stdout) * 1024  # noqa: S603
    return 0


def _machine_bytes() -> int | None:
    for line in _lines(_PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _container_bytes(limit: str, used: str) -> int | None:
    with suppress(OSError, ValueError):  # without a limit the file says "max"
        return max(int(Path(limit).read_text()) - int(Path(used).read_text()), 0)
    return None


@contextmanager
def reuse_memory() -> Iterator[None]:
    """Let the C library keep and reuse the memory of large tensors, instead of requesting it for each of them.

    A request costs a page fault for every 4 KiB, which is a large share of the time of a network on a CPU. Free memory
    returns to the system at the end. Does nothing without glibc, or where environment variables set the allocator.
    """
    library = _glibc()
    if library is None:
        yield
        return
    _ReusedMemory.enter(library)
    try:
        yield
    finally:
        _ReusedMemory.leave(library)


class _ReusedMemory:
    """Counts nested uses: the settings are those of the process."""

    # The parameters of mallopt(3), reset at the end to the values that glibc adapts to in a process with large tensors.
    mmap_max, mmap_threshold, top_pad, trim_threshold = -4, -3, -2, -1
    uses = 0
    lock = threading.Lock()

    @classmethod
    def enter(cls, library: ctypes.CDLL) -> None:
        with cls.lock:
            cls.uses += 1
            library.mallopt(cls.mmap_max, 0)
            library.mallopt(cls.trim_threshold, -1)
            library.mallopt(cls.top_pad, 64 << 20)

    @classmethod
    def leave(cls, library: ctypes.CDLL) -> None:
        with cls.lock:
            cls.uses -= 1
            if cls.uses > 0:
                return
            library.mallopt(cls.mmap_max, 65536)
            library.mallopt(cls.mmap_threshold, 32 << 20)
            library.mallopt(cls.trim_threshold, 64 << 20)
            library.mallopt(cls.top_pad, 128 << 10)
            library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or os.environ.get("LD_PRELOAD") or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)
