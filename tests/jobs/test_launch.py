"""Starting processes, and telling why one died: which, by what, with which case, and what to change."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.catalog import Bundle
from medseg.errors import BundleError, CaseError, MedsegError, RequestError
from medseg.jobs import launch, worker
from medseg.jobs.job import Job
from medseg.manifest import Manifest

_START = "import os, signal, sys, time; rank = int(os.environ['RANK'])"
_WORK = """
import os, time
from medseg.jobs import worker
def work(job, exchange):
    rank = int(os.environ["RANK"])
    {body}
worker._work = work
worker.main()
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A training that is never begun: the processes of these tests do something else."""
    return Job("train", Bundle(tmp_path / "bundle"), (), {"seed": 1}, {}, (), trusted=False)


def _worker(monkeypatch: pytest.MonkeyPatch, code: str, *, grace: float = 1.0) -> None:
    monkeypatch.setattr(worker, "_MAIN", code)
    monkeypatch.setattr(launch, "_GRACE", grace)


def _died(job: Job, processes: int = 2) -> MedsegError:
    started = time.monotonic()
    with pytest.raises(MedsegError) as caught:
        launch.train(job, processes)
    assert time.monotonic() - started < 30
    return caught.value


@pytest.mark.parametrize(
    ("name", "cause", "advice"),
    [
        ("SIGKILL", "when memory runs out", "cache_memory=0"),
        ("SIGSEGV", "a crash inside a library", "--devices 1"),
        ("SIGBUS", "shared memory", "--shm-size"),
        ("SIGTERM", "time limit", "request more time"),
    ],
)
def test_a_killed_process_is_named_with_its_signal_and_the_others_are_stopped(
    monkeypatch: pytest.MonkeyPatch, job: Job, name: str, cause: str, advice: str
) -> None:
    body = f"print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.{name})"
    _worker(monkeypatch, f"{_START}\nif rank == 1:\n    {body}\ntime.sleep(60)", grace=0)
    error = _died(job)
    assert error.exit_code == 1
    text = str(error)
    for part in (
        "process 1 of 2 was killed by",
        name,
        cause,
        advice,
        "last words",
        "--resume",
        "others",
        "process_1.log",
    ):
        assert part in text.replace("other processes", "others"), (part, text)


def test_memory_that_ran_out_is_said_where_the_system_knows_it(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    counts = iter((3, 4))
    monkeypatch.setattr(launch, "memory_kills", lambda: next(counts))
    code = f"{_START}\nos.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)"
    _worker(monkeypatch, code, grace=0)
    assert "process 0 of 2 was killed by SIGKILL, because the memory of this container or job ran out" in str(
        _died(job)
    )


def test_an_exit_without_a_word_is_told_with_its_code(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    _worker(monkeypatch, f"{_START}\nos._exit(7) if rank == 1 else time.sleep(60)", grace=0)
    assert "process 1 of 2 ended with exit code 7 and without a message" in str(_died(job))


def test_who_fails_first_is_blamed_and_not_those_whose_connection_broke(
    monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    body = """
    if rank == 1:
        case = {"image": "a.nii.gz", "label": "b.nii.gz", "name": "case_7.nii.gz"}
        time.sleep(0.3)
        raise ValueError(f"bad numbers in {len(case)} entries")
    raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:8433")
    """
    _worker(monkeypatch, _WORK.format(body=body.strip()))
    text = str(_died(job))
    assert "process 1 of 2 failed with ValueError: bad numbers in 3 entries (<string>:" in text
    assert "case: case_7.nii.gz" in text
    log = job.bundle.root / "runs" / "train" / "logs" / "process_1.log"
    assert str(log) in text
    assert "Traceback" in log.read_text()
    assert "Traceback" not in text


def test_a_kill_is_blamed_and_not_the_error_that_follows_from_it(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    body = """
    if rank == 2:
        os.kill(os.getpid(), 9)
    time.sleep(0.2)
    raise RuntimeError("something about the others") if rank == 1 else ConnectionResetError("Connection reset by peer")
    """
    _worker(monkeypatch, _WORK.format(body=body.strip()))
    assert "process 2 of 3 was killed by SIGKILL" in str(_died(job, 3))


@pytest.mark.parametrize(("kind", "code"), [(RequestError, 2), (CaseError, 1)])
def test_an_error_of_ours_is_raised_as_it_was(
    monkeypatch: pytest.MonkeyPatch, job: Job, kind: type[MedsegError], code: int
) -> None:
    body = f"""
    from medseg.errors import {kind.__name__}
    try:
        raise {kind.__name__}("the file x is no image; give another")
    except Exception as error:
        raise RuntimeError("wrapped by an engine") from error
    """
    _worker(monkeypatch, _WORK.format(body=body.strip()))
    error = _died(job)
    assert isinstance(error, kind)
    assert (str(error), error.exit_code) == ("the file x is no image; give another", code)


def test_progress_of_the_first_process_is_passed_on_and_its_record_read(
    monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    folder = job.bundle.root / "runs" / "train"
    body = f"""
    from medseg.manifest import Manifest
    print("noise of a library")
    if rank == 0:
        for step in (1, 2):
            (exchange / worker.PROGRESS).open("a").write(f'[{{step / 2}}, 1, "loss {{step}}"]\\n')
        with Manifest("train", path=__import__("pathlib").Path({str(folder / "manifest.json")!r})) as manifest:
            manifest.notes = [os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]]
    """
    _worker(monkeypatch, _WORK.format(body=body.strip()))
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    told: list[Any] = []
    manifest = launch.train(job, 2, report=lambda *progress: told.append(progress))
    assert told == [(0.5, 1, "loss 1"), (1.0, 1, "loss 2")]
    assert manifest.notes == ["2", "3"]
    assert "noise of a library" in (folder / "logs" / "process_0.log").read_text()


def test_the_record_of_a_run_whose_process_died_says_so(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    path = job.bundle.root / "runs" / "train" / "manifest.json"
    Manifest("train").write(path)
    _worker(monkeypatch, f"{_START}\nos.kill(os.getpid(), 9)")
    _died(job)
    manifest = Manifest.read(path)
    assert manifest.status == "aborted"
    assert "SIGKILL" in str(manifest.error)


def test_no_process_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from medseg.bundle.catalog import Bundle
from medseg.jobs import launch, worker
from medseg.jobs.job import Job
body = "open({str(tmp_path)!r} + '/pid_' + str(rank), 'w').write(str(os.getpid())); time.sleep(60)"
worker._MAIN = {_WORK!r}.format(body=body)
launch.train(Job("train", Bundle(Path({str(tmp_path)!r})), (), {{}}, {{}}, (), trusted=False), 2)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        _wait(lambda: len([p for p in tmp_path.glob("pid_*") if p.read_text()]) == 2)
        children = [int(path.read_text()) for path in tmp_path.glob("pid_*")]
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _wait(lambda: not any(_is_alive(child) for child in children))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def _wait(condition: Any) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_process_imports_nothing_from_the_folder_where_the_user_is(
    monkeypatch: pytest.MonkeyPatch, job: Job, tmp_path: Path
) -> None:
    (tmp_path / "smuggled.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as `python -m` has it
    _worker(monkeypatch, f"{_START}\nimport smuggled")
    assert "No module named 'smuggled'" in str(_died(job))


@pytest.mark.parametrize(
    ("count", "config", "message"),
    [
        (0, {}, "1 or more"),
        (2, {"batch_size": 3}, "--set batch_size=4, which trains differently, or --devices 1"),
        (4, {"batch_size": 6}, "or --devices 3"),
        (2, {"batch_size": 2, "device_name": "cuda:1"}, "cuda:1 is one device for 2 processes"),
    ],
)
def test_numbers_of_processes_that_cannot_be_are_refused(count: int, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        launch.check_processes(count, config)


def test_processes_that_share_a_batch_are_let_pass() -> None:
    launch.check_processes(2, {"batch_size": 4, "device_name": "auto"})


def test_a_failure_in_this_process_is_explained_and_its_traceback_kept(
    monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    def fail(job: Job, *, report: Any) -> Manifest:
        raise MemoryError("Unable to allocate 3 GiB")

    monkeypatch.setattr(launch.runner, "train", fail)
    text = str(_died(job, 1))
    assert "Training failed with MemoryError: Unable to allocate 3 GiB (test_launch.py:" in text
    assert "what to do: use less memory" in text
    log = job.bundle.root / "runs" / "train" / "logs" / "process_0.log"
    assert "Traceback" in log.read_text()


def test_a_bundle_without_the_config_is_refused(make_bundle: Any, tiny_source: dict[str, Any]) -> None:
    bundle = make_bundle(tiny_source)
    bundle.config_path("multi_gpu_train").unlink()
    with pytest.raises(BundleError, match=r"no configs/multi_gpu_train\.json; run `medseg bundle build"):
        launch.prepare(bundle, {}, paths={"dataset_dir": "x", "resume": False})
