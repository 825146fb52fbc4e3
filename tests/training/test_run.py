"""What the knobs of a training do, through a bundle's own config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.bundle.catalog import Bundle
from medseg.errors import CaseError, RequestError, WeightsError
from medseg.files import sha256_file
from medseg.jobs import runner
from medseg.jobs.job import prepare
from medseg.manifest import Manifest


def _train(bundle: Bundle, data: Path, *, resume: bool = False, report: Any = None, **settings: Any) -> Manifest:
    job = prepare("train", bundle, settings, paths={"dataset_dir": str(data), "resume": resume})
    return runner.train(job, report=report)


def _run(bundle: Bundle) -> Path:
    return bundle.root / "runs" / "train"


@pytest.mark.parametrize(
    "settings",
    [{"num_workers": 0}, {"num_workers": 2}, {"cache_memory": "0"}, {"disk_cache": True, "cache_memory": "0"}],
)
def test_how_the_data_come_changes_no_weight(
    trained: Bundle, make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path, settings: dict[str, Any]
) -> None:
    bundle = make_bundle(tiny_source)
    _train(bundle, tiny_data, **settings)
    assert sha256_file(bundle.weights) == sha256_file(trained.weights)
    assert (bundle.root / "runs" / "cache").is_dir() == ("disk_cache" in settings)


def test_training_stops_early_and_a_resumed_run_stays_stopped(
    make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    # with a learning rate of zero nothing ever improves
    bundle = make_bundle(tiny_source)
    settings = {"patience": 2, "learning_rate": 0.0, "max_epochs": 30, "val_interval": 1, "pictures": 0}
    manifest = _train(bundle, tiny_data, **settings)
    assert [entry["epoch"] for entry in manifest.validations] == [1, 2, 3]
    before = sha256_file(_run(bundle) / "last.pt")
    again = _train(bundle, tiny_data, resume=True, **settings)
    assert [entry["epoch"] for entry in again.validations] == [1, 2, 3]
    assert sha256_file(_run(bundle) / "last.pt") == before


def test_a_resumed_run_lists_the_validations_of_before(
    make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    bundle = make_bundle(tiny_source)
    first = _train(bundle, tiny_data, max_epochs=2)
    whole = _train(bundle, tiny_data, resume=True)
    assert whole.validations[:1] == first.validations
    assert [entry["epoch"] for entry in whole.validations] == [2, 4]
    assert set(first.validations[0]) == {"epoch", "val_mean_dice", "val_mean_dice/small", "val_mean_dice/large"}


def test_other_data_or_batches_are_refused_when_resuming(
    make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    bundle = make_bundle(tiny_source)
    _train(bundle, tiny_data, max_epochs=1)
    with pytest.raises(WeightsError, match="batch_size was 2, now 1"):
        _train(bundle, tiny_data, resume=True, batch_size=1)


def test_a_torn_state_is_refused(make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path) -> None:
    bundle = make_bundle(tiny_source)
    _train(bundle, tiny_data, max_epochs=1)
    for name in ("last.pt", "previous.pt"):
        path = _run(bundle) / name
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="incomplete or was modified"):
        _train(bundle, tiny_data, resume=True)


def test_the_live_line_tells_loss_dice_and_speed(
    make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    lines: list[tuple[float, int, str]] = []
    _train(make_bundle(tiny_source), tiny_data, report=lambda *line: lines.append(line), max_epochs=3)
    assert [round(done, 2) for done, _, _ in lines] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert {total for _, total, _ in lines} == {3}
    assert all("loss " in note and "patches/s" in note for _, _, note in lines)
    assert "mean dice 0." in lines[-1][2]
    assert "dice" not in lines[0][2]


def test_an_epoch_can_have_any_number_of_steps(make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path) -> None:
    bundle = make_bundle(tiny_source)
    _train(bundle, tiny_data, max_epochs=2, steps_per_epoch=5, accumulate=2, pictures=0)
    state = torch.load(_run(bundle) / "last.pt", weights_only=True)
    assert state["progress"]["iteration"] == 12
    assert state["weight_average"]["steps"] == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_training_case_is_named(
    make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path, tmp_path: Path, workers: int
) -> None:
    data = tmp_path / "data"
    for path in tiny_data.rglob("*"):
        if path.is_file():
            target = data / path.relative_to(tiny_data)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    label = data / "labelsTr" / "case_1.nii.gz"
    label.write_bytes(label.read_bytes()[:100])
    with pytest.raises(CaseError, match=r"training case 'case_1.*case_1"):
        _train(make_bundle(tiny_source), data, num_workers=workers, cache_memory="0")


def test_float16_needs_a_graphics_card(make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RequestError, match="precision=float16 needs a CUDA device"):
        _train(make_bundle(tiny_source), tiny_data, precision="float16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_float16_trains_and_resumes_on_a_graphics_card(
    make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    bundle = make_bundle(tiny_source)
    _train(bundle, tiny_data, precision="float16", max_epochs=2)
    scale = torch.load(_run(bundle) / "last.pt", weights_only=True)["scaler"]["scale"]
    assert scale > 0
    manifest = _train(bundle, tiny_data, resume=True, precision="float16")
    assert [entry["epoch"] for entry in manifest.validations] == [2, 4]


def test_the_log_of_a_run_is_in_its_folder(trained: Bundle) -> None:
    assert list((_run(trained) / "tensorboard").glob("events.out.tfevents*"))
    manifest = json.loads((_run(trained) / "manifest.json").read_text())
    assert manifest["knobs"]["accumulate"] == 1
