"""The run manifest: complete, valid at every moment, free of what it must not tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from medseg import manifest as manifest_module
from medseg.errors import CaseError, OutputError, RequestError, SizeError
from medseg.files import stamp
from medseg.manifest import BundleRecord, CaseRecord, Manifest

BUNDLE = BundleRecord("liver_ct_unet", "1.2.0", "c" * 64, "d" * 64)
FIELDS = [
    "manifest_version", "command", "status", "started", "finished", "error", "arguments", "bundle", "knobs",
    "overrides", "seeds", "device", "software", "machine", "notes", "warnings", "stages", "validations", "peak_memory",
    "counts", "cases",
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "manifest.json"


def stored(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_a_run_is_recorded_with_its_cases(path):
    with Manifest("predict", bundle=BUNDLE, knobs={"overlap": 0.5}, seeds={"torch": 3}, path=path) as manifest:
        with manifest.case("b") as record:
            record.output = "b.nii.gz"
            record.metrics["dice"] = 0.9
        with manifest.case("a") as record:
            record.status = "skipped"
    content = stored(path)
    assert list(content) == FIELDS
    assert content["status"] == "done"
    assert content["bundle"]["config_sha256"] == "c" * 64
    assert content["counts"] == {"done": 1, "failed": 0, "skipped": 1}
    assert [case["name"] for case in content["cases"]] == ["a", "b"]
    assert content["cases"][1]["metrics"] == {"dice": 0.9}
    assert content["started"] <= content["finished"]
    assert content["started"].endswith("Z")


def test_a_manifest_from_before_there_were_notes_is_read(path):
    with Manifest("predict", notes=["said"], path=path):
        pass
    assert Manifest.read(path).notes == ["said"]
    content = stored(path)
    del content["notes"]
    path.write_text(json.dumps(content))
    assert Manifest.read(path).notes == []


def test_a_case_error_fails_the_case_and_the_next_one_goes_on(path):
    with Manifest("predict", path=path) as manifest:
        with manifest.case("bad") as record:
            record.output = "bad.nii.gz"
            raise CaseError("bad.nii.gz has no voxels")
        assert record.status == "failed"
        with manifest.case("good"):
            pass
    bad, good = stored(path)["cases"]
    assert (bad["status"], bad["error"], bad["output"]) == ("failed", "bad.nii.gz has no voxels", None)
    assert good["status"] == "done"
    assert stored(path)["status"] == "partial"
    assert manifest.exit_code == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (SizeError("size 7"), "size 7"),
        (OutputError("disk full"), "disk full"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_any_other_exception_is_recorded_and_raised_again(path, error, message):
    with pytest.raises(type(error)), Manifest("predict", path=path) as manifest, manifest.case("x"):
        raise error
    content = stored(path)
    assert content["status"] == "aborted"
    assert content["error"] == message
    assert content["cases"][0]["status"] == "failed"
    assert content["cases"][0]["error"] == message


def test_the_file_is_valid_and_up_to_date_after_each_case(path):
    with Manifest("predict", path=path) as manifest:
        assert stored(path)["status"] == "running"
        for count, name in enumerate("abc", start=1):
            with manifest.case(name):
                assert stored(path)["counts"]["done"] == count - 1
            assert stored(path)["counts"]["done"] == count
            assert stored(path)["finished"] is None
    assert [entry.name for entry in path.parent.iterdir()] == ["manifest.json"]


def test_a_killed_run_leaves_its_finished_cases(path):
    code = f"""
import os
from medseg.manifest import Manifest
with Manifest("predict", path={str(path)!r}) as manifest:
    with manifest.case("first") as record:
        record.output = "first.nii.gz"
    with manifest.case("second"):
        os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    left = Manifest.read(path)
    assert left.status == "running"
    assert left.is_done("first")
    assert not left.is_done("second")


def test_seconds_are_measured_for_cases_and_stages(monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 21.0, 30.0, 30.25])
    monkeypatch.setattr(manifest_module.time, "perf_counter", lambda: next(clock))
    manifest = Manifest("predict")
    with manifest.case("a"):
        pass
    for _ in range(2):
        with manifest.stage("load"):
            pass
    assert manifest.to_dict()["cases"][0]["seconds"] == 2.5
    assert manifest.to_dict()["stages"] == {"load": 1.25}


def test_validations_of_a_training_are_kept_in_order(path):
    with Manifest("train", path=path) as manifest:
        for epoch, dice in ((1, 0.5), (2, 0.4)):
            manifest.add_validation(epoch, {"dice": dice})
            assert stored(path)["validations"][-1] == {"epoch": epoch, "dice": dice}
    assert [entry["epoch"] for entry in stored(path)["validations"]] == [1, 2]


def test_a_stage_that_fails_is_still_timed():
    manifest = Manifest("predict")
    with pytest.raises(ValueError, match="boom"), manifest.stage("load"):
        raise ValueError("boom")
    assert manifest.stages["load"] >= 0


