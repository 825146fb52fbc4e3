"""`medseg.plan`: what it writes, what it keeps of an earlier plan, and what it refuses to overwrite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.catalog import Bundle
from medseg.errors import BundleError, CaseError, RequestError
from medseg.planning import probe
from medseg.planning.api import plan
from medseg.planning.probe import Measurement

CPU = {"device_name": "cpu"}
SMALL = {**CPU, "patch_size": [16, 16, 16], "max_epochs": 2}
MEASURED = Measurement("cpu", 2, {"float32": 0.2, "bfloat16": 0.1}, 0.01, 0.1, 0.05, 100 << 20, 700 << 20)


@pytest.fixture
def data(volumes: Any) -> Path:
    """Two training cases and one for validation."""
    return Path(volumes(shapes=((20, 24, 20), (28, 24, 20), (24, 24, 20)), name="balls"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """What the probe was given; it measures nothing and finds a fast machine."""
    seen: list[tuple[Any, Any]] = []

    def fake(config: Any, case: Any) -> Measurement:
        seen.append((config, case))
        return MEASURED

    monkeypatch.setattr(probe, "measure", fake)
    return seen


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_plan_writes_a_bundle_its_card_and_its_record(data: Path, tmp_path: Path, measured: list[Any]) -> None:
    root = tmp_path / "balls_mri_unet"
    made = plan(data, root, settings=SMALL)
    assert made.root == root.absolute()
    assert json.loads((root / "bundle.json").read_text()) == made.bundle
    record = json.loads((root / "plan.json").read_text())
    assert record["measured"]["step_seconds"] == MEASURED.step_seconds
    assert record["forecast"] == made.to_dict()["forecast"]
    assert record["fingerprint"]["summary"]["training_cases"] == 2
    assert made.bundle["name"] in (root / "docs" / "README.md").read_text()
    config = json.loads((root / "configs" / "train.json").read_text())
    assert config["patch_size"] == [16, 16, 16]
    assert config["network_def"] == made.bundle["network_def"]
    assert not Bundle(root).weights.exists()


def test_the_probe_gets_the_planned_config_and_the_case_of_median_size(
    data: Path, tmp_path: Path, measured: list[Any]
) -> None:
    made = plan(data, tmp_path / "out", settings=SMALL)
    ((config, case),) = measured
    assert config["network_def"] == made.bundle["network_def"]
    assert config["patch_size"] == [16, 16, 16]
    assert Path(case["image"]).name == "case_1.nii.gz"
    assert Path(case["label"]).is_file()
    assert made.measured == MEASURED
    assert made.bundle["knobs"]["precision"] == "bfloat16"


def test_a_plan_that_measures_nothing_starts_no_probe(data: Path, tmp_path: Path, measured: list[Any]) -> None:
    made = plan(data, tmp_path / "out", settings=SMALL, measure=False)
    assert measured == []
    assert made.measured is None
    assert made.forecast.total == 0
    assert made.forecast.memory > 0
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["measured"] is None


def test_progress_counts_the_cases_and_then_names_the_patch(data: Path, tmp_path: Path, measured: list[Any]) -> None:
    seen: list[tuple[float, int, str]] = []
    plan(data, tmp_path / "out", settings=SMALL, report=lambda *state: seen.append(state))
    assert [state[:2] for state in seen] == [(0, 2), (1, 2), (2, 2), (2, 2)]
    assert [note for *_, note in seen[:2]] == ["case_0.nii.gz", "case_1.nii.gz"]
    assert "16 x 16 x 16" in seen[-1][2]


def test_settings_of_the_user_reach_the_bundle_unchanged(data: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "spacing": [2.0, 2.0, 2.0], "learning_rate": 0.0123, "batch_size": 1, "val_interval": 2}
    made = plan(data, tmp_path / "out", settings=settings, measure=False)
    assert {name: made.bundle["knobs"][name] for name in settings} == settings
    config = json.loads((tmp_path / "out" / "configs" / "train.json").read_text())
    assert {name: config[name] for name in settings if name in config} == {
        name: value for name, value in settings.items() if name in config
    }
    assert config["learning_rate"] == 0.0123
    reasons = {made.bundle["plan"][name] for name in settings}
    assert len(reasons) == 1
    assert reasons != {made.bundle["plan"]["sw_batch_size"]}


@pytest.mark.parametrize(("network", "target"), [("unet", "UNet"), ("UNet++", "UNetPlusPlus"), ("banet", "BANet")])
def test_the_network_that_was_asked_for_is_planned(network: str, target: str, data: Path, tmp_path: Path) -> None:
    made = plan(data, tmp_path / "out", network=network, settings=SMALL, measure=False)
    assert made.bundle["network_def"]["_target_"].endswith(f".{target}")
    assert made.bundle["name"].startswith("balls_mri_")


def test_selfreg_wraps_the_loss(data: Path, tmp_path: Path) -> None:
    plain = plan(data, tmp_path / "plain", settings=SMALL, measure=False).bundle
    made = plan(data, tmp_path / "out", network="unet+selfreg", settings=SMALL, measure=False).bundle
    assert made["network_def"] == plain["network_def"]
    assert "SelfReg" in json.dumps(made["blocks"]["training_loss"])
    assert "SelfReg" not in json.dumps(plain.get("blocks", {}))


@pytest.mark.parametrize(("name", "expected"), [("", "balls_mri_unet"), ("kidney_mri_small", "kidney_mri_small")])
def test_the_bundle_bears_the_given_name(name: str, expected: str, data: Path, tmp_path: Path) -> None:
    assert plan(data, tmp_path / "out", name=name, settings=SMALL, measure=False).bundle["name"] == expected


def test_a_budget_bounds_the_forecast_and_needs_a_measurement(data: Path, tmp_path: Path, measured: list[Any]) -> None:
    made = plan(data, tmp_path / "out", budget="20m", settings={**CPU, "patch_size": [16, 16, 16]})
    assert 0 < made.forecast.total <= 1200
    assert measured
    with pytest.raises(RequestError, match="--budget"):
        plan(data, tmp_path / "other", budget="20m", measure=False)
    assert not (tmp_path / "other").exists()


def test_the_limit_of_memory_is_kept(data: Path, tmp_path: Path) -> None:
    made = plan(data, tmp_path / "out", memory="3G", settings=CPU, measure=False)
    assert made.request.memory == 3 << 30
    assert made.request.memory_given
    assert made.forecast.memory <= 3 << 30
    assert not plan(data, tmp_path / "free", settings=CPU, measure=False).request.memory_given


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"dims": 4}, "dims=4"),
        ({"dims": 2}, "case_0"),
        ({"network": "vnet"}, "vnet"),
        ({"memory": "lots"}, "lots"),
        ({"budget": "soon"}, "soon"),
        ({"settings": {"learning_rat": 1}}, "learning_rate"),
        ({"settings": {"patch_size": [8, 8]}}, "patch_size"),
        ({"settings": {"max_epochs": 0}}, "max_epochs=0"),
        ({"memory": "10M"}, "--memory"),
    ],
)
def test_an_invalid_request_writes_no_bundle(options: dict[str, Any], found: str, data: Path, tmp_path: Path) -> None:
    given = {"measure": "budget" in options, **options, "settings": {**CPU, **options.get("settings", {})}}
    with pytest.raises((RequestError, BundleError), match=found):
        plan(data, tmp_path / "out", **given)
    assert set(files(tmp_path / "out")) <= {"plan.json"}


def test_invalid_dimensions_carry_what_was_found_and_expected(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as error:
        plan(data, tmp_path / "out", dims=1)
    assert error.value.data == {"found": 1, "expected": [2, 3]}


@pytest.mark.parametrize("part", ["training", "validation"])
def test_data_without_a_part_is_refused_before_anything_is_written(part: str, data: Path, tmp_path: Path) -> None:
    listing = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**listing, part: []}))
    with pytest.raises((RequestError, CaseError)):
        plan(data, tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises((RequestError, CaseError), match="nowhere"):
        plan(tmp_path / "nowhere", tmp_path / "out", measure=False)


def test_a_file_is_not_replaced_by_a_folder(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("notes")
    with pytest.raises(RequestError) as error:
        plan(data, target, measure=False, overwrite=True)
    assert error.value.path == target
    assert target.read_text() == "notes"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_left_alone(overwrite: bool, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "letter.txt").write_text("dear")
    with pytest.raises(RequestError) as error:
        plan(data, target, measure=False, overwrite=overwrite)
    assert error.value.path == target
    assert files(target) == {"letter.txt": b"dear"}


def test_an_empty_folder_is_filled(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert plan(data, tmp_path / "out", settings=SMALL, measure=False).root == (tmp_path / "out").absolute()


def test_trained_weights_are_never_lost(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    plan(data, target, settings=SMALL, measure=False)
    weights = Bundle(target).weights
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"trained")
    before = files(target)
    for overwrite in (False, True):
        with pytest.raises(RequestError) as error:
            plan(data, target, settings=SMALL, measure=False, overwrite=overwrite)
        assert error.value.path == weights.absolute()
    assert files(target) == before


def test_an_untrained_bundle_is_replaced_only_on_request(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = plan(data, target, settings=SMALL, measure=False)
    before = files(target)
    with pytest.raises(RequestError, match="--overwrite") as error:
        plan(data, target, settings={**SMALL, "max_epochs": 9}, measure=False)
    assert error.value.path == target
    assert files(target) == before
    second = plan(data, target, settings={**SMALL, "max_epochs": 9}, measure=False, overwrite=True)
    assert first.bundle["knobs"]["max_epochs"] == 2
    assert second.bundle["knobs"]["max_epochs"] == 9
    assert json.loads((target / "configs" / "train.json").read_text())["max_epochs"] == 9


def reads(data: Path, target: Path) -> int:
    """Plan anew; return how many cases were opened for it."""
    seen: list[str] = []
    plan(data, target, settings=SMALL, measure=False, overwrite=True, report=lambda *state: seen.append(state[2]))
    return sum(note.startswith("case_") for note in seen)


def test_cases_are_read_once_until_a_file_or_the_listing_changes(data: Path, tmp_path: Path, save_volume: Any) -> None:
    import numpy as np

    target = tmp_path / "out"
    assert reads(data, target) == 2
    assert reads(data, target) == 0
    save_volume(data / "labelsTr" / "case_0.nii.gz", np.pad(np.ones((4, 4, 4), np.uint8), ((0, 16), (0, 20), (0, 16))))
    assert reads(data, target) == 2
    listing = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**listing, "labels": {"1": "small", "2": "large"}}))
    assert reads(data, target) == 2
    (data / "dataset.json").write_text(json.dumps({**listing, "labels": {"1": "small", "2": "large"}, "x": 1}))
    assert reads(data, target) == 0


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"fingerprint": {"version": 0}}', '{"fingerprint": null}'])
def test_a_record_that_cannot_be_used_is_taken_anew(content: str, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    reads(data, target)
    (target / "plan.json").write_text(content)
    assert reads(data, target) == 2
    assert json.loads((target / "plan.json").read_text())["fingerprint"]["summary"]["training_cases"] == 2


def test_cases_are_not_read_again_after_a_plan_that_found_no_room(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RequestError, match="--memory"):
        plan(data, target, memory="10M", settings=CPU, measure=False)
    assert set(files(target)) == {"plan.json"}
    assert reads(data, target) == 0
    assert (target / "bundle.json").is_file()
