"""What a run logs: scalars, shares of time, and a history that does not depend on the clock."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, from_engine
from torch import nn

from medseg.errors import MedsegError, RequestError
from medseg.training.run_log import RunLog

NAMES = {
    "network_data_format": {"outputs": {"pred": {"channel_def": {"0": "background", "1": "liver", "2": "spleen"}}}}
}


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = defaultdict(list)
    for path in sorted(folder.glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                numbers = value.tensor.float_val
                found[value.tag].append((event.step, numbers[0] if numbers else math.nan))
    return dict(found)


WAIT = 0.03


class _SlowData(list):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            time.sleep(WAIT)
            yield batch


def _engines(folder: Path, network: nn.Module, *, loss: Any = None, **options: Any) -> tuple[Engine, RunLog]:
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps(NAMES))
    image, label = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    one_hot = torch.zeros(1, 3, 4, 4)
    one_hot[:, 1] = 1
    validator = SupervisedEvaluator(
        torch.device("cpu"),
        [{"image": image, "label": one_hot}],
        network=nn.Identity(),
        inferer=lambda images, _: one_hot,
        key_val_metric={
            "val_mean_dice": MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))
        },
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.125)
    log = RunLog(str(folder), validator, optimizer, bundle_root=str(folder), **options)
    trainer = SupervisedTrainer(
        torch.device("cpu"),
        2,
        _SlowData([{"image": image, "label": label}] * 3),
        network,
        optimizer,
        loss or nn.MSELoss(),
        train_handlers=[log],
        decollate=False,
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: validator.run(trainer.state.epoch))
    return trainer, log


def test_losses_rate_speed_and_dice_of_each_label_are_logged(tmp_path: Path) -> None:
    trainer, log = _engines(tmp_path, nn.Conv2d(1, 1, 1))
    trainer.run()
    found = _scalars(tmp_path / "tensorboard")
    assert [step for step, _ in found["loss/step"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["loss/epoch"]] == [1, 2]
    steps = [value for _, value in found["loss/step"]]
    assert found["loss/epoch"][0][1] == pytest.approx(sum(steps[:3]) / 3)
    assert [value for _, value in found["learning_rate"]] == [0.125, 0.125]
    for (_, share), (_, speed) in zip(
        found["speed/share_of_time_waiting_for_data"], found["speed/patches_per_second"], strict=True
    ):
        seconds = 3 / speed
        assert 3 * WAIT <= share * seconds < seconds
    assert found["validation/val_mean_dice"] == [(1, 1.0), (2, 1.0)]
    assert found["validation/val_mean_dice/liver"] == [(1, 1.0), (2, 1.0)]
    assert math.isnan(found["validation/val_mean_dice/spleen"][0][1])
    assert trainer.state.last_metrics["val_mean_dice/liver"] == 1.0
    assert [entry["epoch"] for entry in log.history] == [1, 1, 2, 2]


def test_the_history_is_the_same_however_long_it_took(tmp_path: Path) -> None:
    states = []
    for part in "ab":
        torch.manual_seed(1)
        trainer, log = _engines(tmp_path / part, nn.Conv2d(1, 1, 1))
        trainer.run()
        states.append(log.state_dict())
    assert repr(states[0]) == repr(states[1])
    again = _engines(tmp_path / "c", nn.Conv2d(1, 1, 1))[1]
    again.load_state_dict(states[0])
    assert repr(again.state_dict()) == repr(states[0])


def test_a_loss_that_is_no_number_ends_the_run_with_advice(tmp_path: Path) -> None:
    trainer, _ = _engines(tmp_path, nn.Conv2d(1, 1, 1), loss=lambda pred, label: (pred * math.nan).sum())
    with pytest.raises(MedsegError, match=r"the loss of epoch 1 is nan. Lower learning_rate"):
        trainer.run()


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database, about each other
def test_mlflow_keeps_the_same_scalars_in_one_run_also_when_resumed(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    for _ in range(2):
        trainer, _ = _engines(tmp_path, nn.Conv2d(1, 1, 1), mlflow=True)
        trainer.run()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("medseg").experiment_id])
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "loss/epoch")] == [1, 2, 1, 2]


def test_without_mlflow_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    trainer, _ = _engines(tmp_path, nn.Conv2d(1, 1, 1), mlflow=True)
    with pytest.raises(RequestError, match=r'pip install "medseg\[mlflow\]"'):
        trainer.run()
