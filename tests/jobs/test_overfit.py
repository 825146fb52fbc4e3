"""Each shipped bundle learns two generated images of its own kind by heart, through its own configs.

What is shown is that the parts of a bundle fit together and learn: loading, label mapping, grid, intensities, crops,
the network, its loss with all its outputs, sliding windows and scoring. It says nothing about accuracy: the images are
blobs whose brightness tells the class, those that are scored are those that were trained on, the network is a narrow
form of the bundle's, and changes of brightness and noise are left out of the augmentation.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle, merged
from medseg.jobs import api
from medseg.tools.samples import label_values, write_case
from tests.bundle.shipped import shipped

SIDE = {2: 96, 3: 32}
WIDTH = 8
# Mean Dice of the foreground classes.
LEARNED = 0.8
# A volume and a picture with losses of their own; the others are for `-m full_check`.
EVERY_RUN = ("hippocampus_mri_uctransnet", "gland_pathology_unet_selfreg")
UNPADDED = 252  # 252 = 16 * 12 + 60: a legal side of an unpadded U-Net with four poolings


def narrow_copy(bundle: Bundle, folder: Path) -> Bundle:
    """Write the bundle again, with fewer channels and no changes of brightness."""
    source = json.loads((bundle.root / "bundle.json").read_text(encoding="utf-8"))
    network = source["network_def"]
    first = network["features"][0] if "features" in network else network["base_width"]
    for name in ("features", "base_width", "reduce_dim", "aspp_dim"):
        if name in network:
            network[name] = _divided(network[name], max(1, first // WIDTH))
    source["blocks"] = {"appearance": [], **source.get("blocks", {})}
    copy = Bundle(folder / bundle.name)
    copy.root.mkdir(parents=True)
    (copy.root / "bundle.json").write_text(json.dumps(source), encoding="utf-8")
    build(copy)
    return copy


def _divided(width: Any, factor: int) -> Any:
    return [n // factor for n in width] if isinstance(width, list) else width // factor


def write_cases(folder: Path, bundle: Bundle, config: dict[str, Any]) -> None:
    """Write two labeled images as the bundle expects them, for training, and copies of both for validation."""
    values, pairs = label_values(bundle), []
    for name in ("one", "two", "one_again", "two_again"):
        classes = blobs(config, seed=name.startswith("two"))
        image = brightness(classes, config)
        pairs.append(write_case(folder, name, image, values[classes], spacing=config.get("spacing", ())))
    splits = {"training": pairs[:2], "validation": pairs[2:]}
    (folder / "dataset.json").write_text(json.dumps(splits), encoding="utf-8")


def blobs(config: dict[str, Any], *, seed: int) -> NDArray[np.intp]:
    """Return a map of class indices: a ball of each class, each in its own cell of a lattice."""
    dims, number = config["spatial_dims"], config["out_channels"] - 1
    rng = np.random.default_rng(seed)
    cells = math.ceil(number ** (1 / dims) - 1e-9)
    side = SIDE[dims] / cells
    grid = np.stack(np.meshgrid(*[np.arange(SIDE[dims])] * dims, indexing="ij"))
    found = np.zeros([SIDE[dims]] * dims, np.intp)
    places = rng.permutation(cells**dims)[:number]
    for index, place in enumerate(places, start=1):
        corner = np.array(np.unravel_index(place, [cells] * dims)) * side
        center = corner + side * rng.uniform(0.42, 0.58, dims)
        distance = ((grid - center.reshape(-1, *[1] * dims)) ** 2).sum(0)
        found[distance < (0.38 * side) ** 2] = index
    return found


def brightness(classes: NDArray[np.intp], config: dict[str, Any]) -> NDArray[np.float64]:
    """Spread the classes over the values that the bundle tells apart, with a little noise."""
    low, high = config.get("intensity_range", (0.0, 255.0 if config["spatial_dims"] == 2 else 1000.0))
    share = 0.2 + 0.7 * classes / (config["out_channels"] - 1)
    noisy = share + np.random.default_rng(2).normal(0, 0.01, (config["in_channels"], *classes.shape))
    return low + (high - low) * noisy


def short_training(config: dict[str, Any]) -> dict[str, Any]:
    """Return the knobs of a training of a few dozen steps, of those that the bundle has."""
    dims = config["spatial_dims"]
    side = UNPADDED if config.get("margin") else SIDE[dims]
    wanted = {
        "device_name": "cpu",
        "max_epochs": 4,
        "val_interval": 4,
        "steps_per_epoch": 12,
        "warmup_epochs": 0,
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "ema_decay": 0.0,
        "accumulate": 1,
        "batch_size": 2,
        "patches_per_case": 1,
        "num_workers": 0,
        "patience": 0,
        "pictures": 0,
        "overlap": 0.0,
        "patch_size": [side] * dims,
        "roi_size": [side] * dims,
    }
    return {name: value for name, value in wanted.items() if name in config}


@pytest.mark.slow
@pytest.mark.parametrize("bundle", shipped(EVERY_RUN))
def test_a_shipped_bundle_learns_two_images_by_heart(bundle: Bundle, tmp_path: Path) -> None:
    narrow = narrow_copy(bundle, tmp_path)
    config = merged(narrow.load_configs("train"))
    write_cases(tmp_path / "data", narrow, config)
    manifest = api.train(narrow.root, tmp_path / "data", settings=short_training(config))
    assert manifest.validations[-1]["val_mean_dice"] > LEARNED
