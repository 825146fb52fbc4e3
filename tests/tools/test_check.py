"""The table of checks: green for every shipped bundle, red for what is wrong, and never an end before the last row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle, shipped_bundles
from medseg.tools import check as checking
from medseg.tools import trials
from medseg.tools.check import CHECKS, FULL_CHECKS, Outcome, check_bundle, examine
from tests.bundle.shipped import shipped

SHIPPED = shipped_bundles()


def _bad(found: dict[str, Outcome]) -> dict[str, Outcome]:
    return {name: one for name, one in found.items() if one.status != "ok"}


# Pictures and volumes, one of them with weights. The others are for `-m full_check`; the fast checks of all of them are
# in tests/cli/test_commands.py, as the table that users see.
EVERY_RUN = ("gland_pathology_unet", "hippocampus_mri_unet")


def test_the_bundles_that_every_run_tries_out_are_of_both_kinds() -> None:
    tried = [bundle for bundle in SHIPPED if bundle.name in EVERY_RUN]
    assert len(tried) == len(EVERY_RUN)
    dims = {bundle.load_configs("inference")["inference.json"]["network_def"]["spatial_dims"] for bundle in tried}
    assert dims == {2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("bundle", shipped(EVERY_RUN))
def test_every_shipped_bundle_passes_the_full_checks(bundle: Bundle) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.root.rglob("*") if "runs" not in path.parts}
    found = examine(bundle, full=True)
    assert list(found) == [*CHECKS, *FULL_CHECKS]
    wrong = _bad(found)
    assert {name: one for name, one in wrong.items() if one.status == "failed"} == {}
    assert all("needs" in one.text or "has no configs" in one.text for one in wrong.values())
    assert {path: path.stat().st_mtime_ns for path in bundle.root.rglob("*") if "runs" not in path.parts} == before


def _edited(bundle: Bundle, config: str, /, **changes: Any) -> None:
    path = bundle.config_path(config)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def test_each_fault_shows_in_its_own_column(trained_copy: Bundle) -> None:
    _edited(trained_copy, "inference", handlers="$print(1)")
    faults = {name: text for name, text in check_bundle(trained_copy).items() if text}
    assert "inference.json differ" in faults["built"]
    assert "$print(1)" in faults["declarative"]
    assert "schema" not in faults


def test_weights_that_an_image_comes_without_are_no_fault(trained_copy: Bundle) -> None:
    build(trained_copy)
    assert "weights" in trained_copy.metadata
    trained_copy.weights.unlink()
    assert check_bundle(trained_copy)["built"] == ""
    _edited(trained_copy, "metadata", version="9.9.9")
    assert "metadata.json differ" in check_bundle(trained_copy)["built"]


def test_a_program_is_not_run_to_check_it(trained_copy: Bundle, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config = trained_copy.load_configs("train")["train.json"]
    config["network_def"]["features"] = f"$__import__('pathlib').Path({str(marker)!r}).touch()"
    _edited(trained_copy, "train", **config)
    _edited(trained_copy, "inference", network_def=config["network_def"])
    found = examine(trained_copy, full=True)
    assert not marker.exists()
    assert found["declarative"].status == "failed"
    after = [*CHECKS, *FULL_CHECKS][list(CHECKS).index("declarative") + 1 :]
    assert {found[name].status for name in after} == {"skipped"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "9.9.9"}, "changelog has no entry for version 9.9.9"),
        ({"task": 3}, "3 is not of type 'string'"),
        ({"network_data_format": {}}, "'inputs' is a required property"),
    ],
)
def test_metadata_against_the_schema(trained_copy: Bundle, changes: dict[str, Any], said: str) -> None:
    _edited(trained_copy, "metadata", **changes)
    assert said in check_bundle(trained_copy)["schema"]


def test_an_id_that_other_programs_look_for_is_missed(trained_copy: Bundle) -> None:
    path = trained_copy.config_path("inference")
    config = json.loads(path.read_text())
    config["my_dataset"] = config.pop("dataset")
    config["dataloader"]["dataset"] = "@my_dataset"
    path.write_text(json.dumps(config))
    assert "dataset" in check_bundle(trained_copy)["properties"]


def test_a_network_that_does_not_fit_the_metadata(trained_copy: Bundle) -> None:
    metadata = trained_copy.metadata
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] = 7
    _edited(trained_copy, "metadata", **metadata)
    assert "7" in check_bundle(trained_copy)["net in/out"]


def test_whatever_a_check_raises_is_a_row_of_the_table(trained_copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bundle: Bundle) -> str:
        raise KeyError("x")

    monkeypatch.setitem(checking.CHECKS, "schema", broken)
    assert examine(trained_copy)["schema"] == Outcome("failed", "KeyError: 'x'")
    shutil.rmtree(trained_copy.root / "configs")
    found = examine(trained_copy)
    assert list(found) == list(CHECKS)
    assert found["declarative"].status == "failed"


def test_a_bundle_that_cannot_train_is_red_there_and_skipped_after(
    trained_copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checking.FULL_CHECKS, "two processes", lambda trial: "")  # would fail in its own time
    trained_copy.weights.unlink()
    config = json.loads(trained_copy.config_path("train").read_text())
    config["train"]["trainer"]["optim_set_to_nonee"] = 1
    _edited(trained_copy, "train", train=config["train"])
    found = examine(trained_copy, full=True)
    assert list(found) == [*CHECKS, *FULL_CHECKS]
    assert found["train"].status == "failed"
    assert {found[name].status for name in ("evaluate", "predict", "ts", "MONAI train", "MONAI predict")} == {"skipped"}
    assert "since an earlier check failed" in found["ts"].text


def test_other_bytes_by_monai_are_red(trained_copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trials._monai_jobs

    def other_seed(trial: Any) -> Any:
        name, command, arguments = real(trial)[0]
        return [(name, command, {**arguments, "seed": 1})]

    monkeypatch.setattr(trials, "_monai_jobs", other_seed)
    monkeypatch.setattr(
        checking, "FULL_CHECKS", {n: c for n, c in FULL_CHECKS.items() if n in ("train", "MONAI train")}
    )
    found = examine(trained_copy, full=True)
    assert found["train"].status == "ok"
    assert found["MONAI train"] == Outcome("failed", "weights trained by MONAI's run differ from those of medseg")


def test_what_is_missing_is_skipped_with_the_reason(trained_copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "missing_packages", lambda name: ("onnx",) if name == "onnx" else ())
    monkeypatch.setattr(checking, "FULL_CHECKS", {"onnx": FULL_CHECKS["onnx"]})
    assert examine(trained_copy, full=True)["onnx"] == Outcome("skipped", "needs onnx")


def test_progress_counts_up_to_the_number_of_checks(trained_copy: Bundle) -> None:
    told: list[tuple[float, int, str]] = []
    examine(trained_copy, report=lambda *seen: told.append(seen))
    assert [done for done, _, _ in told] == list(range(len(CHECKS)))
    assert {total for _, total, _ in told} == {len(CHECKS)}
    assert told[0][2] == "balls_mri_unet: built"
