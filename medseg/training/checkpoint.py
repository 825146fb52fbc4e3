"""Checkpoints: the best weights, and the training state to resume from."""

from __future__ import annotations

import json
import logging
import pickle
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Events

from medseg.errors import RequestError, WeightsError
from medseg.files import replace_text, replacing, sha256_file
from medseg.notices import warn
from medseg.training.distributed import is_first_process
from medseg.training.handlers import completes_step
from medseg.training.randomness import generator_states, restore_generators

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ignite.engine import Engine
    from torch import nn

__all__ = ["Checkpoints", "RunFiles", "save_tensors"]

logger = logging.getLogger(__name__)


class Checkpoints:
    """Save the best weights to `models/model.pt` and the whole state to `<output_dir>/last.pt`.

    `model.pt` is the plain state dict of the network as validated; its SHA-256 is recorded in `configs/metadata.json`.
    The training state is saved after each epoch, and every few minutes within long epochs, always between two optimizer
    steps (see `RunFiles`). In distributed training only the first process writes. Attach this handler after all
    handlers whose state it saves.

    Args:
        bundle_root: Root folder of the trained bundle.
        output_dir: Folder of this run.
        validator: Engine whose key metric selects the best weights.
        state: Objects with `state_dict` and `load_state_dict`, by name; must contain `network`.
        resume: Whether to resume from the files in `output_dir`.
        save_minutes: Interval between saves within an epoch, in minutes; 0 saves only after epochs.

    Raises:
        RequestError: Negative `save_minutes`.
        WeightsError: On resuming, no training state was found, or it is damaged or belongs to a different run.
    """

    def __init__(
        self,
        bundle_root: str,
        output_dir: str,
        validator: Engine,
        state: dict[str, Any],
        *,
        resume: bool = False,
        save_minutes: float = 0.0,
    ) -> None:
        if not save_minutes >= 0:
            raise RequestError(f"save_minutes={save_minutes}: expected minutes, or 0 to save only after epochs")
        self.bundle_root = Path(bundle_root)
        self.files = RunFiles(Path(output_dir))
        self.validator = validator
        self.state = state
        self.resume = resume
        self.save_minutes = save_minutes
        self._saved = time.monotonic()

    @property
    def network(self) -> nn.Module:
        """The network without its wrappers."""
        network: nn.Module = self.state["network"]
        return network

    def attach(self, engine: Engine) -> None:
        """Register the handlers at the trainer and at the validator."""
        self.trainer = engine
        engine.add_event_handler(Events.STARTED, self.load if self.resume else self.begin)
        if self.save_minutes > 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.save_if_due)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_last)
        self.validator.add_event_handler(Events.EPOCH_COMPLETED, self.save_if_best)

    def begin(self) -> None:
        """Replace the files of an earlier run with the initial state of this one."""
        if is_first_process():
            self.files.clear()
        self.save_last()

    def save_if_best(self, validator: Engine) -> None:
        """Save the current weights if this validation is the best so far."""
        if validator.state.best_metric_epoch != validator.state.epoch or not is_first_process():
            return
        weights = self.bundle_root / "models" / "model.pt"
        save_tensors(self.network.state_dict(), weights)
        self._enter_hash(weights)

    def save_if_due(self, engine: Engine) -> None:
        """Save the state within an epoch; `save_last` covers the last step."""
        last = engine.state.iteration % engine.state.epoch_length == 0
        if not last and completes_step(engine) and time.monotonic() - self._saved >= 60 * self.save_minutes:
            self.save_last()

    def save_last(self) -> None:
        """Save the full training state."""
        self._saved = time.monotonic()
        if not is_first_process():
            return
        scaler = getattr(self.trainer, "scaler", None)
        progress = {
            "iteration": self.trainer.state.iteration,
            "epoch_length": self.trainer.state.epoch_length,
            "best_metric": float(self.validator.state.best_metric),
            "best_metric_epoch": self.validator.state.best_metric_epoch,
        }
        content = {name: item.state_dict() for name, item in self.state.items()}
        content |= {"progress": progress, "generators": generator_states()}
        content |= {"scaler": scaler.state_dict()} if scaler is not None else {}
        self.files.save(content)

    def load(self) -> None:
        """Restore the training state from the latest intact file."""
        saved, path = self.files.load()
        scaler = getattr(self.trainer, "scaler", None)
        try:
            for name, item in self.state.items():
                item.load_state_dict(saved[name])
            self._take_up(saved["progress"])
            if scaler is not None and "scaler" in saved:
                scaler.load_state_dict(saved["scaler"])
            restore_generators(saved["generators"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeightsError(
                f"cannot resume from '{path}': the state belongs to a different run ({error})"
            ) from error

    def _take_up(self, progress: Mapping[str, Any]) -> None:
        state = self.trainer.state
        if progress["epoch_length"] != state.epoch_length:
            raise ValueError(f"its epochs have {progress['epoch_length']} steps, expected {state.epoch_length}")
        state.iteration = progress["iteration"]
        # The engine increments the epoch when it starts.
        state.epoch = progress["iteration"] // progress["epoch_length"]
        self.validator.state.best_metric = progress["best_metric"]
        self.validator.state.best_metric_epoch = progress["best_metric_epoch"]

    def _enter_hash(self, weights: Path) -> None:
        path = self.bundle_root / "configs" / "metadata.json"
        if not path.is_file():
            return
        metadata = json.loads(path.read_text(encoding="utf-8"))
        entry = metadata.setdefault("weights", {}).setdefault("models/model.pt", {})
        entry["sha256"] = sha256_file(weights)
        replace_text(path, json.dumps(metadata, indent=2) + "\n")


class RunFiles:
    """Training state on disk: `last.pt`, `previous.pt` and the list of their SHA-256 hashes, `last.json`.

    At any moment at least one of the two files is intact and listed. The new state is written to a temporary file; its
    hash is added to the list; the old file is renamed to `previous.pt`; the new file is renamed to `last.pt`. A file
    whose hash is not listed is incomplete or modified and is never loaded.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.last = folder / "last.pt"
        self.previous = folder / "previous.pt"
        self.list = folder / "last.json"
        self._written: str | None = None

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        self._written = None
        for path in (self.list, self.last, self.previous):
            path.unlink(missing_ok=True)

    def save(self, content: Mapping[str, Any]) -> None:
        """Write a state and keep the previous one.

        Raises:
            OutputError: The state cannot be written; existing files are unchanged.
        """
        self._remove_remains()
        before, path = (self._written, self.last) if self._written else self._latest()
        with replacing(self.last) as temporary:
            with temporary.open("wb") as file:
                torch.save(dict(content), file)
            written = sha256_file(temporary)
            replace_text(self.list, json.dumps({"sha256": [written, *([before] if before else [])]}) + "\n")
            if path == self.last:
                self.last.replace(self.previous)
        self._written = written

    def load(self) -> tuple[dict[str, Any], Path]:
        """Return the latest intact state and its file.

        Raises:
            WeightsError: No intact state.
        """
        if not (self.last.is_file() or self.previous.is_file()):
            raise WeightsError(f"nothing to resume: '{self.last}' does not exist; start without resume")
        _, path = self._latest()
        if path is None:
            raise WeightsError(
                f"cannot resume from '{self.last}': the file is incomplete or was modified (SHA-256 not listed in "
                f"'{self.list.name}'), and no intact earlier state exists. Start again without resume"
            )
        if path == self.previous:
            text = "training resumes from the previous state"
            warn(logger, "checkpoint-previous", text, path, run=True)
        return _read(path), path

    def _latest(self) -> tuple[str | None, Path | None]:
        """Return hash and path of the latest intact file."""
        known = self._known()
        for path in (self.last, self.previous):
            found = sha256_file(path) if path.is_file() else None
            if found in known:
                return found, path
            if found:
                text = "damaged training state (SHA-256 mismatch); the file is not used"
                warn(logger, "checkpoint-damaged", text, path, run=True)
        return None, None

    def _known(self) -> list[str]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return [str(value) for value in json.loads(self.list.read_text(encoding="utf-8"))["sha256"]]
        return []

    def _remove_remains(self) -> None:
        """Remove temporary files of a killed process."""
        for path in self.last.parent.glob(".partial-*"):
            if path.name.endswith(("-last.pt", "-last.json")):
                path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"cannot resume from '{path}': unreadable file ({error})") from error
    return content


def save_tensors(content: Any, path: Path) -> Path:
    """Write a state dict, or a dictionary of state dicts, and return its path; equal tensors give identical files.

    Raises:
        OutputError: The file cannot be written; an existing file is unchanged.
    """
    # Given a path, torch stores its name in the file, so equal weights would give different files.
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
    return path
