"""The machine's facts, and what is left of them on systems without `/proc` and `resource`."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import medseg
from medseg import machine
from medseg.bundle.catalog import Bundle


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A system without `/proc`, control groups, `resource` and affinity, like Windows."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name == "resource":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(machine, "_PROC", tmp_path / "no_proc")
    monkeypatch.setattr(machine, "_PS", str(tmp_path / "no_ps"))
    monkeypatch.setattr(machine, "_CONTAINER_FILES", ())
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "resource", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)


def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5}, raising=False)
    assert machine.core_count() == 2


@pytest.mark.parametrize(("system", "factor"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_is_in_bytes_on_each_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, factor: int
) -> None:
    resource = pytest.importorskip("resource")

    class Usage:
        ru_maxrss = 1000

    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(resource, "getrusage", lambda who: Usage)
    monkeypatch.setattr(machine.sys, "platform", system)
    assert machine.peak_bytes() == 1000 * factor


def test_without_proc_the_memory_is_what_ps_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path(machine._PS).exists():
        pytest.skip(f"needs {machine._PS}")
    expected = machine.resident_bytes()
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    assert machine.resident_bytes() == pytest.approx(expected, rel=0.2)


def test_the_peak_counts_from_where_it_was_forgotten() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux resets the peak of a process")
    large = bytearray(64 << 20)
    del large
    machine.forget_peak()
    assert machine.peak_bytes() < machine.resident_bytes() + (32 << 20)


def test_a_container_with_less_than_the_machine_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "max").write_text("5000")
    (tmp_path / "current").write_text("1000")
    monkeypatch.setattr(machine, "_CONTAINER_FILES", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert machine.available_bytes() == 4000
    (tmp_path / "max").write_text("max")
    assert machine.available_bytes() > 4000


@pytest.mark.usefixtures("elsewhere")
def test_every_question_has_an_answer_elsewhere() -> None:
    assert machine.core_count() == os.cpu_count()
    assert machine.cpu_name()
    assert machine.available_bytes() > 0
    assert machine.resident_bytes() == machine.peak_bytes() == 0
    machine.forget_peak()


@pytest.mark.usefixtures("elsewhere")
def test_predict_evaluate_and_train_run_elsewhere(trained_copy: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    predicted = medseg.predict(
        trained_copy.root, tiny_data / "imagesTr", tmp_path / "out", settings={"max_memory": "8G"}
    )
    assert predicted.counts["failed"] == 0
    assert predicted.peak_memory["host_bytes"] is None
    assert medseg.evaluate(trained_copy.root, tiny_data, output=tmp_path / "scores").counts["failed"] == 0
    short = {"max_epochs": 1, "val_interval": 1, "pictures": 0}
    trained = medseg.train(trained_copy.root, tiny_data, output=tmp_path / "copy", settings=short)
    assert trained.status == "done"
