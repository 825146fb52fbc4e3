"""How the C library hands out the memory of tensors."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["reuse_memory"]


@contextmanager
def reuse_memory() -> Iterator[None]:
    """Let the C library keep and reuse the memory of large tensors, instead of fetching it anew for each of them.

    Fetching costs a page fault for every 4 KiB, which is a large share of the time of a network on a CPU. What is free
    goes back to the system at the end. Does nothing without glibc, or where the environment chose its own settings.
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

    # The parameters of mallopt(3) and the values that glibc reaches by itself in a process with large tensors.
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
