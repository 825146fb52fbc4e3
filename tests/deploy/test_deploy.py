"""The example for MONAI Deploy: what it refuses before the SDK is used; all of it, in its own environment."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
import pytest

from medseg.errors import CaseError, GeometryError, MedsegError, RequestError, UntrustedBundleError
from medseg.tools.export import export
from tests.conftest import TINY
from tests.deploy.deploy_check import write_series
from tests.environments import ROOT, pinned, run_script

EXAMPLE = ROOT / "docs" / "monai-deploy"
Notes = dict[str, Any]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


exported = load(EXAMPLE / "exported.py")


@pytest.fixture(scope="module")
def model(make_bundle: Callable[[Notes], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "model.ts"
    export(make_bundle(TINY), "ts", target, random=True)
    return target


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_series(np.arange(8 * 6 * 4).reshape(8, 6, 4), np.diag([2.0, 2.0, 3.0, 1.0]), tmp_path / "series")
    return tmp_path / "series"


def changed(model: Path, target: Path, name: str, change: Callable[[Notes], object]) -> Path:
    """Write a copy of an exported file in which one of the notes is another."""
    with zipfile.ZipFile(model) as source, zipfile.ZipFile(target, "w") as copy:
        for entry in source.namelist():
            content = source.read(entry)
            if entry.endswith(f"/extra/{name}"):
                notes = json.loads(content)
                change(notes)
                content = json.dumps(notes).encode()
            copy.writestr(entry, content)
    return target


def test_names_and_labels_come_from_the_file(model: Path) -> None:
    assert exported.read_exported(model) == exported.Exported("balls_mri_unet", "0.1.0", ("small", "large"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("inference.json", lambda notes: notes.update(inferer="$__import__('os').system('true')")),
        ("inference.json", lambda notes: notes["network_def"].update(_target_="subprocess.run")),
        ("metadata.json", lambda notes: notes.update(version={"_target_": "medseg.components.UNet"})),
    ],
    ids=["expression", "callable", "metadata"],
)
def test_a_config_that_would_run_something_is_refused(
    name: str, change: Callable[[Notes], object], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UntrustedBundleError, match="contains executable code and is not trusted"):
        exported.read_exported(changed(model, tmp_path / "model.ts", name, change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "metadata.json",
            lambda notes: notes["network_data_format"]["inputs"]["image"].update(num_channels=4),
            "and 4",
        ),
        (
            "metadata.json",
            lambda notes: notes["network_data_format"]["inputs"]["image"].update(spatial_shape=[64, 64]),
            "images with 2 axes",
        ),
        ("medseg.json", lambda notes: notes.update(labels={"0": "background", "2": "large"}), r"the labels \[2\]"),
    ],
)
def test_a_network_that_the_sdk_cannot_serve_is_refused(
    name: str, change: Callable[[Notes], object], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        exported.read_exported(changed(model, tmp_path / "model.ts", name, change))


def test_a_renamed_file_is_refused_since_the_sdk_would_run_it_without_its_config(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=re.escape("call it model.ts again")):
        exported.read_exported(Path(shutil.copy(model, tmp_path / "liver.ts")))


def test_what_is_no_exported_network_is_refused(model: Path, tmp_path: Path) -> None:
    text, bare = tmp_path / "text.ts", tmp_path / "model.ts"
    text.write_text("no archive")
    with zipfile.ZipFile(bare, "w") as archive:
        archive.writestr("model/data.pkl", b"")
    for path in (text, bare, tmp_path / "missing.ts", tmp_path):
        with pytest.raises(RequestError, match="cannot read"):
            exported.read_exported(path)


def test_the_one_series_of_a_folder_is_found(series: Path) -> None:
    uid = {str(pydicom.dcmread(path).SeriesInstanceUID) for path in series.iterdir()}
    assert {exported.find_series(series).uid} == uid


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: write_series(np.ones((8, 6, 4)), np.eye(4), folder / "b"), CaseError, "holds 2 images"),
        (lambda folder: sorted(folder.iterdir())[1].unlink(), GeometryError, "unevenly spaced slices"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], RequestError, "Nothing to predict"),
    ],
    ids=["two", "gap", "none"],
)
def test_a_folder_without_one_whole_series_is_refused(
    change: Callable[[Path], object], error: type[MedsegError], message: str, series: Path
) -> None:
    change(series)
    with pytest.raises(error, match=message):
        exported.find_series(series)


def test_pixels_that_the_sdk_would_turn_by_90_degrees_are_refused(tmp_path: Path) -> None:
    write_series(np.ones((8, 6, 4)), np.diag([1.0, 2.0, 3.0, 1.0]), tmp_path / "flat")
    with pytest.raises(GeometryError, match=re.escape("pixels of 1 x 2 mm")):
        exported.find_series(tmp_path / "flat")


def test_every_line_of_the_environment_is_one_exact_version_and_those_of_medseg_are_its_own() -> None:
    own, common = pinned(EXAMPLE / "constraints.txt"), pinned(ROOT / "constraints.txt")
    assert {"monai-deploy-app-sdk", "holoscan-cu13", "monai", "torch", "highdicom", "pydicom"} <= set(own)
    compared = {"monai", "torch", "numpy", "pydicom", "highdicom", "nibabel", "simpleitk"}
    assert {name: own[name] for name in compared} == {name: common[name] for name in compared}


@pytest.mark.slow
@pytest.mark.full_check
def test_the_application_writes_the_voxels_of_predict() -> None:
    script = ROOT / "tests" / "deploy" / "deploy_check.py"
    assert "all held" in run_script(".venv-deploy", sys.executable, script, command="make deploy-check")
