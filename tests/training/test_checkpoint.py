"""The files of a run: whole, checked, and with one before the last."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.errors import WeightsError
from medseg.files import sha256_file
from medseg.training.checkpoint import RunFiles, save_tensors


def _state(number: int) -> dict[str, Any]:
    return {"network": {"weight": torch.full((100,), float(number))}, "number": number}


def _saved(folder: Path, count: int) -> RunFiles:
    files = RunFiles(folder)
    for number in range(count):
        files.save(_state(number))
    return files


def _tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    path.write_bytes(content)


def test_the_last_state_and_the_one_before_are_kept_with_their_hashes(tmp_path: Path) -> None:
    files = _saved(tmp_path, 3)
    assert files.load()[0]["number"] == 2
    assert torch.load(files.previous, weights_only=True)["number"] == 1
    assert json.loads(files.list.read_text())["sha256"] == [sha256_file(files.last), sha256_file(files.previous)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.json", "last.pt", "previous.pt"]


@pytest.mark.parametrize("damage", [_tear, _alter, Path.unlink])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, damage: Any) -> None:
    files = _saved(tmp_path, 3)
    damage(files.last)
    state, path = RunFiles(tmp_path).load()
    assert state["number"] == 1
    assert path == files.previous
    # and saving does not put the damaged one in place of the good one
    again = RunFiles(tmp_path)
    again.save(_state(9))
    _tear(again.last)
    assert RunFiles(tmp_path).load()[0]["number"] == 1


def test_a_damaged_state_and_the_use_of_the_one_before_are_warnings_about_the_run(
    tmp_path: Path, assert_warns: Any
) -> None:
    files = _saved(tmp_path, 2)
    _tear(files.last)
    assert_warns(lambda: RunFiles(tmp_path).load(), "checkpoint-damaged", run=True)
    files.last.unlink()
    assert_warns(lambda: RunFiles(tmp_path).load(), "checkpoint-previous", run=True)


@pytest.mark.parametrize("damage", [_tear, _alter])
def test_two_damaged_states_are_refused(tmp_path: Path, damage: Any) -> None:
    files = _saved(tmp_path, 2)
    damage(files.last)
    damage(files.previous)
    with pytest.raises(WeightsError, match=r"incomplete or was modified.*Start again without resume"):
        RunFiles(tmp_path).load()


def test_a_state_that_was_never_noted_is_refused(tmp_path: Path) -> None:
    torch.save(_state(1), tmp_path / "last.pt")
    with pytest.raises(WeightsError, match="incomplete or was modified"):
        RunFiles(tmp_path).load()


def test_a_noted_state_that_holds_a_program_is_refused(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> Any:
            return (print, ("ran",))

    torch.save({"x": Program()}, tmp_path / "last.pt")
    (tmp_path / "last.json").write_text(json.dumps({"sha256": [sha256_file(tmp_path / "last.pt")]}))
    with pytest.raises(WeightsError, match="unreadable file"):
        RunFiles(tmp_path).load()


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nothing to resume"):
        RunFiles(tmp_path).load()


@pytest.mark.parametrize("moment", range(1, 5))
def test_at_every_moment_of_saving_a_state_can_be_loaded(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Death(BaseException):
        pass

    _saved(tmp_path, 2)
    renames = iter(range(1, moment))
    original = Path.replace

    def replace(path: Path, target: Any) -> Path:
        if next(renames, None) is None:
            raise Death
        return original(path, target)

    for attempt in range(3):  # even when it dies in the same place again and again
        with monkeypatch.context() as patched:
            renames = iter(range(1, moment))
            patched.setattr(Path, "replace", replace)
            files = RunFiles(tmp_path)
            with suppress(Death):
                files.save(_state(10 + attempt))
        assert RunFiles(tmp_path).load()[0]["number"] >= 1


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    for name in (".partial-1-last.pt", ".partial-1-last.json", ".partial-1-other.txt"):
        (tmp_path / name).write_bytes(b"half")
    _saved(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.glob(".partial*")) == [".partial-1-other.txt"]


def test_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        save_tensors({"weight": torch.arange(5.0)}, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
