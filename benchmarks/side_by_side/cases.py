"""Images of the benchmark, written once to the work folder, each in a separate process.

    python -m side_by_side.cases FOLDER CASE
    python -m side_by_side.cases FOLDER training

The phantoms are drawn by `medseg.studies.phantoms` at half the resolution, brought to the full one by linear
interpolation, and given noise there, so that they compress and resample as scans do. They lie like a CT that was
converted from DICOM: axis-aligned, x and y running to the left and to the back. The liver is 50 HU brighter than in the
phantoms, as after contrast agent, so that a small network learns it in minutes. A fifth class is derived from the
attenuation: unlabeled voxels above 200 HU are bone (muscle has 40, the spongiest bone 330, noise a deviation of 20).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from PIL import Image

from medseg.studies.phantoms import Phantom, make_phantom
from side_by_side.settings import DATA, image_path, truth_path

SEED = 20
LIVER, CONTRAST_HU = 2, 50
BONE, BONE_HU = 4, 200
NOISE_HU = 12.0
# Shape in voxels and spacing in mm of each case.
PHANTOMS: dict[str, tuple[tuple[int, int, int], tuple[float, float, float]]] = {
    "phantom": ((512, 512, 300), (0.8, 0.8, 1.0)),
    "phantom800": ((512, 512, 800), (0.8, 0.8, 1.0)),
    "small": ((160, 160, 100), (2.0, 2.0, 2.5)),
}
PHANTOMS |= {f"slices{count}": ((512, 512, count), (0.8, 0.8, 1.0)) for count in (100, 200, 400, 800)}
TRAINING_CASES, VALIDATION_CASES = 8, 2
TILE_SIDE = 4096


def write_case(folder: Path, case: str) -> None:
    """Write an image and its reference segmentation, if any; the image is written last."""
    truth_path(folder, case).parent.mkdir(parents=True, exist_ok=True)
    target = image_path(folder, case)
    if case in PHANTOMS:
        _write_phantom(folder, case, *PHANTOMS[case])
    elif case == "liver":
        shutil.copyfile(DATA / "ct_liver_crlm" / "imagesTs" / "CRLM-CT-1004.nii.gz", target)
    elif case == "hippocampus":
        stem = json.loads((DATA / "msd_hippocampus" / "split.json").read_text(encoding="utf-8"))["val"][0]
        shutil.copyfile(DATA / "msd_hippocampus" / "labelsTr" / f"{stem}.nii.gz", truth_path(folder, case))
        shutil.copyfile(DATA / "msd_hippocampus" / "imagesTr" / f"{stem}.nii.gz", target)
    else:
        Image.fromarray(tile(TILE_SIDE)).save(target)


def write_training(folder: Path) -> None:
    """Write the phantoms that the light network is trained on: other torsos, drawn at the model's spacing."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f"torso_{case:02d}" for case in range(TRAINING_CASES + VALIDATION_CASES)]
    for case, name in enumerate(names):
        phantom = torso(case, seed=SEED + 1, shape=(205, 205, 150), spacing=(2.0, 2.0, 2.0))
        save(phantom.image, phantom.affine, folder / "images" / f"{name}.nii.gz")
        save(phantom.label, phantom.affine, folder / "labels" / f"{name}.nii.gz")
    split = {"train": names[:TRAINING_CASES], "val": names[TRAINING_CASES:]}
    (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")


def torso(case: int, **options: Any) -> Phantom:
    """Draw a phantom with a contrast-enhanced liver and with bone as an additional class."""
    phantom = make_phantom(case, **options)
    image, label = phantom.image.copy(), phantom.label.copy()
    label[(image > BONE_HU) & (label == 0)] = BONE
    image[label == LIVER] += CONTRAST_HU
    return Phantom(image, label, phantom.affine)


def save(array: Any, affine: Any, path: Path) -> None:
    """Write a NIfTI file in the data type of the array, in mm."""
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _write_phantom(folder: Path, case: str, shape: tuple[int, int, int], spacing: tuple[float, ...]) -> None:
    half = [max(side // 2, 64) for side in shape]
    phantom = torso(0, seed=SEED, shape=half, spacing=[2 * step for step in spacing])
    # To LPS orientation: the phantom's axes have the opposite direction unless mirrored.
    mirrored = [axis for axis in range(3) if (phantom.affine[axis, axis] > 0) == (axis < 2)]
    image, label = (np.flip(array, mirrored) for array in (phantom.image, phantom.label))
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = np.array([1, 1, -1]) * (np.array(shape) - 1) * spacing / 2
    save(_enlarged(label, shape, mode="nearest-exact").to(torch.uint8).numpy(), affine, truth_path(folder, case))
    fine = _enlarged(image, shape, mode="trilinear")
    fine += torch.randn(fine.shape, generator=torch.Generator().manual_seed(SEED)) * NOISE_HU
    save(fine.round_().clamp_(-1024, 3071).to(torch.int16).numpy(), affine, image_path(folder, case))


def _enlarged(array: Any, shape: tuple[int, int, int], *, mode: str) -> torch.Tensor:
    values = torch.from_numpy(np.ascontiguousarray(array)).float()[None, None]
    return torch.nn.functional.interpolate(values, size=shape, mode=mode)[0, 0]


def tile(side: int) -> Any:
    """Return a uint8 image `(side, side, 3)` of stained tissue: pale background, pink stroma, round purple nuclei."""
    rng = np.random.default_rng(SEED)
    ground = np.array([238.0, 228.0, 235.0])
    stroma, nuclei = np.array([-25.0, -80.0, -40.0]), np.array([-120.0, -130.0, -60.0])
    wide = _smooth(rng, side, 64)[..., None] > 0.45
    fine = _smooth(rng, side, 8)[..., None] > 0.68
    picture = ground + stroma * wide + nuclei * (wide & fine) + rng.normal(0, 6, (side, side, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def _smooth(rng: np.random.Generator, side: int, grain: int) -> Any:
    coarse = torch.from_numpy(rng.random((1, 1, side // grain, side // grain), dtype=np.float32))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[0, 0].numpy()


if __name__ == "__main__":
    place, wanted = Path(sys.argv[1]), sys.argv[2]
    if wanted == "training":
        write_training(place / "training")
    else:
        write_case(place, wanted)
