"""What an inference needs in memory: measured on its first window, compared with what may be used."""

from __future__ import annotations

import math
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import CaseError, RequestError

__all__ = ["Forecast", "NetworkProbe", "fitting_batch", "parse_memory", "resident_bytes", "shown_bytes"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Forecast:
    """What one image will take, known after its first windows.

    Attributes:
        windows: how many there are.
        batch: windows per forward pass.
        seconds: time for all of them, at the pace of the first pass.
        peak_bytes: memory of the process at its highest; 0 where the system does not tell.
    """

    windows: int
    batch: int
    seconds: float
    peak_bytes: int

    def describe(self) -> str:
        """Return the forecast as one line."""
        memory = f", memory up to about {shown_bytes(self.peak_bytes)}" if self.peak_bytes else ""
        return f"{self.windows} windows, {self.batch} at a time: about {_shown_seconds(self.seconds)}{memory}"


class NetworkProbe:
    """Measures how far a forward pass raises the memory of the process."""

    def __init__(self) -> None:
        self.before = resident_bytes()
        # Linux forgets the highest value so far when asked to; elsewhere the measure is at least not too low
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def used(self) -> int:
        """Return the bytes by which memory rose above its present state since the probe was made."""
        return max(_peak_bytes() - self.before, 0)


def parse_memory(text: str | int) -> int:
    """Return the bytes of a text such as "2G", "1500M" or a plain number; 0 for an empty text.

    Raises:
        RequestError: anything else.
    """
    if isinstance(text, int):
        return text
    if not text.strip():
        return 0
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise RequestError(f"'{text}' is no amount of memory: write for instance 2G or 1500M")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def fitting_batch(limit: int, wanted: int, *, held: int, slab: int, result: int, window: int) -> int:
    """Return the largest number of windows per pass, up to `wanted`, that stays below a limit.

    Args:
        limit: bytes that the process may take.
        wanted: windows per pass that were asked for.
        held: what the process holds already: programs, weights, the image.
        slab: the accumulators of the stream.
        result: what is handed back.
        window: what one window takes while the network runs.

    Raises:
        CaseError: not even one window at a time fits; a smaller image may.
    """
    room = limit - held - slab - result
    batch = min(wanted, room // max(window, 1))
    if batch < 1:
        raise CaseError(
            f"this does not fit into {shown_bytes(limit)}: {shown_bytes(held)} are held already (programs, weights and "
            f"the image), and needed are {shown_bytes(slab)} for the slab, {shown_bytes(result)} for the result and "
            f"{shown_bytes(window)} for one window in the network. Allow more memory, or choose a smaller roi_size",
            code="memory",
            limit=limit,
            held=held,
            expected=held + slab + result + window,
        )
    return batch


def resident_bytes() -> int:
    """Return the memory of this process now; 0 where the system does not tell."""
    return _status("VmRSS")


def _peak_bytes() -> int:
    peak = _status("VmHWM")
    if peak or sys.platform == "win32":
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def shown_bytes(count: float) -> str:
    """Return a number of bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _shown_seconds(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds < 100 else f"{seconds / 60:.1f} min"
