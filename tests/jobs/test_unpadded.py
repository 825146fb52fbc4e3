"""Bundles of unpadded networks: trained, scored and run by overlapping tiles; masks that number objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from medseg.bundle.catalog import Bundle, find_bundle
from medseg.bundle.compose import compose
from medseg.errors import SizeError
from medseg.jobs import api
from medseg.tools.samples import write_samples
from medseg.transforms.objects import NumberObjectsd

NAMES = ("cells_phase_unet", "membrane_em_unet")
SMALL: dict[str, Any] = {"margin": 20, "patch_size": [92, 76], "roi_size": [92, 92], "rotations": 2}
SHORT = {"max_epochs": 2, "val_interval": 1, "num_workers": 0, "pictures": 1, "learning_rate": 0.05}


def _source(name: str) -> dict[str, Any]:
    """Return a bundle.json with a network of two levels, for a second of training."""
    source: dict[str, Any] = json.loads((find_bundle(name).root / "bundle.json").read_text(encoding="utf-8"))
    source["network_def"]["features"] = [4, 8, 16]
    source["knobs"] |= {**SMALL, "precision": "float32"}
    return source


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with one ball each."""
    return write_samples(tmp_path_factory.mktemp("data"), find_bundle("cells_phase_unet"), cases=3)


@pytest.fixture(scope="module")
def membranes(make_bundle: Any) -> Bundle:
    """A small bundle of classes, not trained."""
    bundle: Bundle = make_bundle(_source("membrane_em_unet"))
    return bundle


@pytest.fixture(scope="module")
def trained(make_bundle: Any, data: Path) -> Bundle:
    """A small bundle that numbers objects, trained for a moment."""
    bundle: Bundle = make_bundle(_source("cells_phase_unet"))
    manifest = api.train(bundle.root, data, settings=SHORT)
    assert manifest.status == "done"
    return bundle


def _mask(bundle: Bundle, image: Path, output: Path, **settings: Any) -> np.ndarray:
    manifest = api.predict(bundle.root, image, output, settings=settings)
    assert [record.error for record in manifest.cases.values()] == [None]
    with Image.open(output / image.name) as file:
        return np.asarray(file)


@pytest.mark.parametrize("name", NAMES)
def test_margin_and_sizes_are_those_of_the_network(name: str) -> None:
    bundle = find_bundle(name)
    config = bundle.load_configs("train")["train.json"]
    declared = bundle.metadata["network_data_format"]
    with FakeTensorMode():
        network = ConfigParser(config).get_parsed_content("network_def")
        logits = network(torch.empty(1, 1, *declared["inputs"]["image"]["spatial_shape"]))
    assert network.margin == (config["margin"],) * 2
    assert list(logits.shape[2:]) == declared["outputs"]["pred"]["spatial_shape"] == [388, 388]
    assert config["patch_size"] == declared["inputs"]["image"]["spatial_shape"]


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_network_fits_into_the_bundle(name: str) -> None:
    source = json.loads((find_bundle(name).root / "bundle.json").read_text(encoding="utf-8"))
    source["network_def"]["features"] = [64, 128, 256, 512, 1024]
    config = compose(source)["train"]
    with FakeTensorMode():
        network = ConfigParser(config).get_parsed_content("network_def")
        assert network(torch.empty(1, 1, *config["patch_size"])).shape == (1, 2, 388, 388)
    assert sum(weight.numel() for weight in network.parameters()) == 31_030_658


def test_validation_while_training_is_the_evaluation_after_it(trained: Bundle, data: Path, tmp_path: Path) -> None:
    scores = api.evaluate(trained.root, data, output=tmp_path).cases
    (score,) = [record.metrics["cell"] for record in scores.values()]
    run = json.loads((trained.root / "runs" / "train" / "manifest.json").read_text(encoding="utf-8"))
    found = [entry["val_mean_dice"] for entry in run["validations"]]
    assert len(found) == 2
    assert score == pytest.approx(max(found), abs=1e-6)


def test_scores_are_of_classes_and_masks_of_objects(trained: Bundle, data: Path, tmp_path: Path) -> None:
    (case,) = json.loads((data / "dataset.json").read_text(encoding="utf-8"))["validation"]
    image = data / case["image"]
    options = {"min_object_size": 5, "grow_objects": 1}
    classes = _mask(trained, image, tmp_path / "classes", number_objects=False)
    assert set(np.unique(classes)) == {0, 1}
    numbered = NumberObjectsd("pred", min_size=5, fill_holes=True, grow=1)
    # The rows of a file are the second axis of what is loaded.
    expected = numbered({"pred": torch.from_numpy(classes.T.astype(np.int32))[None]})["pred"][0].numpy().T
    found = _mask(trained, image, tmp_path / "objects", **options)
    assert found.max() > 1
    assert np.array_equal(found, expected)
    scores = api.evaluate(trained.root, data, output=tmp_path / "scores").cases
    (score,) = [record.metrics["cell"] for record in scores.values()]
    with Image.open(data / case["label"]) as file:
        truth = np.asarray(file) > 0
    assert score == pytest.approx(2 * (truth & (classes > 0)).sum() / (truth.sum() + classes.sum()), abs=1e-6)


def test_a_margin_of_another_network_is_refused(membranes: Bundle, tmp_path: Path) -> None:
    data = write_samples(tmp_path, membranes)
    with pytest.raises(SizeError, match="labels of 92x76, logits of 52x36 with a margin of 18x18"):
        api.train(membranes.root, data, settings={**SHORT, "margin": 18})


@pytest.mark.parametrize("size", [[94, 92], [92, 75]])
def test_a_patch_that_does_not_fit_the_pooling_is_refused_with_those_that_do(
    membranes: Bundle, size: list[int], tmp_path: Path
) -> None:
    data = write_samples(tmp_path, membranes)
    with pytest.raises(SizeError, match=r"use \d+ or \d+"):
        api.train(membranes.root, data, settings={**SHORT, "patch_size": size})


def test_generated_labels_have_the_values_that_the_bundle_reads(membranes: Bundle, tmp_path: Path) -> None:
    write_samples(tmp_path, membranes)
    for path in (tmp_path / "labels").iterdir():
        with Image.open(path) as file:
            assert set(np.unique(np.asarray(file))) == {0, 255}