def test_reading_gives_back_what_was_written(path):
    manifest = Manifest("evaluate", bundle=BUNDLE, arguments=["input"], overrides=["overlap"], device="cpu")
    manifest.add_case(CaseRecord("a", metrics={"dice": 0.5}, output="a.nii.gz"))
    manifest.add_validation(3, {"dice": 0.25})
    manifest.write(path)
    again = Manifest.read(path)
    assert again.to_dict() == stored(path)
    assert again.cases["a"] == CaseRecord("a", metrics={"dice": 0.5}, output="a.nii.gz")
    assert again.path is None


def test_rewriting_a_manifest_that_was_read_does_not_change_it(path, tmp_path):
    Manifest("train", bundle=BUNDLE).write(path)
    content = stored(path)
    content["peak_memory"] = {"host_bytes": 5, "device_bytes": 6}
    content["machine"]["threads"] = 77
    path.write_text(json.dumps(content))
    copy = Manifest.read(path).write(tmp_path / "copy.json")
    assert stored(copy) == content


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_what_is_no_finite_number_becomes_null(path, value):
    manifest = Manifest("evaluate")
    manifest.add_case(CaseRecord("a", metrics={"hd95": value}))
    manifest.add_validation(1, {"dice": value})
    manifest.write(path)
    assert stored(path)["cases"][0]["metrics"] == {"hd95": None}
    assert stored(path)["validations"] == [{"epoch": 1, "dice": None}]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        ((1.5, 1.5, 3.0), [1.5, 1.5, 3.0]),
        ({"b": 1, 2: None}, {"b": 1, "2": None}),
        (PurePosixPath("/data/Miller_Jane/scan"), "scan"),
        ("/data/Miller_Jane/scan", "scan"),
        (["/data/Miller_Jane/a.nii", "b/c.nii"], ["a.nii", "b/c.nii"]),
        ("cosine", "cosine"),
        (1 + 2j, "(1+2j)"),
    ],
)
def test_knobs_are_written_as_plain_values_without_folders(path, value, plain):
    Manifest("predict", knobs={"knob": value}).write(path)
    assert stored(path)["knobs"] == {"knob": plain}


def test_knobs_metrics_and_names_come_in_a_stable_order(path):
    manifest = Manifest("predict", knobs={"z": 1, "a": 2}, overrides=["z", "a"], arguments=["out", "in"])
    manifest.add_case(CaseRecord("b", metrics={"z": 1.0, "a": 2.0}))
    manifest.add_case(CaseRecord("a"))
    content = stored(manifest.write(path))
    assert list(content["knobs"]) == content["overrides"] == list(content["cases"][1]["metrics"]) == ["a", "z"]
    assert content["arguments"] == ["in", "out"]
    assert [case["name"] for case in content["cases"]] == ["a", "b"]


def test_a_repeated_case_replaces_its_earlier_record():
    manifest = Manifest("predict")
    manifest.add_case(CaseRecord("a", status="failed", error="broken"))
    manifest.add_case(CaseRecord("a", output="a.nii.gz"))
    assert manifest.counts == {"done": 1, "failed": 0, "skipped": 0}


@pytest.mark.parametrize(
    ("record", "done"),
    [
        (CaseRecord("a", output="a.nii.gz"), True),
        (CaseRecord("a", status="skipped", output="a.nii.gz"), True),
        (CaseRecord("a", status="failed"), False),
        (CaseRecord("a", status="skipped"), False),
        (CaseRecord("b", output="b.nii.gz"), False),
    ],
)
def test_a_case_is_done_when_it_has_a_result(record, done):
    manifest = Manifest("predict")
    manifest.add_case(record)
    assert manifest.is_done("a") is done


def test_resuming_keeps_finished_cases_and_only_these(path):
    with Manifest("predict", bundle=BUNDLE, knobs={"roi_size": (96, 96)}, path=path) as first:
        with first.case("done") as record:
            record.output, record.metrics = "done.nii.gz", {"dice": 0.5}
        with first.case("failed"):
            raise CaseError("no")
    second = Manifest("predict", bundle=BUNDLE, knobs={"roi_size": (96, 96)}, path=path)
    assert second.resume() == {"done"}
    with second:
        assert [case["name"] for case in stored(path)["cases"]] == ["done"]
    assert stored(path)["cases"][0]["metrics"] == {"dice": 0.5}


@pytest.mark.parametrize(
    "other",
    [
        {"command": "evaluate"},
        {"bundle": BundleRecord("liver_ct_unet", "1.2.0", "c" * 64, "e" * 64)},
        {"bundle": None},
        {"knobs": {"overlap": 0.25}},
        {"seeds": {"torch": 1}},
    ],
)
def test_other_work_is_not_resumed(path, other):
    same = {"command": "predict", "bundle": BUNDLE, "knobs": {"overlap": 0.5}, "seeds": {"torch": 0}}
    earlier = Manifest(**same, path=path)
    earlier.add_case(CaseRecord("a", output="a.nii.gz"))
    assert Manifest(**same, path=path).resume() == {"a"}
    assert Manifest(**{**same, **other}, path=path).resume() == set()


