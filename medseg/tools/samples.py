"""A small data set of random shapes that fits a bundle, for testing it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
from PIL import Image

from medseg.files import load_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from medseg.bundle.catalog import Bundle

__all__ = ["label_values", "write_case", "write_samples"]

_VOLUME = (44, 60, 40)
_IMAGE = (96, 80)


def write_samples(folder: Path, bundle: Bundle, *, cases: int = 3, seed: int = 0) -> Path:
    """Write labeled random cases that the bundle can load; the last one is the validation case.

    Args:
        folder: Folder of the data set, created if missing.
        bundle: Bundle that determines channels, labels, label values and spatial dimensions.
        cases: Number of cases, at least 2.
        seed: Seed of the random shapes.

    Returns:
        Folder of the data set, for `dataset_dir`.
    """
    data_format = bundle.metadata["network_data_format"]
    channels = data_format["inputs"]["image"]["num_channels"]
    spatial_dims = len(data_format["inputs"]["image"]["spatial_shape"])
    values = label_values(bundle)
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(cases):
        image, label = _case(rng, spatial_dims, channels, len(values))
        pairs.append(write_case(folder, f"case_{number}", image, values[label]))
    splits = {"training": pairs[:-1], "validation": pairs[-1:], "test": []}
    (folder / "dataset.json").write_text(json.dumps({"name": bundle.name, **splits}), encoding="utf-8")
    return folder


def label_values(bundle: Bundle) -> NDArray[Any]:
    """Return a value in label files for each class."""
    path = bundle.config_path("train")
    mapping: dict[str, int] = load_json(path).get("label_mapping", {}) if path.is_file() else {}
    values = {index: index for index in range(len(bundle.label_names) + 1)}
    if "other" in mapping:
        values[mapping["other"]] = next(value for value in range(1, 256) if str(value) not in mapping)
    values |= {index: int(value) for value, index in reversed(mapping.items()) if value != "other"}
    return np.array([values[index] for index in sorted(values)], np.min_scalar_type(max(values.values())))


def _case(
    rng: np.random.Generator, spatial_dims: int, channels: int, classes: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return an image with one ball per class on a noisy background, whose intensity encodes the class."""
    shape = _VOLUME if spatial_dims == 3 else _IMAGE
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    label = np.zeros(shape, np.uint8)
    for value in range(1, classes):
        center = np.array([rng.uniform(0.3, 0.7) * n for n in shape]).reshape(-1, *(1,) * spatial_dims)
        label[((grid - center) ** 2).sum(0) < (0.2 * min(shape)) ** 2] = value
    image = 80 + 100 * label + rng.normal(0, 10, (channels, *shape))
    return image.clip(0, 255), label


def write_case(
    folder: Path, name: str, image: NDArray[Any], label: NDArray[Any], *, spacing: Sequence[float] = (1.0, 1.0, 1.5)
) -> dict[str, str]:
    """Write a labeled case: a volume as NIfTI, a 2D image as PNG.

    Args:
        folder: Folder of the data set, created if missing.
        name: Name of the case.
        image: Image `(C, *spatial)`, with values 0 to 255 in 2D and of int16 in 3D.
        label: Label map `(*spatial)`.
        spacing: Voxel spacing of a volume in mm.

    Returns:
        Paths of image and label relative to the folder, as an entry of `dataset.json`.
    """
    volume = label.ndim == 3
    ending = ".nii.gz" if volume else ".png"
    folders = {"image": "imagesTr", "label": "labelsTr"} if volume else {"image": "images", "label": "labels"}
    pair = {part: f"{parent}/{name}{ending}" for part, parent in folders.items()}
    pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    for part, values in (("image", pixels), ("label", label)):
        (folder / pair[part]).parent.mkdir(parents=True, exist_ok=True)
        if volume:
            kept = values.astype(np.int16) if part == "image" else values
            nibabel.save(nibabel.Nifti1Image(kept, np.diag([*spacing, 1.0])), folder / pair[part])
        else:
            Image.fromarray(values.clip(0, 255).astype(np.uint8).swapaxes(0, 1)).save(folder / pair[part])
    return pair
