"""Trains in child processes that are killed where they are told to be; a test speaks to it by lines of JSON.

Every death is a SIGKILL: nothing is flushed, closed or caught. The libraries are imported once; each run is a fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import monai.engines
import torch

import medseg.training
from medseg.bundle.catalog import Bundle
from medseg.jobs import runner
from medseg.jobs.job import prepare

IMPORTED = (monai.bundle, monai.engines, medseg.training)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fuse:
    """A file that kills the process after so many bytes, which have reached the disk by then."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.file.write(view[: self.room])
        self.room -= len(view)
        if self.room <= 0:
            self.file.flush()
            die()
        return len(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def in_step(number: int) -> Callable[..., None]:
    """Die when this process has done so many steps."""
    steps = iter(range(1, number))
    return lambda *_: None if next(steps, None) else die()


def in_write(number: int, room: int) -> None:
    """Die within the writing of a checkpoint, the last of so many."""
    original, writes = torch.save, iter(range(1, number))

    def save(content: Any, file: Any, *rest: Any, **options: Any) -> None:
        original(content, file if next(writes, None) else Fuse(file, room), *rest, **options)

    torch.save = save


def at_rename(number: int, *, after: bool) -> None:
    """Die before or after a file takes its name, the last of so many."""
    original, renames = Path.replace, iter(range(1, number))

    def replace(path: Path, target: Any) -> Path:
        last = next(renames, None) is None
        if last and not after:
            die()
        moved = original(path, target)
        if last:
            die()
        return moved

    Path.replace = replace  # type: ignore[method-assign]


def train(order: dict[str, Any]) -> None:
    death = order.get("death", {})
    report = in_step(death["step"]) if "step" in death else None
    if "write" in death:
        in_write(death["write"], death["bytes"])
    if "rename" in death:
        at_rename(death["rename"], after=death["after"])
    paths = {"dataset_dir": order["data"], "resume": order["resume"]}
    job = prepare("train", Bundle(Path(order["bundle"])), order["settings"], paths=paths)
    runner.train(job, report=report)


def watch(child: int, order: dict[str, Any]) -> None:
    """Kill from outside: after some seconds, or as soon as a half-written file is seen."""
    death = order.get("death", {})
    if "seconds" in death:
        time.sleep(death["seconds"])
        os.kill(child, signal.SIGKILL)
    files = Path(order["bundle"]) / "runs" / "train"
    while "seen" in death and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        # the name holds the number of the process, so what an earlier one left is not taken for it
        if (files / f".partial-{child}-last.pt").exists():
            os.kill(child, signal.SIGKILL)
            return


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)
            code = 1
            try:
                train(order)
                code = 0
            finally:
                os._exit(code)
        watch(child, order)
        _, status = os.waitpid(child, 0)
        print(json.dumps(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
