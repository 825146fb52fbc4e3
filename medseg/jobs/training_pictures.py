"""Overlays of a few validation cases during training, for the log and as files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ignite.engine import Events

from medseg.files import replacing
from medseg.io.names import split_suffix
from medseg.io.readers import load
from medseg.notices import warn
from medseg.reporting.overlay import draw_image, draw_volume
from medseg.training.distributed import is_first_process

if TYPE_CHECKING:
    from ignite.engine import Engine
    from numpy.typing import NDArray
    from PIL import Image

    from medseg.training.run_log import RunLog

__all__ = ["PredictionPictures"]

logger = logging.getLogger(__name__)


class PredictionPictures:
    """Draw the first validation cases with the contours of prediction and truth, every few validations.

    They go to the log, and as PNG to `<output_dir>/pictures/<case>/`. An overlay that fails to draw is skipped with a
    warning and never ends a training.

    Args:
        output_dir: Folder of the run.
        validator: Engine whose batches are single cases, with prediction and label as one-hot classes in native space.
        log: Log of the run, which receives the overlays.
        cases: Number of cases to draw; 0 for none.
        interval: Number of validations between two logged overlays.
    """

    def __init__(self, output_dir: str, validator: Engine, log: RunLog, *, cases: int = 2, interval: int = 1) -> None:
        self.folder = Path(output_dir) / "pictures"
        self.validator = validator
        self.log = log
        self.cases = cases
        self.interval = interval
        self.validations = 0

    def attach(self, engine: Engine) -> None:
        """Follow the validator's cases; `engine` is the trainer, whose epochs number the overlays."""
        self.trainer = engine
        if self.cases > 0 and self.interval > 0 and is_first_process():
            self.validator.add_event_handler(Events.STARTED, self._count)
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, self.draw)

    def _count(self) -> None:
        self.validations += 1

    def draw(self, validator: Engine) -> None:
        """Draw the case just predicted, if it is due."""
        if validator.state.iteration > self.cases or (self.validations - 1) % self.interval:
            return
        epoch = self.trainer.state.epoch
        try:
            batch, output = validator.state.batch[0], validator.state.output[0]
            name = _folder_name(str(batch.get("name") or f"case {validator.state.iteration}"))
            drawing = _drawn(batch, output, f"{name}, epoch {epoch}")
            with replacing(self.folder / name / f"epoch_{epoch:05d}.png") as temporary:
                drawing.save(temporary, format="PNG")
            self.log.picture(f"prediction/{name}", np.asarray(drawing.convert("RGB")), epoch)
        except Exception as error:
            text = f"overlay of epoch {epoch} skipped: {type(error).__name__}: {error}"
            warn(logger, "overlay-skipped", text, run=True)


def _folder_name(case: str) -> str:
    """Return a folder's name for a case: `a/scan.1.nii.gz` and `b/scan.2.nii.gz` have one each."""
    return split_suffix(case)[0].replace("/", "_").lstrip(".") or "case"


def _drawn(batch: Any, output: Any, title: str) -> Image.Image:
    """Draw prediction and reference on the image in native space."""
    mask, truth = (_classes(output[key]) for key in ("pred", "label"))
    image = batch["image"]
    dims = mask.ndim
    native = load(image.meta["filename_or_obj"], channels=image.shape[0], spatial_dims=dims, dtype="stored")
    voxels = np.asarray(native)
    if dims == 2:
        shown = voxels.T.astype(np.uint8) if len(voxels) == 3 else voxels[0].T
        return draw_image(shown, mask.T, truth=truth.T, title=title)
    return draw_volume(voxels[0], mask, native.affine.numpy(), truth=truth, title=title)


def _classes(one_hot: Any) -> NDArray[np.uint16]:
    """Class numbers `(*spatial)` of one-hot classes `(C, *spatial)`."""
    return np.asarray(torch.as_tensor(one_hot).argmax(0).cpu()).astype(np.uint16)
