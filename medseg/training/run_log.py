"""Log of a training run: scalars and images for TensorBoard and MLflow, throughput and data loading time."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from ignite.engine import Events

from medseg.errors import MedsegError
from medseg.extras import require
from medseg.training.distributed import is_first_process, process_count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ignite.engine import Engine
    from numpy.typing import NDArray
    from torch.optim import Optimizer

__all__ = ["RunLog"]

_STEPS_BETWEEN_READINGS = 10


class _Writer(Protocol):
    """Destination of the scalars and images of a run."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def add_picture(self, tag: str, picture: NDArray[np.uint8], step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Log a run to TensorBoard, and optionally to MLflow, in local files; nothing is sent over the network.

    Logged per step: the loss. Per epoch: the mean loss, the learning rate, patches per second and the fraction of time
    spent waiting for data. Per validation: all metrics, including those of each label. Other handlers add images
    through `picture`.

    The state of the engine receives `patches_per_second` and `waiting` (fraction, 0 to 1) of the current epoch, and
    `last_metrics`.

    Args:
        output_dir: Folder of the run; logs are written to `tensorboard/` and `mlflow.db` in it.
        validator: Engine whose metrics are logged.
        optimizer: Optimizer whose learning rate is logged.
        bundle_root: Root folder of the trained bundle, whose metadata name the labels; without it they are numbered.
        mlflow: Whether to log to MLflow too (requires the extra `mlflow`).

    Attributes:
        history: One entry per epoch and per validation, with the epoch and the values.
    """

    def __init__(
        self,
        output_dir: str,
        validator: Engine,
        optimizer: Optimizer,
        *,
        bundle_root: str = "",
        mlflow: bool = False,
    ) -> None:
        self.folder = Path(output_dir)
        self.validator = validator
        self.optimizer = optimizer
        self.labels = _label_names(Path(bundle_root) / "configs" / "metadata.json")
        self.mlflow = mlflow
        self.history: list[dict[str, float]] = []
        self._writers: list[_Writer] = []
        self._loss = torch.zeros(2, dtype=torch.float64)  # sum and count over the steps of this epoch
        self._restart_clocks()

    def attach(self, engine: Engine) -> None:
        """Register the handlers at the trainer and at the validator."""
        self.trainer = engine
        engine.add_event_handler(Events.EPOCH_STARTED, self._restart_clocks)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._wait)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._go_on)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, self.close)
        self.validator.add_event_handler(Events.EPOCH_COMPLETED, self._validated)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Log a scalar."""
        for writer in self._open():
            writer.add_scalar(tag, value, step)

    def picture(self, tag: str, picture: NDArray[np.uint8], epoch: int) -> None:
        """Log an RGB image `(rows, columns, 3)` with values from 0 to 255."""
        for writer in self._open():
            writer.add_picture(tag, picture, epoch)

    def close(self) -> None:
        """Flush and close the files; logging again opens new ones."""
        for writer in self._writers:
            writer.close()
        self._writers = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming, without timings."""
        return {"loss": self._loss.cpu(), "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of an earlier run."""
        self._loss = state["loss"].clone()
        self.history = [dict(entry) for entry in state["history"]]

    def _open(self) -> list[_Writer]:
        if not self._writers and is_first_process():
            self._writers = [_TensorBoard(self.folder / "tensorboard", self.trainer.state.iteration)]
            if self.mlflow:
                self._writers.append(_MLflow(self.folder))
        return self._writers

    def _restart_clocks(self) -> None:
        self._asked = self._began = time.perf_counter()
        self._waited = 0.0
        self._patches = 0

    def _wait(self) -> None:
        self._asked = time.perf_counter()

    def _go_on(self) -> None:
        self._waited += time.perf_counter() - self._asked

    def _step(self, engine: Engine) -> None:
        state = engine.state
        loss = state.output["loss"].detach().double()
        self._loss = self._loss.to(loss.device) + torch.stack([loss, torch.ones_like(loss)])
        self._patches += len(state.output["image"]) * process_count()
        past = max(time.perf_counter() - self._began, 1e-9)
        state.patches_per_second = self._patches / past
        state.waiting = self._waited / past
        # Reading the loss synchronizes with the GPU.
        if loss.device.type == "cpu" or state.iteration % _STEPS_BETWEEN_READINGS == 0:
            self.scalar("loss/step", float(loss), state.iteration)

    def _epoch(self, engine: Engine) -> None:
        """Log the epoch, before its validation.

        Raises:
            MedsegError: Non-finite loss.
        """
        epoch, (total, count) = engine.state.epoch, self._loss.tolist()
        loss = total / max(count, 1)
        self._loss = torch.zeros(2, dtype=torch.float64)
        if not math.isfinite(loss) and getattr(engine, "scaler", None) is None:
            raise MedsegError(
                f"training diverged: the loss of epoch {epoch} is {loss}. Lower learning_rate, set gradient_clip, or "
                "use precision=float32; the last good state is that of the previous epoch"
            )
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.history.append({"epoch": epoch, "loss": loss, "learning_rate": rate})
        for tag, value in (
            ("loss/epoch", loss),
            ("learning_rate", rate),
            ("speed/patches_per_second", engine.state.patches_per_second),
            ("speed/share_of_time_waiting_for_data", engine.state.waiting),
        ):
            self.scalar(tag, value, epoch)
        self._flush()

    def _validated(self, validator: Engine) -> None:
        state, epoch = validator.state, self.trainer.state.epoch
        found = {name: float(value) for name, value in state.metrics.items() if np.ndim(value) == 0}
        details = state.metric_details.get(state.key_metric_name)
        for number, value in enumerate(_column_means(details)):
            label = self.labels.get(number + 1, f"label {number + 1}")
            found[f"{state.key_metric_name}/{label}"] = value
        self.trainer.state.last_metrics = found
        self.history.append({"epoch": epoch, **found})
        for name, value in found.items():
            self.scalar(f"validation/{name}", value, epoch)
        self._flush()

    def _flush(self) -> None:
        for writer in self._writers:
            writer.flush()