def test_nothing_is_resumed_without_an_earlier_file(path):
    assert Manifest("predict", path=path).resume() == set()
    assert Manifest("predict").resume() == set()


def test_software_and_machine_are_told(path):
    content = stored(Manifest("predict").write(path))
    import medseg

    assert content["software"]["medseg"] == medseg.__version__
    assert content["software"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert content["software"]["numpy"] == np.__version__
    assert {"torch", "monai", "nibabel"} <= content["software"].keys()
    assert content["machine"]["cpu"]
    assert content["machine"]["cpus"] >= 1


def test_a_package_that_is_absent_has_no_version(monkeypatch):
    monkeypatch.setattr(manifest_module, "PACKAGES", ("no-such-package-at-all",))
    assert Manifest("predict").software["no-such-package-at-all"] is None


def test_peak_memory_of_this_process_is_plausible(path):
    held = np.ones(8_000_000)  # 64 MB
    peak = stored(Manifest("predict").write(path))["peak_memory"]["host_bytes"]
    assert held.nbytes < peak < 64 * 2**30


def test_threads_are_told_when_torch_is_loaded(path):
    torch = pytest.importorskip("torch")
    assert stored(Manifest("predict").write(path))["machine"]["threads"] == torch.get_num_threads()


def test_importing_and_writing_loads_nothing_heavy(tmp_path):
    code = f"""
import sys
from medseg.manifest import Manifest
Manifest("predict").write({str(tmp_path / "m.json")!r})
heavy = {{"torch", "monai", "numpy", "nibabel", "PIL"}} & set(sys.modules)
raise SystemExit(f"loaded: {{sorted(heavy)}}" if heavy else 0)
"""
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_no_folder_of_the_run_is_told(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["medseg", "predict", "/data/Miller_Jane"])
    manifest = Manifest("predict", knobs={"output_dir": "/data/Miller_Jane/out"}, path=path)
    with manifest, manifest.case("scan"):
        pass
    assert "Miller" not in path.read_text()
    assert str(path.parent.parent) not in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "manifest_version None"),
        ('{"manifest_version": 99}', "manifest_version 99"),
        ('{"manifest_version": 1}', "not a complete run manifest"),
    ],
)
def test_what_is_no_manifest_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=rf"run\.json.*{message}"):
        Manifest.read(path)


def test_a_missing_manifest_is_refused_by_name(tmp_path):
    with pytest.raises(RequestError, match=r"absent\.json"):
        Manifest.read(tmp_path / "absent.json")


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(OutputError, match=r"manifest\.json"):
        Manifest("predict").write(tmp_path / "manifest.json")


def test_names_beyond_ascii_survive(path):
    manifest = Manifest("predict")
    manifest.add_case(CaseRecord("Müller-肝"))
    assert "Müller-肝" in manifest.write(path).read_text(encoding="utf-8")
    assert Manifest.read(path).cases.keys() == {"Müller-肝"}


def test_a_case_of_the_same_name_and_another_input_is_not_resumed(path, tmp_path):
    first, second = (tmp_path / folder / "scan.nii.gz" for folder in ("one", "two"))
    for file in (first, second):
        file.parent.mkdir()
        file.write_bytes(b"same")
    with Manifest("predict", path=path) as manifest, manifest.case("scan", source=stamp(str(first))) as record:
        record.output = "scan.nii.gz"
    again, other = Manifest("predict", path=path), Manifest("predict", path=path)
    assert again.resume({"scan": stamp(str(first))}) == again.earlier == {"scan"}
    assert other.resume({"scan": stamp(str(second))}) == set()


@pytest.mark.parametrize("series", ["", "::2"])
def test_an_input_that_changed_has_another_stamp(tmp_path, series):
    (tmp_path / "scan").mkdir()
    file = tmp_path / "scan" / "1.dcm"
    file.write_bytes(b"one")
    before = stamp(f"{tmp_path / 'scan'}{series}")
    assert stamp(f"{tmp_path / 'scan'}{series}") == before
    assert stamp(f"{tmp_path / 'scan'}::1") != before
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    changed = stamp(f"{tmp_path / 'scan'}{series}")
    (tmp_path / "scan" / "2.dcm").write_bytes(b"two")
    assert len({before, changed, stamp(f"{tmp_path / 'scan'}{series}")}) == 3


def test_what_is_done_anew_is_not_earlier(path):
    with Manifest("predict", path=path) as manifest, manifest.case("a") as record:
        record.output = "a.nii.gz"
    again = Manifest("predict", path=path)
    assert again.resume() == {"a"}
    with again, again.case("a"):
        pass
    assert again.earlier == set()
