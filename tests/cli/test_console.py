"""Standard output for results, standard error for messages, as text or JSON; nothing steers the terminal."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.table import Table

from medseg.cli import console
from medseg.cli.log import show_debug_log, warnings_at_the_end
from medseg.errors import CaseError, OutputError


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    console.reset()
    yield
    console.reset()


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


def test_what_a_stream_cannot_encode_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    console.reset()
    console.output.print("\u6f22\u5b57.nii.gz")
    sys.stdout.flush()
    assert written.getvalue() == b"??.nii.gz\n"


def test_quiet_leaves_errors_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    console.verbosity.quiet = True
    console.notes.print("note")
    console.alerts.print("warning: 1 mm is assumed")
    console.errors.print("failed: a")
    console.output.print("1 mask")
    assert capsys.readouterr() == ("1 mask\n", "failed: a\n")


def test_long_messages_stay_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.errors.print("word " * 60 + "end")
    assert capsys.readouterr().err.count("\n") == 1


def test_messages_as_json_are_one_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.verbosity.as_json = True
    console.notes.print("two\nlines")
    console.alerts.print("warning: 1 mm is assumed [spacing-assumed]")
    console.print_error(CaseError("no file '[x]'", path="a.nii", found=2))
    note, warning, error = map(json.loads, capsys.readouterr().err.splitlines())
    assert (note["level"], note["event"], note["message"]) == ("info", "message", "two\nlines")
    assert (warning["level"], warning["message"]) == ("warning", "1 mm is assumed [spacing-assumed]")
    assert (error["level"], error["event"], error["message"]) == ("error", "error", "no file '[x]'")
    assert (error["path"], error["data"]) == ("a.nii", {"found": 2})


def test_an_error_begins_with_the_fault_and_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(CaseError("no file '[red]x'"))
    assert capsys.readouterr().err == "Error: no file '[red]x'\n"


def test_the_debug_log_is_that_of_medseg_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_at_the_end():
        show_debug_log()
        logging.getLogger("medseg.io").debug("reading %s", "a.nii")
        logging.getLogger("medseg.io").warning("1 mm is assumed")
        logging.getLogger("monai").warning("chatter")
    assert capsys.readouterr().err.splitlines() == ["medseg.io: reading a.nii", "warning: 1 mm is assumed [other]"]
    logging.getLogger("medseg.io").debug("no more")
    assert capsys.readouterr().err == ""


def test_json_goes_to_a_file_or_is_all_of_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"name": "Zürich\u202e", "dice": 0.5}
    console.reserve_stdout(None)
    console.output.print("table")
    console.write_json(content, str(tmp_path / "a.json"))
    console.write_json(content, None)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == content
    assert capsys.readouterr().out == "table\n"
    console.reserve_stdout("-")
    console.output.print("table")
    console.write_json(content, "-")
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed) == content


def test_json_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        console.write_json({}, str(tmp_path / "file" / "a.json"))