def _label_names(metadata: Path) -> dict[int, str]:
    with suppress(OSError, ValueError, KeyError, AttributeError):
        content = json.loads(metadata.read_text(encoding="utf-8"))
        names = content["network_data_format"]["outputs"]["pred"]["channel_def"]
        return {int(value): str(name) for value, name in names.items()}
    return {}


def _column_means(details: Any) -> list[float]:
    """Return the mean of each class over the cases in which it is defined; NaN if there are none."""
    if not isinstance(details, torch.Tensor) or details.ndim != 2:
        return []
    return [float(column[~column.isnan()].mean()) for column in details.detach().double().T]


class _TensorBoard:
    """TensorBoard event files. Steps from `first` on that an interrupted run logged before are purged."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first or None)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)

    def add_picture(self, tag: str, picture: NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(tag, picture, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """MLflow run in an SQLite file; a resumed run continues in the same file."""

    def __init__(self, folder: Path) -> None:
        # Set before the import, or MLflow would send telemetry.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        mlflow = require("mlflow", "The setting mlflow=true")
        self._client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        found = self._client.get_experiment_by_name("medseg")
        location = (folder.resolve() / "mlflow").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment("medseg", location)
        runs = self._client.search_runs([experiment], max_results=1)
        self._run = (runs[0] if runs else self._client.create_run(experiment)).info.run_id

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):
            self._client.log_metric(self._run, tag.replace(" ", "_"), value, step=step)

    def add_picture(self, tag: str, picture: NDArray[np.uint8], step: int) -> None:
        self._client.log_image(self._run, picture, key=tag.replace("/", "_"), step=step)

    def flush(self) -> None:
        pass  # each value is written at once

    def close(self) -> None:
        self._client.set_terminated(self._run)
