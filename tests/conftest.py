"""Fixtures that several rooms share: a small bundle, its data, and its trained state."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle
from medseg.errors import RequestError
from medseg.jobs import runner
from medseg.jobs.job import prepare
from medseg.manifest import Manifest
from medseg.notices import CaseWarning, summarize
from medseg.tools.samples import write_samples

# OpenVINO reports its import over the network, from a forked process, unless it is here.
os.environ.setdefault("CI", "true")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Tell how a process of xdist died: by which signal (below zero), or with which exit code."""
    process = getattr(getattr(node.gateway, "_io", None), "popen", None)
    if error and process is not None:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=10)
            node.config.get_terminal_writer().line(f"\n{node.gateway.id} ended with {code}")


TINY: dict[str, Any] = {
    "name": "balls_mri_unet",
    "template": "mr_volume",
    "version": "0.1.0",
    "changelog": {"0.1.0": "first release"},
    "description": "Two kinds of balls. For tests.",
    "authors": "The medseg authors",
    "channels": {"0": "MRI"},
    "labels": {"0": "background", "1": "small", "2": "large"},
    "network_def": {
        "_target_": "medseg.components.UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 3,
        "features": [4, 8, 8],
        "norm": ["instance", {"affine": True}],
        "dropout": 0.0,
    },
    "knobs": {
        "spacing": [2.0, 2.0, 2.0],
        "patch_size": [16, 24, 24],
        "roi_size": [16, 24, 24],
        "max_epochs": 4,
        "val_interval": 2,
        "learning_rate": 0.02,
        "ema_decay": 0.5,
    },
}


@pytest.fixture
def assert_warns(tmp_path: Path) -> Callable[..., None]:
    """Return a function that checks what becomes of a warning: in the manifest, printed once, an error if strict."""

    def check(action: Callable[[], object], code: str, *, run: bool = False) -> None:
        path = tmp_path / "warned" / "manifest.json"
        with Manifest("predict", path=path) as manifest, manifest.case("a"):
            action()
            action()
        content = json.loads(path.read_text())
        kept = (content if run else content["cases"][0])["warnings"]
        assert code in [warning["code"] for warning in kept]
        lines = summarize(("a" if not run else "", CaseWarning(**warning)) for warning in kept)
        assert sum(f"[{code}]" in line for line in lines) == 1
        ended = pytest.raises(RequestError, match=code) if run else nullcontext()
        with ended, Manifest("predict", path=path, strict=True) as manifest, manifest.case("a"):
            action()
        content = json.loads(path.read_text())
        assert content["cases"][0]["status"] == "failed"
        assert f"warning ({code})" in content["cases"][0]["error"]
        assert content["status"] == ("aborted" if run else "partial")

    return check


@pytest.fixture
def tiny_source() -> dict[str, Any]:
    """The `bundle.json` content of the tiny bundle, free to change."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that writes and builds a bundle folder from a `bundle.json` content."""

    def make(source: dict[str, Any]) -> Bundle:
        root = tmp_path_factory.mktemp("bundles") / str(source["name"])
        root.mkdir()
        (root / "bundle.json").write_text(json.dumps(source), encoding="utf-8")
        bundle = Bundle(root)
        build(bundle)
        return bundle

    return make


@pytest.fixture(scope="session")
def tiny_data(make_bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three training cases and one for validation, for the tiny bundle."""
    return write_samples(tmp_path_factory.mktemp("data"), make_bundle(TINY), cases=4)


@pytest.fixture(scope="session")
def trained(make_bundle, tiny_data: Path) -> Bundle:
    """The tiny bundle, trained. Not to be changed: copy it first."""
    bundle = make_bundle(TINY)
    job = prepare("train", bundle, {}, paths={"dataset_dir": str(tiny_data), "resume": False})
    runner.train(job)
    return bundle


@pytest.fixture
def trained_copy(trained: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the trained tiny bundle that a test may change."""
    return Bundle(Path(shutil.copytree(trained.root, tmp_path / trained.name)))
