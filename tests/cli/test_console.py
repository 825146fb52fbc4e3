"""Progress for logs: the time left is that of what is counted now."""

from __future__ import annotations

import pytest
from rich.table import Table

from medseg.cli import console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose first entry is the time."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.errors, "_force_terminal", False)
    return now


def test_the_time_left_starts_anew_with_what_is_counted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("") as report:
        for done in (0.0, 1.0, 2.0):
            report(done, 4, "epochs")
            clock[0] += 60
        report(1.0, 30, "cases")
        clock[0] += 60
        report(2.0, 30, "cases")
    assert capsys.readouterr().err.splitlines() == [
        "1.0/4 epochs, about 3.0 min left",
        "2.0/4 epochs, about 2.0 min left",
        "1.0/30 cases",
        "2.0/30 cases, about 28.0 min left",
    ]


def test_a_unit_stands_before_the_note(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("epochs") as report:
        report(0.0, 4, "")
        clock[0] += 30
        report(0.5, 4, "loss 0.1")
    assert capsys.readouterr().err == "0.5/4 epochs, loss 0.1, about 3.5 min left\n"


def test_signs_that_steer_a_terminal_are_shown_and_markup_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", title="t\x1b[31mitle")
    table.add_row("[/red]a\x1b]0;owned\x07b\u202e")
    shown = console.PlainConsole(width=80)
    shown.print(table)
    shown.print("[/red]\rx\x9b")
    printed = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07b\\u202e" in printed
    assert "[/red]\\rx\\x9b" in printed
    assert "t\\x1b[31mitle" in printed
    assert printed.replace("\n", "").isprintable()


def test_progress_in_a_log_shows_signs_that_steer_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("images") as report:
        clock[0] += 30
        report(0.5, 4, "a\x1b[2J.nii")
    assert "a\\x1b[2J.nii" in capsys.readouterr().err
