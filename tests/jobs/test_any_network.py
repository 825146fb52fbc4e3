"""Every network in any bundle: `network_def` changes and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from medseg.bundle.catalog import Bundle, shipped_bundles
from medseg.bundle.compose import compose, template_names
from medseg.bundle.trust import check
from medseg.jobs import api
from medseg.networks import NETWORKS, small
from medseg.tools.samples import write_samples

NAMES = list(NETWORKS)


def _sizes(bundle: Bundle) -> tuple[Any, ...]:
    config = bundle.load_configs("train")["train.json"]
    return len(config["roi_size"]), config["batch_size"], *config["patch_size"], *config["roi_size"]


# One bundle for all of the same sizes
SHIPPED = list({_sizes(bundle): bundle for bundle in shipped_bundles()}.values())


def _with_network(source: dict[str, Any], name: str) -> dict[str, Any]:
    """Put the small form of a network into a bundle's source."""
    kept = {key: source["network_def"][key] for key in ("spatial_dims", "in_channels", "out_channels")}
    definition = {"_target_": f"medseg.components.{name}", **kept, **small(name, kept["spatial_dims"])}
    if name == "BANet" and source.get("recipe") == "unet2015":
        definition["aspp_pool_norm"] = None  # The recipe takes one picture a step, which a batch norm cannot.
    return {**copy.deepcopy(source), "network_def": definition}


def _pictures(source: dict[str, Any]) -> dict[str, Any]:
    """Make the tiny bundle one of pictures."""
    source.update(name="balls_rgb_unet", template="rgb_image", channels={"0": "r", "1": "g", "2": "b"})
    source["network_def"].update(spatial_dims=2, in_channels=3)
    source["knobs"] = {"patch_size": [48, 64], "roi_size": [48, 64]}
    return source


@pytest.mark.parametrize("template", template_names())
@pytest.mark.parametrize("name", NAMES)
def test_every_template_with_every_network_is_declarative(
    name: str, template: str, tiny_source: dict[str, Any]
) -> None:
    tiny_source.update(template=template, knobs={})
    tiny_source["network_def"]["spatial_dims"] = 2 if "image" in template else 3
    source = _with_network(tiny_source, name)
    configs = compose(source)
    check({"train": configs["train"], "evaluate": configs["evaluate"]}, "x")
    check({"inference": configs["inference"]}, "x")
    assert configs["train"]["network_def"] == configs["inference"]["network_def"] == source["network_def"]


@pytest.mark.parametrize("bundle", SHIPPED, ids=lambda bundle: bundle.name)
@pytest.mark.parametrize("name", NAMES)
def test_every_network_takes_the_crops_and_windows_of_every_shipped_bundle(name: str, bundle: Bundle) -> None:
    source = json.loads((bundle.root / "bundle.json").read_text(encoding="utf-8"))
    config = compose(_with_network(source, name))["train"]
    with FakeTensorMode():
        network = ConfigParser({"network_def": config["network_def"]}).get_parsed_content("network_def")
        for size in {tuple(config["patch_size"]), tuple(config["roi_size"])}:
            image = torch.empty(config["batch_size"], config["network_def"]["in_channels"], *size)
            expected = (config["batch_size"], config["network_def"]["out_channels"], *size)
            assert network.train()(image).shape == expected


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_on_volumes_and_predicts(
    name: str, make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(_with_network(tiny_source, name))
    image = tiny_data / "imagesTr" / "case_3.nii.gz"
    _train_and_predict(bundle, tiny_data, image, tmp_path / "out")
    scan, mask = nibabel.load(image), nibabel.load(tmp_path / "out" / image.name)
    assert mask.shape == scan.shape
    assert mask.affine.tobytes() == scan.affine.tobytes()
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2}


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_on_pictures_and_predicts(
    name: str, make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path
) -> None:
    bundle = make_bundle(_with_network(_pictures(tiny_source), name))
    data = write_samples(tmp_path / "data", bundle, cases=3)
    picture = data / "images" / "case_2.png"
    _train_and_predict(bundle, data, picture, tmp_path / "out")
    with Image.open(picture) as image, Image.open(tmp_path / "out" / picture.name) as mask:
        assert mask.size == image.size
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2}


def _train_and_predict(bundle: Bundle, data: Path, image: Path, output: Path) -> None:
    trained = api.train(bundle.root, data, settings={"max_epochs": 1, "val_interval": 1, "overlap": 0.0})
    assert trained.exit_code == 0
    assert bundle.weights.is_file()
    predicted = api.predict(bundle.root, image, output, settings={"overlap": 0.0})
    assert predicted.counts == {"done": 1, "failed": 0, "skipped": 0}
