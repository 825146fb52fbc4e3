"""Training with several processes on this machine: start them, report the first one's progress, stop them together.

Each process runs `configs/train.json` merged with `configs/multi_gpu_train.json`, like
`torchrun --nproc_per_node=N -m monai.bundle run`, and ends with the same weights. Its output goes to
`logs/process_<n>.log` in the run's folder. If a process dies, the others are stopped, and the error names the process,
the probable cause (see `medseg.jobs.exit_diagnosis`) and a remedy.

The processes run `medseg.jobs.worker` and are started and stopped by torch's elastic multiprocessing
(`medseg.jobs.processes`). None of them outlives the parent process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle, merged
from medseg.bundle.trust import require_trust
from medseg.errors import MedsegError, RequestError
from medseg.files import check_folder, replace_text
from medseg.jobs import runner, worker
from medseg.jobs.exit_diagnosis import Note, describe_exit, explain, memory_kills
from medseg.jobs.job import Job, checked_places
from medseg.jobs.job import prepare as prepare_job
from medseg.machine import core_count
from medseg.manifest import Manifest
from medseg.notices import forward

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medseg.jobs.processes import Exit
    from medseg.types import Progress

__all__ = ["check_processes", "prepare", "run_folder", "train"]

_CONFIGS: Final = ("train", "multi_gpu_train")
# Seconds for the other processes to fail on their own after the first death; their errors help to identify it.
_GRACE: Final = 3.0
_TAIL: Final = 300
# The signal by which libraries end a process whose connection broke.
_ABORT: Final = signal.SIGABRT


@dataclass(frozen=True)
class _Death:
    """A process that failed, with its log and the record of its exception."""

    exit: Exit
    log: Path
    note: Note | None


def check_processes(count: int, config: Mapping[str, Any]) -> None:
    """Check that a number of processes can share a training step.

    Raises:
        RequestError: Invalid number of processes; the message suggests valid ones.
    """
    if count < 1:
        raise RequestError(f"Invalid --devices {count}: expected the number of processes, 1 or more.")
    batch = config.get("batch_size")
    if isinstance(batch, int) and batch % count:
        raise RequestError(
            f"--devices {count} does not divide batch_size={batch}, the number of cases per step over all processes. "
            f"Pass --set batch_size={-(-batch // count) * count}, which trains differently, or --devices "
            f"{_divisor(batch, count)}."
        )
    name = str(config.get("device_name", ""))
    if count > 1 and ":" in name:
        raise RequestError(f"device_name={name} is one device for {count} processes: expected auto, cuda or cpu.")


def prepare(
    bundle: Bundle,
    settings: Mapping[str, Any],
    *,
    paths: Mapping[str, Any],
    trust: str | None = None,
    strict: bool = False,
) -> Job:
    """Check a training with several processes without importing torch or MONAI; see `medseg.jobs.job.prepare`."""
    job = prepare_job("train", bundle, settings, paths=paths, trust=trust, strict=strict)
    configs = bundle.load_configs(*_CONFIGS)
    require_trust(bundle.root, configs, trust)
    files = tuple(bundle.config_paths(*_CONFIGS))
    config = {**merged(configs), "_meta_": job.config["_meta_"], **job.overrides}
    return checked_places(replace(job, config_files=files, config=config))


def run_folder(bundle: Bundle, config: Mapping[str, Any]) -> Path:
    """Return the folder of a run, with its manifest, saved state and logs."""
    given = config.get("output_dir")
    if isinstance(given, str):
        return Path(given)
    inside = given.get("path") if isinstance(given, dict) else None
    return bundle.root / (inside if isinstance(inside, str) else "runs/train")


def train(job: Job, processes: int, *, report: Progress | None = None) -> Manifest:
    """Train in this process, or with several; the output is that of `medseg.jobs.runner.train`.

    Args:
        job: Job from `prepare`, or for one process from `medseg.jobs.job.prepare`.
        processes: Number of processes; on CUDA each uses one device, on the CPU they share the cores.
        report: Called after each training step.

    Returns:
        Manifest of the run.

    Raises:
        MedsegError: Failed training or a dead process; a `MedsegError` of a process is raised unchanged.
    """
    path = run_folder(job.bundle, job.config) / "manifest.json"
    earlier = path.read_text(encoding="utf-8") if job.config.get("resume") and path.is_file() else ""
    try:
        return _train_here(job, report) if processes == 1 else _train_together(job, processes, report)
    except MedsegError:
        _keep_record(path, earlier)
        raise


def _keep_record(path: Path, earlier: str) -> None:
    """Restore the manifest of a run that failed to resume, if the new manifest lacks its validations."""
    with suppress(RequestError, ValueError):
        if earlier and json.loads(earlier)["validations"] and not Manifest.read(path).validations:
            replace_text(path, earlier)


def _train_together(job: Job, processes: int, report: Progress | None) -> Manifest:
    folder = run_folder(job.bundle, job.config)
    logs = folder / "logs"
    check_folder(logs)
    for log in logs.glob("process_*.log"):
        log.unlink()
    files = [logs / f"process_{rank}.log" for rank in range(processes)]
    kills = memory_kills()
    with tempfile.TemporaryDirectory() as folder_of_notes:
        notes = Path(folder_of_notes)
        exits = _run(job, files, notes, report)
        _gather_warnings(folder / "manifest.json", notes)
        failed = [
            _Death(end, log, Note.read(_note_file(notes, end.rank)))
            for end, log in zip(exits, files, strict=True)
            if end.code
        ]
    if failed:
        error = _error(failed, processes, out_of_memory=memory_kills() > kills)
        _record(folder / "manifest.json", error)
        raise error
    return Manifest.read(folder / "manifest.json")


def _gather_warnings(path: Path, notes: Path) -> None:
    """Add the warnings of the other processes to the manifest of the first, and log all of them."""
    with suppress(RequestError):
        manifest = Manifest.read(path)
        found = [warning for each in worker.read_warnings_of(notes) for warning in each]
        manifest.warnings += [warning for warning in dict.fromkeys(found) if warning not in manifest.warnings]
        manifest.write(path)
        forward(manifest.warnings)


def _run(job: Job, logs: Sequence[Path], exchange: Path, report: Progress | None) -> list[Exit]:
    from medseg.jobs.processes import run_together

    worker.write_request(exchange, job)
    for log in logs:
        log.write_bytes(b"")
    # The processes exit when this socket closes, however the parent ends.
    with socket.create_server(("127.0.0.1", 0), backlog=len(logs)) as lifeline:
        port = lifeline.getsockname()[1]
        return run_together(
            [worker.command(exchange, log, port) for log in logs],
            _environments(len(logs), exchange),
            tick=_Progress(exchange / worker.PROGRESS, report).pass_on,
            grace=_GRACE,
        )


def _train_here(job: Job, report: Progress | None) -> Manifest:
    try:
        return runner.train(job, report=report)
    except MedsegError:
        raise
    except Exception as error:
        log = run_folder(job.bundle, job.config) / "logs" / "process_0.log"
        replace_text(log, "".join(traceback.format_exception(error)))
        raise explain(error, log) from error


def _environments(processes: int, notes: Path) -> list[dict[str, str]]:
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": str(_threads(processes)),
        "PYTHONUNBUFFERED": "1",
        # Import the same packages as the parent.
        "PYTHONPATH": os.pathsep.join(place for place in sys.path if place),
    }
    return [
        {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), worker.NOTE: str(_note_file(notes, rank))}
        for rank in range(processes)
    ]


def _note_file(notes: Path, rank: int) -> Path:
    return notes / f"{rank}.json"


class _Progress:
    """Reports the progress that the first process writes."""

    def __init__(self, path: Path, report: Progress | None) -> None:
        self._path = path
        self._report = report
        self._read = 0

    def pass_on(self) -> None:
        """Report the complete lines that were added since the last call."""
        if self._report is None or not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._report(*json.loads(line))


def _error(failed: Sequence[_Death], processes: int, *, out_of_memory: bool) -> MedsegError:
    """Return the error for the process that failed first."""
    first = min(failed, key=_root_cause_rank)
    note = first.note
    if note is not None and note.exit_code:
        return note.error()
    if note is None:
        how, advice = describe_exit(first.exit.code, out_of_memory=out_of_memory)
        last = _last_line(first.log)
    else:
        how, advice = f"failed with {note.kind}: {note.message} ({note.place})", note.advice
        last = ""
    lines = [f"Training process {first.exit.rank} of {processes} {how}"]
    lines += [f"  case: {note.case}"] if note is not None and note.case else []
    lines += [f"  last line of its log: {last}"] if last else []
    lines += [f"  log: {first.log}", f"  what to do: {advice or 'check the log'}; then continue with --resume"]
    lines += ["The other processes were stopped."] if processes > 1 else []
    return MedsegError("\n".join(lines))


def _root_cause_rank(death: _Death) -> tuple[int, float]:
    """Return a sort key: the process that failed on its own before those that failed as a result, then by time."""
    if death.exit.stopped:
        return 4, death.exit.rank
    if death.note is None:
        return (2 if death.exit.code == -_ABORT else 0), death.exit.rank
    return (3 if death.note.connection else 0 if death.note.exit_code else 1), death.note.time


def _record(path: Path, error: MedsegError) -> None:
    """Finish the manifest of a run whose process died before it could."""
    with suppress(RequestError):
        manifest = Manifest.read(path)
        if manifest.status == "running":
            manifest.status, manifest.error = "aborted", str(error)
            manifest.write(path)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:_TAIL] if lines else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _threads(processes: int) -> int:
    """Return the threads per process: an equal share of the cores, or of the user's `OMP_NUM_THREADS`."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(allowed) if allowed.isdigit() else core_count()) // processes)


def _divisor(batch: int, count: int) -> int:
    return next(number for number in range(min(batch, count), 0, -1) if batch % number == 0)
