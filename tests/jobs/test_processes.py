"""Processes that run together: how each ended, what is stopped, and what is left alone."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medseg.jobs import processes
from medseg.jobs.processes import Exit, run_together


def _run(*codes: str, grace: float = 0.0, tick: Any = lambda: None) -> list[Exit]:
    environments = [{"NUMBER": str(rank)} for rank in range(len(codes))]
    return run_together([("-c", code) for code in codes], environments, tick=tick, grace=grace)


def test_every_end_is_told_and_the_environment_given() -> None:
    code = "import os; os._exit(int(os.environ['NUMBER']) * 3)"
    assert _run(code, code, code, grace=20) == [Exit(0, 0, False), Exit(1, 3, False), Exit(2, 6, False)]


def test_those_that_do_not_end_within_the_grace_are_stopped() -> None:
    started = time.monotonic()
    late = "import time; time.sleep(0.5); raise SystemExit(4)"
    exits = _run("raise SystemExit(1)", late, "import time; time.sleep(60)", grace=5)
    assert exits == [Exit(0, 1, False), Exit(1, 4, False), Exit(2, -signal.SIGTERM, True)]
    assert time.monotonic() - started < 25


def test_one_that_does_not_heed_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "_STOP", 1)
    ready = tmp_path / "ready"
    deaf = (
        f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(60)"
    )
    wait = f"import os, time\nwhile not os.path.exists({str(ready)!r}): time.sleep(0.05)\nraise SystemExit(1)"
    assert _run(wait, deaf) == [Exit(0, 1, False), Exit(1, -signal.SIGKILL, True)]


def test_what_a_dead_process_has_started_is_ended(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(file)!r}, "w").write(str(child.pid))
os.kill(os.getpid(), 9)
"""
    assert _run(code) == [Exit(0, -signal.SIGKILL, False)]
    until = time.monotonic() + 20
    while _is_running(int(file.read_text())):
        assert time.monotonic() < until
        time.sleep(0.05)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_an_interruption_stops_all_and_passes_on() -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _run("import time; time.sleep(60)", tick=interrupt)
    assert time.monotonic() - started < 20


def test_the_signal_handlers_of_the_program_stay() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    _run("pass")
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_interruption_while_they_start_is_one_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(context: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(processes.SubprocessContext, "_start", start)
    with pytest.raises(KeyboardInterrupt):
        _run("pass")


def test_torch_says_nothing_of_what_it_stops(capfd: pytest.CaptureFixture[str]) -> None:
    _run("raise SystemExit(1)", "import time; time.sleep(60)")
    assert capfd.readouterr() == ("", "")


def test_this_python_is_run(tmp_path: Path) -> None:
    file = tmp_path / "executable"
    _run(f"import sys; open({str(file)!r}, 'w').write(sys.executable)")
    assert file.read_text() == sys.executable
