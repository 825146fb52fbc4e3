"""The two files that training leaves: the best weights and the state to resume from."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Events

from medseg.errors import WeightsError
from medseg.files import replace_text, replacing, sha256_file

if TYPE_CHECKING:
    from ignite.engine import Engine
    from torch import nn


__all__ = ["Checkpoints", "save_tensors"]


class Checkpoints:
    """Save the best weights to `models/model.pt` and the whole state to `<output_dir>/last.pt` each epoch.

    `model.pt` is the plain state dict of the network as it was validated; its SHA-256 is entered in
    `configs/metadata.json`. Both files are replaced whole. Attach it after all handlers whose state it saves.

    Args:
        bundle_root: the bundle that is trained.
        output_dir: folder of this run.
        validator: engine whose key metric decides what is best.
        state: objects with `state_dict` and `load_state_dict`, by name; must hold the `network`.
        resume: go on from `last.pt` in `output_dir`.

    Raises:
        WeightsError: on resuming, when `last.pt` is missing, unreadable or of another run.
    """

    def __init__(
        self, bundle_root: str, output_dir: str, validator: Engine, state: dict[str, Any], *, resume: bool = False
    ) -> None:
        self.bundle_root = Path(bundle_root)
        self.last = Path(output_dir) / "last.pt"
        self.validator = validator
        self.state = state
        self.resume = resume

    @property
    def network(self) -> nn.Module:
        """The bare network."""
        network: nn.Module = self.state["network"]
        return network

    def attach(self, engine: Engine) -> None:
        """Listen to the trainer's epochs and to the validator's results."""
        self.trainer = engine
        if self.resume:
            engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save_last)
        self.validator.add_event_handler(Events.EPOCH_COMPLETED, self.save_if_best)

    def save_if_best(self, validator: Engine) -> None:
        """Save the network's present weights if this validation is the best so far."""
        if validator.state.best_metric_epoch != validator.state.epoch:
            return
        weights = self.bundle_root / "models" / "model.pt"
        save_tensors(self.network.state_dict(), weights)
        self._enter_hash(weights)

    def save_last(self) -> None:
        """Save everything that a resumed run needs."""
        state = {name: item.state_dict() for name, item in self.state.items()}
        progress = {
            "epoch": self.trainer.state.epoch,
            "iteration": self.trainer.state.iteration,
            "best_metric": float(self.validator.state.best_metric),
            "best_metric_epoch": self.validator.state.best_metric_epoch,
        }
        save_tensors({**state, "progress": progress}, self.last)

    def load(self) -> None:
        """Restore the state of `last.pt`."""
        if not self.last.is_file():
            raise WeightsError(f"nothing to resume: '{self.last}' does not exist; start without resume")
        try:
            saved = torch.load(self.last, map_location="cpu", weights_only=True)
            for name, item in self.state.items():
                item.load_state_dict(saved[name])
            progress = saved["progress"]
        except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise WeightsError(
                f"cannot resume from '{self.last}': it is damaged or of another run ({error})"
            ) from error
        self.trainer.state.epoch = progress["epoch"]
        self.trainer.state.iteration = progress["iteration"]
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


def save_tensors(content: Any, path: Path) -> Path:
    """Write a state dict, or a dictionary of such, so that equal tensors are equal bytes; return the path.

    Raises:
        OutputError: the file cannot be written; an older one is left as it was.
    """
    # Given a path, torch writes its name into the file, and equal weights would be unequal bytes.
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
    return path
