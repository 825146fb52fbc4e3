"""The work folder with its cached files, and child processes."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle
from side_by_side.settings import (
    CONSTRAINTS,
    KINDS,
    REQUIREMENTS,
    bundle_path,
    environment,
    image_path,
    nnunet_python,
)

KNOBS = ("roi_size", "sw_batch_size", "overlap", "spacing", "intensity_range", "network_def")


@dataclass(frozen=True)
class Setup:
    """One comparison: work folder, case, network and number of threads.

    `classes` is for another number of them, untrained; `overlap` for another one than the bundle's.
    """

    work: Path
    case: str
    network: str
    threads: int
    tuned_memory: bool
    classes: int | None = None
    overlap: float | None = None

    @property
    def image(self) -> Path:
        """Image of the case."""
        return image_path(self.work, self.case)

    @property
    def bundle(self) -> Path:
        """Folder of the bundle with network, weights and settings."""
        return bundle_path(self.work, self.case, self.network, self.classes)

    @property
    def trains(self) -> bool:
        """Whether the network of the bundle is trained by the benchmark."""
        return self.network == "light" and self.classes is None

    @property
    def weights(self) -> Path:
        """Weight file for all contestants."""
        return self.bundle / "models" / "model.pt"

    @property
    def runs(self) -> Path:
        """Folder of the masks."""
        return self.work / "runs" / f"{self.case}_{self.bundle.name}"

    def settings(self) -> dict[str, Any]:
        """Return the values of the bundle's config for all contestants."""
        config = json.loads((self.bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
        told = {name: config[name] for name in KNOBS if name in config}
        return told if self.overlap is None else {**told, "overlap": self.overlap}

    def request(self, **more: Any) -> dict[str, Any]:
        """Return the request for a child process."""
        paths = {"image": str(self.image), "bundle": str(self.bundle), "weights": str(self.weights)}
        kind = KINDS.get(self.case, "CT")
        return {**paths, "kind": kind, "threads": self.threads, "settings": self.settings(), **more}

    def start(self, module: str, request: dict[str, Any], *, python: str = sys.executable) -> dict[str, Any]:
        """Run a module of this package in a new process; return its answer and the cost of the whole process."""
        with tempfile.TemporaryDirectory() as folder:
            asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
            asked.write_text(json.dumps(request), encoding="utf-8")
            before, started = children_cpu(), time.perf_counter()
            self.call(module, str(asked), str(answer), python=python)
            process = {"process_s": time.perf_counter() - started, "process_cpu_s": children_cpu() - before}
            return {**process, **json.loads(answer.read_text(encoding="utf-8"))}

    def call(self, module: str, *arguments: str, python: str = sys.executable, threads: int | None = None) -> None:
        """Run a module of this package in a new process.

        Raises:
            SystemExit: it failed; with the end of what it said.
        """
        own = environment(threads or self.threads, tuned_memory=self.tuned_memory)
        command = [python, "-W", "ignore", "-m", f"side_by_side.{module}", *arguments]
        done = subprocess.run(command, env=own, cwd=self.work, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def prepare(setup: Setup, contestants: Sequence[str]) -> None:
    """Create missing files: image, training data, bundle and nnU-Net's environment."""
    setup.work.mkdir(parents=True, exist_ok=True)
    folder = str(setup.work)
    if not setup.image.is_file():
        say(f"writing {setup.image}")
        setup.call("cases", folder, setup.case)
    if setup.trains and not (setup.work / "training" / "split.json").is_file():
        say("drawing the training data")
        setup.call("cases", folder, "training")
    if not setup.bundle.is_dir():
        say("training the network on one thread; this takes some minutes" if setup.trains else "making the bundle")
        classes = [] if setup.classes is None else [str(setup.classes)]
        setup.call("bundles", folder, setup.case, setup.network, *classes, threads=1)
    # The templates may have changed; the weights are kept.
    build(Bundle(setup.bundle))
    if "nnunet" in contestants and not (setup.work / "nnunet" / "installed").is_file():
        install_nnunet(setup.work)


def install_nnunet(work: Path) -> None:
    """Create the environment of nnU-Net from the package index."""
    say(f"installing nnU-Net into {work / 'nnunet'}")
    subprocess.run([sys.executable, "-m", "venv", str(work / "nnunet")], check=True)
    pinned = ["-c", str(CONSTRAINTS), "-r", str(REQUIREMENTS)]
    subprocess.run([str(nnunet_python(work)), "-m", "pip", "install", "--quiet", *pinned], check=True)
    (work / "nnunet" / "installed").touch()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say(text: str) -> None:
    """Print a progress message."""
    print(text, file=sys.stderr, flush=True)


def default_work() -> Path:
    """Return the default work folder."""
    return Path(tempfile.gettempdir()) / "medseg-benchmark"


def threads_here() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0))


def children_cpu() -> float:
    """Return the CPU time of all ended child processes, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
