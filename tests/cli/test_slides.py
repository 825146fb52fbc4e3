"""The option for slides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle
from medseg.networks import UNet

tifffile = pytest.importorskip("tifffile", reason="slides are made by tifffile, of the extra 'slides'")
pytest.importorskip("openslide", reason="needs the extra 'slides'")


def _slide(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 200, (6, 5, 3), np.uint8).repeat(32, 0).repeat(32, 1)
    resolution = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", metadata=None, **resolution)
    return path


@pytest.fixture
def rgb_bundle(make_bundle: Any, tiny_source: dict[str, Any]) -> Bundle:
    """A bundle for color pictures that does not say at which resolution it works."""
    tiny_source.update(name="blobs_rgb_unet", template="rgb_image", channels={"0": "r", "1": "g", "2": "b"})
    tiny_source["network_def"].update(spatial_dims=2, in_channels=3)
    tiny_source["knobs"] = {"roi_size": [64, 64]}
    bundle: Bundle = make_bundle(tiny_source)
    definition = {key: value for key, value in tiny_source["network_def"].items() if key != "_target_"}
    bundle.weights.parent.mkdir()
    torch.save(UNet(**definition).state_dict(), bundle.weights)
    build(bundle)
    return bundle


def test_the_resolution_is_asked_for_and_taken(medseg: Any, rgb_bundle: Bundle, tmp_path: Path) -> None:
    slide = _slide(tmp_path / "a.svs")
    code, _, err = medseg("predict", rgb_bundle.root, slide, "-o", tmp_path / "out")
    assert code == 2
    assert "Pass it with --mpp" in err
    code, out, _ = medseg("predict", rgb_bundle.root, slide, "-o", tmp_path / "out", "--mpp", "2", "--format", "tiff")
    assert code == 0
    assert "1 masks written, 0 failed" in out
    assert tifffile.imread(tmp_path / "out" / "a.tif").shape == (96, 80)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["knobs"]["microns_per_pixel"] == 2.0


def test_a_resolution_of_zero_is_refused(medseg: Any, rgb_bundle: Bundle, tmp_path: Path) -> None:
    code, _, err = medseg("predict", rgb_bundle.root, _slide(tmp_path / "a.svs"), "-o", tmp_path / "out", "--mpp", "0")
    assert code == 2
    assert "above 0" in err


def test_a_bundle_for_volumes_has_no_resolution_of_slides(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    code, _, err = medseg("predict", trained.root, _slide(tmp_path / "a.svs"), "-o", tmp_path / "out", "--mpp", "2")
    assert code == 2
    assert "unknown setting 'microns_per_pixel'" in err
