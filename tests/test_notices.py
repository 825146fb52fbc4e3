"""Warnings: kept where they belong, logged once, raised as errors in strict mode."""

from __future__ import annotations

import ast
import json
import logging
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import medseg
from medseg.errors import CaseError, RequestError
from medseg.manifest import CaseRecord, Manifest
from medseg.notices import CODES, CaseWarning, carry, collect, forward, summarize, warn

PACKAGE = Path(medseg.__file__).parent
logger = logging.getLogger("medseg.test")


def spacing(path: object = "", *, run: bool = False) -> None:
    warn(logger, "spacing-assumed", "1 mm is assumed", path, run=run)


def test_without_a_run_a_warning_is_logged(caplog):
    spacing("folder/a.nii.gz")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == (
        "medseg.test",
        "WARNING",
        "a.nii.gz: 1 mm is assumed",
    )


def test_each_warning_of_a_case_counts_and_is_logged_once(caplog):
    with collect("a") as found:
        spacing("a.nii.gz")
        spacing("other/a.nii.gz")
        spacing("b.nii.gz")
    assert [warning.file for warning in found] == ["a.nii.gz", "b.nii.gz"]
    assert len(caplog.records) == 2


def test_a_warning_about_the_run_goes_to_the_run(caplog):
    with collect() as run, collect("a") as case:
        spacing(run=True)
        warn(logger, "gpu-fallback", "less memory")
    assert [warning.code for warning in run] == ["spacing-assumed"]
    assert [warning.code for warning in case] == ["gpu-fallback"]
    assert [record.case for record in caplog.records] == ["", "a"]


def test_strict_mode_raises_and_still_keeps_the_warning():
    with collect("a", strict=True) as found:
        with pytest.raises(CaseError, match=r"^a\.nii: 1 mm is assumed\. Strict mode treats .*spacing-assumed"):
            spacing("x/a.nii")
        with pytest.raises(RequestError, match=r"^1 mm is assumed\. Strict mode"):
            spacing(run=True)
    assert len(found) == 2


def test_strict_mode_holds_in_the_cases_of_a_run_and_in_its_threads():
    with collect(strict=True), collect("a"), ThreadPoolExecutor(1) as pool:
        pool.submit(spacing).result()
        with pytest.raises(CaseError):
            pool.submit(carry(spacing)).result()
        with collect(deferred=True) as found:
            spacing("a.nii")
        with pytest.raises(CaseError):
            forward(found)


def test_a_function_carried_into_a_thread_reports_to_the_case_that_called_it():
    with ThreadPoolExecutor(2) as pool, collect("a") as first:
        report = carry(spacing)
        with collect("b") as second:
            list(pool.map(report, ["1.nii", "2.nii"]))
    assert [sorted(warning.file for warning in found) for found in (first, second)] == [["1.nii", "2.nii"], []]


def test_deferred_warnings_are_silent_until_they_are_forwarded(caplog):
    with collect() as run, collect("a") as case:
        with collect(deferred=True) as found:
            spacing("a.nii")
            spacing(run=True)
        assert (case, run, caplog.records) == ([], [], [])
        forward(found)
        forward(found)
    assert ([str(warning) for warning in case], [str(warning) for warning in run]) == (
        ["a.nii: 1 mm is assumed"],
        ["1 mm is assumed"],
    )
    assert len(caplog.records) == 2


def _in_a_process(name: str) -> list[CaseWarning]:
    with collect(deferred=True) as found:
        spacing(name)
    return found


def test_warnings_come_back_from_a_spawned_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_in_a_process, ("a.nii",))
    assert found == [CaseWarning("spacing-assumed", "1 mm is assumed", "a.nii")]


