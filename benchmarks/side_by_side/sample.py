"""One run of one contestant in this process, which should be new.

    python -m side_by_side.sample REQUEST.json ANSWER.json

Three points in time: the process starts; everything is imported; the mask is written. The work between the last two
(reading the bundle, weights and image, resampling, network, restoring, writing) is what contestants are compared by.
What is still imported during the work counts as work and is named.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

MODULES = {
    "monai": "side_by_side.monai_zoo",
    "monai32": "side_by_side.monai_zoo",
    "nnunet": "side_by_side.nnunet",
    "medseg": "side_by_side.ours",
    "medseg-fast": "side_by_side.ours",
}


class Phases:
    """Seconds by phase, in order of first use."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Time all further calls of a method of a class or a function of a module."""
        inner: Callable[..., Any] = getattr(owner, method)

        @wraps(inner)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.timed(name):
                return inner(*args, **kwargs)

        setattr(owner, method, watched)


def main() -> None:
    """Import, reset the peak memory, run the contestant, and write the measurements."""
    started = time.perf_counter()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    contestant = importlib.import_module(MODULES[request["contestant"]])
    contestant.import_all(request)
    imported = time.perf_counter()
    known, phases = set(sys.modules), Phases()
    if "limit_mib" in request:
        limit_address_space(request["limit_mib"])
    before, cpu, children = reset_peak(), _cpu(), os.times().children_user
    contestant.work(request, phases)
    done = time.perf_counter()
    answer = {
        "work_s": done - imported,
        "import_s": imported - started,
        "work_cpu_s": _cpu() - cpu,
        "imported_mib": before,
        "peak_mib": status("VmHWM"),
        "children_cpu_s": os.times().children_user - children,
        "phases_s": phases.seconds,
        "late_imports": sorted({".".join(name.split(".")[:2]) for name in set(sys.modules) - known}),
    }
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def import_targets(config: Any) -> None:
    """Import the module of every `_target_` in a config."""
    for target in _targets(config):
        name = target
        while "." in name:
            name = name.rpartition(".")[0]
            try:
                importlib.import_module(name)
                break
            except ModuleNotFoundError:
                continue


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _targets(item)


def limit_address_space(more_mib: float) -> None:
    """Limit the address space of this process to its current size plus the given amount."""
    limit = int((status("VmSize") + more_mib) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def reset_peak() -> float:
    """Reset the peak resident set to the current one, and return it in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def status(name: str) -> float:
    """Return a memory entry of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
