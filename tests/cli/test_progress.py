"""Progress: something at once, the time elapsed, and the time left of what is counted now."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from medseg.cli import console
from medseg.cli import progress as progress_module
from medseg.cli.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose first entry is the time."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress_module, "_SECONDS_BEFORE_LOADING", 60)
    monkeypatch.setattr(console.stderr, "is_interactive", False)
    console.reset()
    return now


def test_the_time_left_starts_anew_with_what_is_counted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("") as report:
        for done in (0.0, 1.0, 2.0):
            report(done, 4, "epochs")
            clock[0] += 60
        report(1.0, 30, "cases")
        clock[0] += 60
        report(2.0, 30, "cases")
    assert capsys.readouterr().err.splitlines() == [
        "1.0/4 epochs, elapsed 1:00, 3:00 left",
        "2.0/4 epochs, elapsed 2:00, 2:00 left",
        "1.0/30 cases, elapsed 3:00",
        "2.0/30 cases, elapsed 4:00, 28:00 left",
    ]


def test_a_unit_stands_before_the_note(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("epochs") as report:
        report(0.0, 4, "")
        clock[0] += 30
        report(0.5, 4, "loss 0.1")
    assert capsys.readouterr().err.splitlines() == ["0.5/4 epochs, loss 0.1, elapsed 0:30, 3:30 left"]


def test_long_times_are_hours_minutes_and_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("epochs") as report:
        report(0.0, 100, "")
        clock[0] += 3725
        report(50.0, 100, "")
    assert "elapsed 1:02:05, 1:02:05 left" in capsys.readouterr().err


def test_lines_come_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("cases") as report:
        for done in range(100):
            report(done, 100, "")
            clock[0] += 1
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_progress_in_a_log_shows_signs_that_steer_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("images") as report:
        clock[0] += 30
        report(0.5, 4, "a\x1b[2J.nii")
    assert "a\\x1b[2J.nii" in capsys.readouterr().err


def test_as_json_each_line_is_an_object(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    console.verbosity.as_json = True
    with progress("cases") as report:
        report(0.0, 4, "a.nii")
        clock[0] += 30
        report(1.0, 4, "b\x1b.nii")
    console.reset()
    found = json.loads(capsys.readouterr().err)
    assert {name: found[name] for name in ("level", "event", "done", "total", "unit", "note")} == {
        **{"level": "info", "event": "progress", "done": 1.0, "total": 4},
        **{"unit": "cases", "note": "b\x1b.nii"},
    }
    assert (found["elapsed_seconds"], found["seconds_left"]) == (30, 90)


@pytest.mark.parametrize("as_json", [False, True])
def test_something_is_printed_while_nothing_is_known_yet(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    monkeypatch.setattr(progress_module, "_SECONDS_BEFORE_LOADING", 0)
    console.verbosity.as_json = as_json
    with progress("cases"):
        progress_module.time.sleep(0.5)
    console.reset()
    printed = capsys.readouterr().err
    assert (json.loads(printed)["note"] if as_json else printed.strip()) == "loading ..."


def test_an_error_at_once_stands_alone(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="fault"), progress("cases"):
        raise ValueError("fault")
    assert capsys.readouterr().err == ""


def test_quiet_prints_no_progress(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    console.verbosity.quiet = True
    with progress("cases") as report:
        clock[0] += 30
        report(1.0, 4, "a.nii")
    console.reset()
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    console.reset()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console.stderr, "_force_terminal", True)
    monkeypatch.setattr(console.stderr, "is_interactive", True)
    monkeypatch.setattr(console.stderr, "_width", 80)


def test_a_terminal_of_80_columns_shows_everything(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    note = "a_long_name_of_a_case_" * 5
    with progress("images") as report:
        assert "loading ..." in capsys.readouterr().err
        report(3.0, 12, note)
    shown = capsys.readouterr().err
    assert "25% 3/12 images elapsed 0:00" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert note in "".join(shown.split("\n"))
    assert not shown.endswith(ERASED)


# How rich takes a line away: up, and cleared to its end.
ERASED = "\x1b[1A\x1b[2K"


def test_a_terminal_keeps_no_bar_that_says_nothing(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(""):
        pass
    assert capsys.readouterr().err.endswith(ERASED)


def test_a_terminal_keeps_the_error_alone(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(report: Callable[..., None]) -> None:
        report(3.0, 12, "a.nii")
        raise ValueError("fault")

    with pytest.raises(ValueError, match="fault"), progress("images") as report:
        fail(report)
    assert capsys.readouterr().err.endswith(ERASED)
