"""A training process, as started by `medseg.jobs.launch`.

It reads its request from a file, writes its progress to another one and all output to its log. It exits when the parent
process ends, which closes a connection between them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Final

from medseg.bundle.catalog import Bundle
from medseg.jobs import runner
from medseg.jobs.exit_diagnosis import note_of
from medseg.jobs.job import Job, open_workflow
from medseg.notices import CaseWarning, collect, read_warnings

__all__ = ["NOTE", "PROGRESS", "command", "main", "read_warnings_of", "write_request"]

PROGRESS: Final = "progress.jsonl"
# Environment variable of torch with the file for the record of an exception.
NOTE: Final = "TORCHELASTIC_ERROR_FILE"
_REQUEST: Final = "request.json"
# Before any other import, redirect the output to the log and remove the current folder from the import path, for which
# Python 3.10 has no option.
_ENTRY: Final = """
import os, sys
for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND))):
    os.dup2(source, target)
os.dup2(1, 2)
sys.path[:] = [place for place in sys.path if place]
"""
_MAIN: Final = "from medseg.jobs.worker import main; main()"


def command(exchange: Path, log: Path, port: int) -> tuple[str, ...]:
    """Return the arguments of the interpreter for a training process.

    Args:
        exchange: Folder of the request and the progress.
        log: Log file for all output, which must exist.
        port: Local port on which the parent process listens.
    """
    return ("-c", _ENTRY + _MAIN, str(exchange), str(log), str(port))


def write_request(exchange: Path, job: Job) -> None:
    """Write the request of the training processes."""
    content = {
        "bundle": str(job.bundle.root),
        "config_files": [str(path) for path in job.config_files],
        "config": job.config,
        "overrides": job.overrides,
        "settings": job.settings,
        "trusted": job.trusted,
        "strict": job.strict,
    }
    (exchange / _REQUEST).write_text(json.dumps(content), encoding="utf-8")


def read_warnings_of(exchange: Path) -> list[list[CaseWarning]]:
    """Return the warnings of each process except the first, whose warnings are in the manifest."""
    files = sorted(exchange.glob("warnings_*.json"))
    return [read_warnings(json.loads(file.read_text(encoding="utf-8"))) for file in files]


def main() -> None:
    """Train as requested, and write a record of an exception."""
    exchange, port = Path(sys.argv[1]), int(sys.argv[3])
    threading.Thread(target=_end_with_parent, args=(port,), daemon=True).start()
    code = 0
    try:
        _work(_read_request(exchange), exchange)
    except BaseException as error:
        traceback.print_exc()
        note = note_of(error)
        note.write(Path(os.environ[NOTE]))
        code = note.exit_code or 1
    # Threads of a broken connection could block a regular exit.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _work(job: Job, exchange: Path) -> None:
    rank = int(os.environ["RANK"])
    if rank == 0:
        with (exchange / PROGRESS).open("a", encoding="utf-8", buffering=1) as file:
            runner.train(job, report=lambda *state: print(json.dumps(state), file=file))
    else:
        with collect(strict=job.strict) as warnings:
            try:
                workflow = open_workflow(job, "train")
                workflow.initialize()
                workflow.run()
            finally:
                content = json.dumps([warning.to_dict() for warning in warnings])
                (exchange / f"warnings_{rank}.json").write_text(content, encoding="utf-8")
    from medseg.training.distributed import stop_processes

    stop_processes()


def _read_request(exchange: Path) -> Job:
    content = json.loads((exchange / _REQUEST).read_text(encoding="utf-8"))
    return Job(
        command="train",
        bundle=Bundle(Path(content["bundle"])),
        config_files=tuple(Path(path) for path in content["config_files"]),
        config=content["config"],
        overrides=content["overrides"],
        settings=tuple(content["settings"]),
        trusted=content["trusted"],
        strict=content["strict"],
    )


def _end_with_parent(port: int) -> None:
    # The parent never accepts or writes; recv returns when the connection closes.
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as lifeline:
        lifeline.recv(1)
    os._exit(1)
