"""What an exception or an exit code tells: cause, case, advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from monai.utils import instantiate

from medseg.errors import CaseError, RequestError
from medseg.jobs import exit_diagnosis
from medseg.jobs.exit_diagnosis import Note, case_of, describe_exit, explain, note_of


def _raised(action: Any) -> BaseException:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def _transform(case: dict[str, Any]) -> None:
    raise ValueError("no such axis")


def _dataset() -> None:
    case = {"image": "scan.nii.gz", "name": "scan_3.nii.gz"}
    _transform(case)


def _engine() -> None:
    other = {"image": 1, "name": "an engine that names itself"}
    try:
        _dataset()
    except ValueError as error:
        raise RuntimeError(f"applying transform to {len(other)} entries") from error


def test_the_case_is_found_in_the_innermost_function_that_has_one() -> None:
    assert case_of(_raised(_engine)) == "scan_3.nii.gz"
    assert case_of(_raised(lambda: int("x"))) == ""


def test_a_note_survives_its_file(tmp_path: Path) -> None:
    note = note_of(_raised(_engine))
    note.write(tmp_path / "note.json")
    assert Note.read(tmp_path / "note.json") == note
    assert Note.read(tmp_path / "none.json") is None
    (tmp_path / "torn.json").write_text('{"time": 1')
    assert Note.read(tmp_path / "torn.json") is None
    assert (note.kind, note.message, note.exit_code) == ("RuntimeError", "applying transform to 2 entries", 0)
    assert note.place.startswith("test_exit_diagnosis.py:")


def test_what_fails_within_a_part_of_a_config_is_told_without_monais_wrapper() -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser({"part": {"_target_": "datetime.timedelta", "days": "many"}})
    note = note_of(_raised(lambda: parser.get_parsed_content("part")))
    assert note.kind == "TypeError"
    assert "timedelta" in note.message


@pytest.mark.parametrize(("kind", "code"), [(RequestError, 2), (CaseError, 1)])
def test_an_error_of_ours_speaks_for_itself_even_when_wrapped(kind: Any, code: int) -> None:
    def wrap() -> None:
        try:
            raise kind("the file is empty")
        except kind as error:
            raise RuntimeError("engine failed") from error

    note = note_of(_raised(wrap))
    assert (note.message, note.exit_code) == ("the file is empty", code)
    assert type(note.error()) is kind
    raised = explain(_raised(wrap))
    assert isinstance(raised, kind)
    assert str(raised) == "the file is empty"


@pytest.mark.parametrize(
    ("error", "advice", "connection"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "batch_size", False),
        (ConnectionResetError(104, "Connection reset by peer"), "", True),
        (ValueError("Invalid learning rate: -1.0"), "", False),
    ],
)
def test_the_cause_is_told_and_not_the_part_of_the_config_that_met_it(
    error: Exception, advice: str, connection: bool
) -> None:
    def fail(*, engine: int) -> None:
        raise error

    note = note_of(_raised(lambda: instantiate(lambda **_: instantiate(fail, "default", engine=1), "default", value=1)))
    assert note.message == str(error)
    assert note.kind == type(error).__name__
    assert advice in note.advice
    assert bool(note.advice) == bool(advice)
    assert note.connection is connection


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (MemoryError(), "use less memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "cache_memory=0"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "batch_size"),
        (OSError(28, "No space left on device"), "free disk space"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (ValueError("something else"), ""),
    ],
)
def test_exceptions_lead_to_advice(error: BaseException, advice: str) -> None:
    found = note_of(error).advice
    assert advice in found
    assert bool(found) == bool(advice)


@pytest.mark.parametrize(
    ("error", "connection"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (CaseError("scan.nii.gz: Connection closed by peer"), False),
    ],
)
def test_a_broken_connection_is_known_as_a_consequence(error: BaseException, connection: bool) -> None:
    assert note_of(error).connection is connection


def test_exit_codes_in_words() -> None:
    assert describe_exit(3)[0] == "ended with exit code 3 and without a message"
    assert describe_exit(-4)[0].startswith("was killed by SIGILL, because a library uses an instruction")
    assert describe_exit(-63)[0].startswith("was killed by")
    assert "container or job ran out" in describe_exit(-9, out_of_memory=True)[0]


@pytest.mark.parametrize(("text", "count"), [("low 0\noom 2\noom_kill 5\n", 5), ("low 0\n", 0), (None, 0)])
def test_kills_for_memory_are_counted_where_the_system_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, count: int
) -> None:
    path = tmp_path / "memory.events"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(exit_diagnosis, "_MEMORY_EVENTS", (path,))
    assert exit_diagnosis.memory_kills() == count
