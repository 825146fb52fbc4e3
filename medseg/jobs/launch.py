"""Train a bundle with several processes of this machine: start them, pass on what the first says, stop them together.

Each process runs `configs/train.json` with `configs/multi_gpu_train.json` laid over it, as
`torchrun --nproc_per_node=N -m monai.bundle run` would, and ends with the same weights. What it prints goes to
`logs/process_<n>.log` in the run's folder. When one dies, the others are stopped and the error says which one, why as
far as that can be known (see `medseg.jobs.exit_diagnosis`), and what to change.

The processes hear of their job through standard input and end when it is closed, so none outlives this one.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle, merged
from medseg.bundle.trust import require_trust
from medseg.errors import MedsegError, RequestError
from medseg.files import check_folder, replace_text
from medseg.jobs import runner
from medseg.jobs.exit_diagnosis import Note, describe_exit, explain, memory_kills, note_of
from medseg.jobs.job import Job, checked_places, open_workflow
from medseg.jobs.job import prepare as prepare_job
from medseg.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from medseg.jobs.job import Job
    from medseg.types import Progress

__all__ = ["check_processes", "prepare", "run_folder", "train", "work_from_stdin"]

_CONFIGS: Final = ("train", "multi_gpu_train")
_WORKER: Final = "from medseg.jobs.launch import work_from_stdin; work_from_stdin()"
_POLL: Final = 0.1
# After a death the others notice it by themselves, and say so; what they say tells whether it was the first.
_GRACE: Final = 3.0
_STOP: Final = 10.0
_TAIL: Final = 300
# The signal by which libraries end a process whose connection broke.
_ABORT: Final = signal.SIGABRT


@dataclass
class _Process:
    """One process that trains.

    Attributes:
        rank: its number.
        handle: the process itself.
        log: what it prints.
        note: where it leaves word of an exception.
        stopped: whether it was stopped because of another one.
    """

    rank: int
    handle: subprocess.Popen[str]
    log: Path
    note: Path
    stopped: bool = False


def check_processes(count: int, config: Mapping[str, Any]) -> None:
    """Check that so many processes can share a training step.

    Raises:
        RequestError: they cannot; the message names numbers that fit.
    """
    if count < 1:
        raise RequestError(f"--devices {count}: give the number of processes, 1 or more")
    batch = config.get("batch_size")
    if isinstance(batch, int) and batch % count:
        raise RequestError(
            f"--devices {count}: batch_size={batch} is the number of cases of a step over all processes and cannot be "
            f"shared by {count}; give --set batch_size={-(-batch // count) * count}, which trains differently, or "
            f"{_divisor(batch, count)} devices"
        )
    name = str(config.get("device_name", ""))
    if count > 1 and ":" in name:
        raise RequestError(f"device_name={name} is one device for {count} processes; give auto, cuda or cpu")


def prepare(bundle: Bundle, settings: Mapping[str, Any], *, paths: Mapping[str, Any], trust: str | None = None) -> Job:
    """Check a training with several processes without importing torch or MONAI; see `medseg.jobs.prepare_job`."""
    job = prepare_job("train", bundle, settings, paths=paths, trust=trust)
    configs = bundle.load_configs(*_CONFIGS)
    require_trust(bundle.root, configs, trust)
    files = tuple(bundle.config_paths(*_CONFIGS))
    config = {**merged(configs), "_meta_": job.config["_meta_"], **job.overrides}
    return checked_places(replace(job, config_files=files, config=config))


def run_folder(bundle: Bundle, config: Mapping[str, Any]) -> Path:
    """Return the folder of a run: where its manifest, its state and its logs are."""
    given = config.get("output_dir")
    if isinstance(given, str):
        return Path(given)
    inside = given.get("path") if isinstance(given, dict) else None
    return bundle.root / (inside if isinstance(inside, str) else "runs/train")


def train(job: Job, processes: int, *, report: Progress | None = None) -> Manifest:
    """Train in this process, or with several; either leaves what `medseg.jobs.runner.train` leaves.

    Args:
        job: from `prepare`; for one process from `medseg.jobs.prepare_job`.
        processes: how many; on CUDA each has a device of its own, on the CPU they share the cores.
        report: told about each finished step.

    Returns:
        The record of the run.

    Raises:
        MedsegError: training failed or a process died; an error of ours is raised as it was.
    """
    path = run_folder(job.bundle, job.config) / "manifest.json"
    earlier = path.read_text(encoding="utf-8") if job.config.get("resume") and path.is_file() else ""
    try:
        return _train_here(job, report) if processes == 1 else _train_together(job, processes, report)
    except MedsegError:
        _keep_record(path, earlier)
        raise


def _keep_record(path: Path, earlier: str) -> None:
    """Put back the record of a run that could not be continued, where the new one lacks what that run found."""
    with suppress(RequestError, ValueError):
        if earlier and json.loads(earlier)["validations"] and not Manifest.read(path).validations:
            replace_text(path, earlier)


def _train_together(job: Job, processes: int, report: Progress | None) -> Manifest:
    folder = run_folder(job.bundle, job.config)
    logs = folder / "logs"
    check_folder(logs)
    for log in logs.glob("process_*.log"):
        log.unlink()
    kills = memory_kills()
    with tempfile.TemporaryDirectory() as notes:
        group = _start(job, processes, logs, Path(notes))
        try:
            _follow(group, report)
        finally:
            _stop(group)
        failed = [process for process in group if process.handle.returncode != 0]
        if failed:
            error = _death(failed, processes, out_of_memory=memory_kills() > kills)
            _record(folder / "manifest.json", error)
            raise error
    return Manifest.read(folder / "manifest.json")


def _train_here(job: Job, report: Progress | None) -> Manifest:
    try:
        return runner.train(job, report=report)
    except MedsegError:
        raise
    except Exception as error:
        log = run_folder(job.bundle, job.config) / "logs" / "process_0.log"
        replace_text(log, "".join(traceback.format_exception(error)))
        raise explain(error, log) from error


def work_from_stdin() -> None:
    """Be one of the processes: train what standard input describes, and print progress as lines of JSON."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Whatever libraries print belongs to the log; only progress goes to the parent.
    speech = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    code = 0
    try:
        _work(request, speech)
    except BaseException as error:
        traceback.print_exc()
        note = note_of(error)
        note.write(Path(request["note"]))
        code = note.exit_code or 1
    # Threads of a connection that broke could hold up an ordinary end.
    for stream in (speech, sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _work(request: Mapping[str, Any], speech: IO[str]) -> None:
    job = _job_of(request["job"])
    if int(os.environ["RANK"]) == 0:

        def report(done: float, total: int, note: str) -> None:
            speech.write(json.dumps([done, total, note]) + "\n")
            speech.flush()

        runner.train(job, report=report)
    else:
        workflow = open_workflow(job, "train")
        workflow.initialize()
        workflow.run()
    from medseg.training.distributed import stop_processes

    stop_processes()


def _request(job: Job, note: Path) -> str:
    content = {
        "bundle": str(job.bundle.root),
        "config_files": [str(path) for path in job.config_files],
        "config": job.config,
        "overrides": job.overrides,
        "settings": job.settings,
        "vouched": job.vouched,
    }
    return json.dumps({"job": content, "note": str(note)}) + "\n"


def _job_of(content: Mapping[str, Any]) -> Job:
    return Job(
        command="train",
        bundle=Bundle(Path(content["bundle"])),
        config_files=tuple(Path(path) for path in content["config_files"]),
        config=content["config"],
        overrides=content["overrides"],
        settings=tuple(content["settings"]),
        vouched=content["vouched"],
    )


def _end_with_parent() -> None:
    # Not by sys.stdin, whose lock a loader's worker would inherit locked.
    while os.read(0, 1):
        pass
    os._exit(1)


def _start(job: Job, processes: int, logs: Path, notes: Path) -> list[_Process]:
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": str(_threads(processes)),
        "PYTHONUNBUFFERED": "1",
        # They find the packages that this process found, and none in the folder where the user happens to be.
        "PYTHONPATH": os.pathsep.join(place for place in sys.path if place),
        "PYTHONSAFEPATH": "1",
    }
    group: list[_Process] = []
    try:
        for rank in range(processes):
            log, note = logs / f"process_{rank}.log", notes / f"{rank}.json"
            with log.open("w", encoding="utf-8") as file:
                handle = subprocess.Popen(  # noqa: S603  (this Python)
                    [sys.executable, "-c", _WORKER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if rank == 0 else file,
                    stderr=file,
                    text=True,
                    encoding="utf-8",
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,  # Ctrl-C is for this process, which then stops them
                )
            group.append(_Process(rank, handle, log, note))
            _tell(handle, _request(job, note))
    except BaseException:
        _stop(group)
        raise
    return group


def _tell(handle: subprocess.Popen[str], text: str) -> None:
    """Hand over the request; a process that is gone already is found out by its exit code."""
    stdin = handle.stdin
    if stdin is not None:
        with suppress(BrokenPipeError):
            stdin.write(text)
            stdin.flush()


def _follow(group: Sequence[_Process], report: Progress | None) -> None:
    """Pass on progress until all processes have ended, or one has failed and the others had time to notice."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_lines, args=(group[0].handle.stdout, lines), daemon=True)
    reader.start()
    failed_at: float | None = None
    while True:
        codes = [process.handle.poll() for process in group]
        for done, total, note in _progress(lines):
            if report is not None:
                report(done, total, note)
        if None not in codes:
            reader.join(_POLL)
            return
        if any(codes) and failed_at is None:
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE:
            return
        time.sleep(_POLL)


def _read_lines(stream: IO[str] | None, lines: queue.SimpleQueue[str]) -> None:
    if stream is not None:
        with stream:
            for line in stream:
                lines.put(line)


def _progress(lines: queue.SimpleQueue[str]) -> Iterator[tuple[float, int, str]]:
    while not lines.empty():
        with suppress(ValueError):  # the last words of a process that was killed may be cut off
            done, total, note = json.loads(lines.get())
            yield done, total, note


def _stop(group: Sequence[_Process]) -> None:
    running = [process for process in group if process.handle.poll() is None]
    for process in running:
        process.stopped = True
        process.handle.terminate()
    until = time.monotonic() + _STOP
    for process in running:
        try:
            process.handle.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.handle.kill()
            process.handle.wait()
    for process in group:
        if process.handle.returncode:
            _sweep(process.handle.pid)
        if process.handle.stdin is not None:
            with suppress(OSError):
                process.handle.stdin.close()


def _sweep(leader: int) -> None:
    """End what a process that died has left behind, such as the workers of its loader."""
    if hasattr(os, "killpg"):
        with suppress(OSError):
            os.killpg(leader, signal.SIGKILL)


def _death(failed: Sequence[_Process], processes: int, *, out_of_memory: bool) -> MedsegError:
    """Return the error that tells of the process that died first."""
    dead = min(failed, key=root_cause_rank)
    note = Note.read(dead.note)
    if note is not None and note.exit_code:
        return note.error()
    if note is None:
        how, advice = describe_exit(dead.handle.returncode, out_of_memory=out_of_memory)
        last = _last_line(dead.log)
    else:
        how, advice = f"failed: {note.kind}: {note.message} ({note.place})", note.advice
        last = ""
    lines = [f"process {dead.rank} of {processes} {how}"]
    lines += [f"  case: {note.case}"] if note is not None and note.case else []
    lines += [f"  its last words: {last}"] if last else []
    lines += [f"  log: {dead.log}", f"  what to do: {advice or 'look at the log'}; then --resume goes on"]
    lines += ["The other processes were stopped."] if processes > 1 else []
    return MedsegError("\n".join(lines))


def root_cause_rank(process: _Process) -> tuple[int, float]:
    """Sort a process that died by itself before those that died of its absence, and among equals the earlier."""
    note = Note.read(process.note)
    if process.stopped:
        return 4, process.rank
    if note is None:
        return (2 if process.handle.returncode == -_ABORT else 0), process.rank
    return (3 if note.connection else 0 if note.exit_code else 1), note.time


def _record(path: Path, error: MedsegError) -> None:
    """Close the record of a run that its own process could not close any more."""
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
    """The share of each process in the cores, or in the threads that the user allows."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(allowed) if allowed.isdigit() else cores) // processes)


def _divisor(batch: int, count: int) -> int:
    return next(number for number in range(min(batch, count), 0, -1) if batch % number == 0)
