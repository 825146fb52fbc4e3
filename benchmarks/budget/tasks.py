"""Data sets of `benchmarks/training.py`, their cases in the formats of the contestants, and the score."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel
import numpy as np
from PIL import Image
from side_by_side.settings import DATA

from medseg.io import find_dataset

__all__ = ["TASKS", "Task"]


@dataclass(frozen=True)
class Task:
    """One data set.

    Attributes:
        name: folder of the data.
        bundle: name of the bundle to plan.
        labels: value -> name, the background included.
        patch: of the plain script.
        batch: of the plain script.
        number: of nnU-Net's data set.
        configuration: nnU-Net's.
    """

    name: str
    bundle: str
    labels: dict[str, str]
    patch: tuple[int, ...]
    batch: int
    number: int
    configuration: str

    @property
    def root(self) -> Path:
        """Folder of the data set."""
        return DATA / self.name

    @property
    def pictures(self) -> bool:
        """Whether the cases are 2D images."""
        return len(self.patch) == 2

    @property
    def ending(self) -> str:
        """Suffix of images, labels and masks."""
        return ".png" if self.pictures else ".nii.gz"

    def cases(self, split: str) -> list[dict[str, Any]]:
        """Return the cases of the data set."""
        return find_dataset(self.root, split)

    def prepared(self, split: str, folder: Path) -> list[dict[str, Any]]:
        """Return the cases for the other contestants: 2D images in RGB, with classes instead of instance numbers."""
        if not self.pictures:
            return self.cases(split)
        return [self._converted(case, folder) for case in self.cases(split)]

    def _converted(self, case: dict[str, Any], folder: Path) -> dict[str, Any]:
        found = {part: folder / self.name / part / f"{Path(case[part]).stem}.png" for part in ("image", "label")}
        for path in found.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if not found["label"].is_file():
            Image.open(case["image"]).convert("RGB").save(found["image"])
            Image.fromarray((np.asarray(Image.open(case["label"])) > 0).astype(np.uint8)).save(found["label"])
        return {**case, **{part: str(path) for part, path in found.items()}}

    def scores(self, masks: Path) -> dict[str, dict[str, float]]:
        """Return the Dice of each label and their mean for each validation case."""
        values = [int(value) for value in self.labels if value != "0"]
        found = {}
        for case in self.cases("val"):
            truth, mask = self._pair(Path(case["label"]), masks / (Path(case["image"]).name))
            dice = {str(n): _dice(truth == n, mask == n) for n in values}
            found[case["name"]] = {**dice, "mean": statistics.fmean(dice.values())}
        return found

    def _pair(self, label: Path, mask: Path) -> tuple[Any, Any]:
        if self.pictures:
            truth, found = (np.asarray(Image.open(path)) for path in (label, mask.with_suffix(".png")))
            truth, aligned = (truth > 0).astype(np.uint8), truth.shape == found.shape
        else:
            images = [nibabel.load(path) for path in (label, mask)]
            truth, found = (np.asanyarray(image.dataobj).astype(np.uint8) for image in images)
            aligned = truth.shape == found.shape and np.allclose(images[0].affine, images[1].affine, atol=1e-3)
        if not aligned:
            raise SystemExit(f"geometry mismatch between {mask} and its label")
        return truth, found


def _dice(a: Any, b: Any) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


TASKS: Final = {
    task.name: task
    for task in (
        Task(
            "msd_hippocampus",
            "hippocampus_mri_unet",
            {"0": "background", "1": "anterior", "2": "posterior"},
            # BasicUNet halves four times: of a patch of 40 it would leave two voxels, where torch 2.13 computes wrong
            # gradients in bfloat16 on a CPU, and the training ends in NaN.
            (48, 64, 48),
            2,
            4,
            "3d_fullres",
        ),
        Task("dsb2018", "nuclei_microscopy_unet", {"0": "background", "1": "nucleus"}, (256, 256), 8, 18, "2d"),
    )
}
