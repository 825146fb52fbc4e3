"""Bundles of earlier layouts: refused with the way out, rebuilt without touching their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import medseg
from medseg.bundle.build import build, stale_files
from medseg.bundle.catalog import Bundle
from medseg.bundle.trust import require_trust
from medseg.bundle.upgrade import current_target, upgraded
from medseg.errors import UntrustedBundleError
from medseg.files import sha256_file

# What configs named before `medseg.components`.
OLD = {
    "medseg.components.UNet": "medseg.networks.UNet",
    "medseg.components.LoadCased": "medseg.transforms.LoadCased",
    "medseg.components.TrainingWrapper": "medseg.training.TrainingOutputs",
    "medseg.components.InfiniteBatchSampler": "medseg.training.EndlessBatches",
    "medseg.components.EMA": "medseg.training.WeightAverage",
    "medseg.components.ClassIndicesd": "medseg.transforms.ClassPlacesd",
    "medseg.components.identity": "medseg.bundle.parts.item",
    "medseg.components.distributed_network": "medseg.training.distributed.distributed_network",
    "medseg.components.PredictionPictures": "medseg.report.training_pictures.PredictionPictures",
}


def aged(content: Any) -> Any:
    if isinstance(content, list):
        return [aged(item) for item in content]
    if isinstance(content, dict):
        return {key: OLD.get(value, value) if key == "_target_" else aged(value) for key, value in content.items()}
    return content


@pytest.fixture
def old_bundle(trained_copy: Bundle) -> Bundle:
    """A trained bundle as the old layout would have written it."""
    for path in [trained_copy.root / "bundle.json", *sorted((trained_copy.root / "configs").glob("*.json"))]:
        path.write_text(json.dumps(aged(json.loads(path.read_text())), indent=2) + "\n")
    return trained_copy


@pytest.mark.parametrize(("now", "before"), OLD.items())
def test_a_former_name_is_known_by_its_present_one(now: str, before: str) -> None:
    assert current_target(before) == now
    assert upgraded([{"_target_": before, "x": {"y": 1}}]) == [{"_target_": now, "x": {"y": 1}}]


@pytest.mark.parametrize(
    "target", ["medseg.components.UNet", "medseg.bundle.trust.check", "monai.networks.nets.UNet", "os.system", 3, None]
)
def test_other_names_are_not_touched(target: object) -> None:
    assert current_target(target) is None
    assert upgraded({"_target_": target}) == {"_target_": target}


def test_an_old_bundle_is_refused_with_the_command_that_upgrades_it(old_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UntrustedBundleError, match=r"medseg\.components\.\w+.*medseg bundle build"):
        medseg.predict(old_bundle.root, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_building_an_old_bundle_upgrades_it_and_leaves_its_weights(old_bundle: Bundle) -> None:
    before = sha256_file(old_bundle.weights)
    assert "medseg.networks.UNet" in (old_bundle.root / "bundle.json").read_text()
    build(old_bundle)
    for path in [old_bundle.root / "bundle.json", *(old_bundle.root / "configs").glob("*.json")]:
        assert not any(f'"{name}"' in path.read_text() for name in OLD.values())
    assert stale_files(old_bundle) == []
    assert sha256_file(old_bundle.weights) == before
    require_trust(old_bundle.root, old_bundle.load_configs("inference", "train"))
