"""Samples that a bundle is tried on: of its dimensions, channels and label values, and the same for a seed."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg.bundle.catalog import Bundle
from medseg.io import find_dataset
from medseg.tools.samples import label_values, write_case, write_samples


@pytest.fixture
def bundle(make_bundle: Any, tiny_source: dict[str, Any]) -> Any:
    """Return a function that makes a bundle of a template with so many channels, and a mapping of label values."""

    def make(template: str, channels: int = 1, mapping: dict[str, int] | None = None) -> Bundle:
        source = copy.deepcopy(tiny_source)
        source |= {"template": template, "channels": {str(n): f"channel {n}" for n in range(channels)}}
        source["network_def"] |= {"in_channels": channels}
        if template != "mr_volume":
            source["network_def"] |= {"spatial_dims": 2}
            source["knobs"] = {"patch_size": [32, 32], "roi_size": [32, 32]}
        if mapping is not None:
            source["label_mapping"] = mapping
        made: Bundle = make_bundle(source)
        return made

    return make


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*.png") if path.is_file())
    return {path.name + path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("channels", [1, 2])
def test_volumes_have_the_channels_and_labels_of_the_bundle(channels: int, bundle: Any, tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "set", bundle("mr_volume", channels), cases=3)
    pairs = find_dataset(folder, "train") + find_dataset(folder, "val")
    assert [Path(pair["image"]).name for pair in pairs] == [f"case_{n}.nii.gz" for n in range(3)]
    for pair in pairs:
        image, label = nibabel.load(pair["image"]), nibabel.load(pair["label"])
        assert image.shape == (*label.shape, 2)[: 3 if channels == 1 else 4]
        np.testing.assert_array_equal(image.affine, label.affine)
        assert set(np.unique(np.asarray(label.dataobj))) == {0, 1, 2}
        values = np.asarray(image.dataobj)
        assert 0 <= values.min() < values.max() <= 255


@pytest.mark.parametrize(("template", "channels", "mode"), [("grey_image", 1, "L"), ("rgb_image", 3, "RGB")])
def test_images_have_the_mode_of_the_bundle(
    template: str, channels: int, mode: str, bundle: Any, tmp_path: Path
) -> None:
    folder = write_samples(tmp_path / "set", bundle(template, channels), cases=2)
    (pair,) = find_dataset(folder, "train")
    with Image.open(pair["image"]) as image, Image.open(pair["label"]) as label:
        assert (image.mode, image.size) == (mode, label.size)
        assert set(np.unique(np.asarray(label))) == {0, 1, 2}


def test_a_seed_decides_the_shapes(bundle: Any, tmp_path: Path) -> None:
    made = bundle("grey_image")
    one, again, other = (
        digests(write_samples(tmp_path / name, made, seed=seed)) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert one == again
    assert len(one) == 6
    assert not set(one.values()) & set(other.values())


@pytest.mark.parametrize(
    ("mapping", "values"),
    [
        (None, [0, 1, 2]),
        ({"0": 0, "3": 1, "7": 2}, [0, 3, 7]),
        ({"0": 0, "100": 1, "255": 2}, [0, 100, 255]),
        ({"0": 0, "300": 1, "5": 2}, [0, 300, 5]),
        # Two values of one class: the first stands for it.
        ({"0": 0, "4": 1, "5": 1, "6": 2}, [0, 4, 6]),
        # Any other value is class 1; the first free one stands for it.
        ({"0": 0, "1": 2, "other": 1}, [0, 2, 1]),
    ],
)
def test_label_files_hold_the_values_that_the_bundle_maps(
    mapping: dict[str, int] | None, values: list[int], bundle: Any, tmp_path: Path
) -> None:
    made = bundle("mr_volume", 1, mapping)
    found = label_values(made)
    assert found.tolist() == values
    assert found.dtype == np.min_scalar_type(max(values))
    folder = write_samples(tmp_path / "set", made, cases=2)
    (pair,) = find_dataset(folder, "train")
    assert set(np.unique(np.asarray(nibabel.load(pair["label"]).dataobj)).tolist()) == set(values)


def test_a_case_is_written_with_its_spacing_and_listed_relative_to_its_folder(tmp_path: Path) -> None:
    image, label = np.full((1, 4, 5, 6), 12.7), np.ones((4, 5, 6), np.uint8)
    pair = write_case(tmp_path, "a", image, label, spacing=(0.5, 0.75, 3.0))
    assert pair == {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    loaded = nibabel.load(tmp_path / pair["image"])
    assert loaded.header.get_zooms() == (0.5, 0.75, 3.0)
    assert loaded.get_data_dtype() == np.int16
    assert np.asarray(loaded.dataobj).max() == 12


def test_an_image_is_written_with_x_along_its_width(tmp_path: Path) -> None:
    image, label = np.zeros((3, 8, 5)), np.zeros((8, 5), np.uint8)
    image[0, 7, 0], label[7, 0] = 300, 2
    pair = write_case(tmp_path, "a", image, label)
    assert pair == {"image": "images/a.png", "label": "labels/a.png"}
    with Image.open(tmp_path / pair["image"]) as opened:
        assert opened.size == (8, 5)
        assert opened.getpixel((7, 0)) == (255, 0, 0)
    with Image.open(tmp_path / pair["label"]) as opened:
        assert opened.getpixel((7, 0)) == 2


def test_the_last_case_is_for_validation(bundle: Any, tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "set", bundle("grey_image"), cases=4)
    content = json.loads((folder / "dataset.json").read_text())
    assert [len(content[part]) for part in ("training", "validation", "test")] == [3, 1, 0]
    assert content["validation"][0]["image"].startswith("images/case_3")
