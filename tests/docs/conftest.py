"""A folder in which the documentation is run: data, scans and trained bundles under the names that it uses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle


@pytest.fixture(scope="session")
def doc_workspace(trained: Bundle, make_bundle: Any, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pages start from. Not to be changed: each page gets a copy."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(tiny_data, folder / "my_data")
    images = sorted(path for path in tiny_data.rglob("case_*") if "label" not in str(path.relative_to(tiny_data)))
    (folder / "folder_of_scans").mkdir()
    shutil.copy(images[0], folder / "scan.nii.gz")
    for image in images[:2]:
        shutil.copy(image, folder / "folder_of_scans" / image.name)
    # A folder is found before a shipped bundle of that name, so nothing here runs a network of real size.
    for name in ("my_target_mri_unet", "my_other_mri_unet", "hippocampus_mri_unet", "bundles/hippocampus_mri_unet"):
        _renamed(trained, folder / name)
    tiny = json.loads((trained.root / "bundle.json").read_text(encoding="utf-8"))
    nested = {"_target_": "medseg.components.UNetPlusPlus", "features": [4, 8, 8]}
    network = {**tiny["network_def"], **nested}
    del network["dropout"]
    other = make_bundle({**tiny, "name": "hippocampus_mri_unetplusplus", "network_def": network})
    shutil.copytree(other.root, folder / other.name)
    return folder


def _renamed(bundle: Bundle, target: Path) -> None:
    shutil.copytree(bundle.root, target, ignore=shutil.ignore_patterns("runs"))
    source = json.loads((target / "bundle.json").read_text(encoding="utf-8"))
    (target / "bundle.json").write_text(json.dumps({**source, "name": target.name}), encoding="utf-8")
    build(Bundle(target))


@pytest.fixture
def enter(doc_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that changes into a fresh folder, with the data of the documentation or empty."""

    def enter(*, empty: bool) -> Path:
        folder = tmp_path / "work"
        if empty:
            folder.mkdir()
        else:
            shutil.copytree(doc_workspace, folder)
        monkeypatch.chdir(folder)
        return folder

    return enter
