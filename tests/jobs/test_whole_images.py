"""Bundles that see whole pictures, shrunk to one size: their masks lie on the pictures all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from medseg.bundle.catalog import Bundle, find_bundle, merged

NAMES = ("polyp_endoscopy_banet", "skin_dermoscopy_banet")
SIZE = (517, 300)


@pytest.fixture(params=NAMES)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return find_bundle(request.param)


def disc(width: int, height: int) -> NDArray[np.bool_]:
    """Return an off-center disc as `(width, height)`, the order of axes in which pictures are loaded."""
    x, y = np.meshgrid(np.arange(width), np.arange(height), indexing="ij")
    found: NDArray[np.bool_] = (x - 180.0) ** 2 + (y - 170.0) ** 2 < 80.0**2
    return found


def write_pair(folder: Path) -> tuple[Path, Path]:
    inside = disc(*SIZE)
    grey = np.where(inside, 220, 40).astype(np.uint8)
    image, label = folder / "image.png", folder / "label.png"
    Image.fromarray(np.repeat(grey.T[..., None], 3, axis=2)).save(image)
    Image.fromarray(inside.T.astype(np.uint8) * 255).save(label)
    return image, label


def bright() -> nn.Module:
    """Return a network whose second class is what is above 0 in the prepared picture."""
    network = nn.Conv2d(3, 2, kernel_size=1)
    with torch.no_grad():
        network.weight[:, :, 0, 0] = torch.tensor([[0.0], [1.0]])
        network.bias.zero_()  # type: ignore[union-attr]
    return network.eval()


def centroid(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.argwhere(mask).mean(0)
    return found


def parts(bundle: Bundle, config: str) -> ConfigParser:
    return ConfigParser(merged(bundle.load_configs(config)))


def test_the_mask_lies_on_a_picture_of_another_shape(bundle: Bundle, tmp_path: Path) -> None:
    image, _ = write_pair(tmp_path)
    config = parts(bundle, "inference")
    prepared: Any = config.get_parsed_content("preprocessing")({"image": str(image)})["image"]
    assert prepared.shape == (3, 256, 256)
    with torch.no_grad():
        mask = np.asarray(config.get_parsed_content("inferer")(prepared[None], bright()))[0, 0] == 1
    wanted = disc(*SIZE)
    assert mask.shape == wanted.shape
    assert (mask ^ wanted).sum() < 0.01 * wanted.sum()
    # A grid that is off by half a voxel of the model would move it by half a pixel or more.
    assert np.abs(centroid(mask) - centroid(wanted)).max() < 0.1


def test_picture_and_label_are_shrunk_alike(bundle: Bundle, tmp_path: Path) -> None:
    image, label = write_pair(tmp_path)
    steps = parts(bundle, "train").get_parsed_content("train::preprocessing").transforms
    case: Any = {"image": str(image), "label": str(label)}
    for step in steps[:4]:  # load, map, shrink, scale
        case = step(case)
    bright_side, marked = np.asarray(case["image"][0]) > 0, np.asarray(case["label"][0])
    assert marked.shape == (256, 256)
    assert set(np.unique(marked)) == {0, 1}
    assert np.abs(centroid(bright_side) - centroid(marked == 1)).max() < 0.1