def test_the_summary_has_each_code_once_with_counts_and_first_names():
    pairs = [(name, CaseWarning("spacing-assumed", f"text of {name}", "x.nii")) for name in "abcde"]
    pairs += [("", CaseWarning("gpu-fallback", "less memory"))] * 2
    pairs += [("", CaseWarning("cache-damaged", "prepared again", "c.pt"))]
    assert summarize(pairs) == [
        "text of a (5 cases: a, b, c and 2 more) [spacing-assumed]",
        "less memory (2 times) [gpu-fallback]",
        "prepared again (1 file: c.pt) [cache-damaged]",
    ]


def test_the_manifest_holds_the_warnings_of_run_and_cases(tmp_path):
    path = tmp_path / "manifest.json"
    with Manifest("predict", path=path) as manifest:
        spacing("early.pt")
        with manifest.case("a"):
            spacing("folder/a.nii")
        with manifest.case("b"):
            spacing(run=True)
    content = json.loads(path.read_text())
    assert content["warnings"] == [
        {"code": "spacing-assumed", "text": "1 mm is assumed", "file": "early.pt"},
        {"code": "spacing-assumed", "text": "1 mm is assumed", "file": ""},
    ]
    assert content["cases"][0]["warnings"] == [{"code": "spacing-assumed", "text": "1 mm is assumed", "file": "a.nii"}]
    assert content["cases"][1]["warnings"] == []
    read = Manifest.read(path)
    assert read.warnings == manifest.warnings
    assert read.cases["a"].warnings == manifest.cases["a"].warnings


def test_a_manifest_from_before_there_were_warnings_is_read(tmp_path):
    path = tmp_path / "manifest.json"
    with Manifest("predict", path=path) as manifest, manifest.case("a"):
        spacing()
    content = json.loads(path.read_text())
    del content["warnings"], content["cases"][0]["warnings"]
    path.write_text(json.dumps(content))
    assert Manifest.read(path).cases["a"].warnings == Manifest.read(path).warnings == []


def test_a_strict_run_fails_the_case_and_goes_on(tmp_path):
    with Manifest("predict", path=tmp_path / "manifest.json", strict=True) as manifest:
        with manifest.case("a") as record:
            record.output = "a.nii"
            spacing("a.nii")
        with manifest.case("b"):
            pass
    assert [manifest.cases[name].status for name in "ab"] == ["failed", "done"]
    assert "spacing-assumed" in str(manifest.cases["a"].error)
    assert manifest.cases["a"].output is None
    assert len(manifest.cases["a"].warnings) == 1


def test_a_strict_run_ends_with_a_warning_about_itself(tmp_path):
    path = tmp_path / "manifest.json"
    with pytest.raises(RequestError, match="spacing-assumed"), Manifest("train", path=path, strict=True):
        spacing(run=True)
    assert json.loads(path.read_text())["status"] == "aborted"


def test_a_strict_run_takes_over_no_case_with_warnings(tmp_path):
    path = tmp_path / "manifest.json"
    with Manifest("predict", path=path) as manifest:
        manifest.add_case(CaseRecord("a", output="a.nii", warnings=[CaseWarning("spacing-assumed", "1 mm")]))
        manifest.add_case(CaseRecord("b", output="b.nii"))
    assert Manifest("predict", path=path).resume() == {"a", "b"}
    assert Manifest("predict", path=path, strict=True).resume() == {"b"}


def _calls() -> list[tuple[str, ast.Call]]:
    return [
        (path.relative_to(PACKAGE).as_posix(), node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def test_every_warning_of_the_package_has_a_listed_code_and_every_code_is_used():
    used = set()
    for _, call in _calls():
        if isinstance(call.func, ast.Name) and call.func.id == "warn":
            code = call.args[1]
            assert isinstance(code, ast.Constant), ast.unparse(call)
            used.add(code.value)
    assert used == set(CODES)
    assert list(CODES) == sorted(CODES)


def test_nothing_warns_past_the_records():
    # The log of the label app is its operator's.
    past = [
        f"{path}: {ast.unparse(call)}"
        for path, call in _calls()
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in ("warn", "warning")
        and not path.startswith("label/")
        and path != "notices.py"
    ]
    assert past == []
