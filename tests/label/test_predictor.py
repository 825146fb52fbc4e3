"""The masks of a label server are those of `medseg predict`, and follow the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle
from medseg.errors import CaseError, RequestError, UntrustedBundleError
from medseg.files import load_json
from medseg.jobs import api
from medseg.label.predictor import Predictor
from medseg.label.served_bundles import ServedBundle, find_served_bundles


@pytest.fixture
def image(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sorted((tiny_data / "imagesTr").iterdir())[0], tmp_path / "MUELLER.nii.gz"))


@pytest.fixture
def served(trained_copy: Bundle, tmp_path: Path) -> ServedBundle:
    return find_served_bundles(tmp_path / "tuned", folders=[trained_copy.root]).served[trained_copy.name]


def test_the_mask_is_the_bundle_commands_byte_for_byte(served: ServedBundle, image: Path, tmp_path: Path) -> None:
    mask = Predictor(served, tmp_path / "results").predict(image)
    api.predict(served.source.root, image, tmp_path / "cli")
    assert mask.read_bytes() == (tmp_path / "cli" / "MUELLER.nii.gz").read_bytes()
    assert "MUELLER" not in mask.name


@pytest.mark.parametrize("ending", [".nrrd", ".nii", "mha", ".seg.nrrd"])
def test_other_endings_hold_the_same_voxels_in_the_same_place(served, image: Path, ending: str, tmp_path: Path) -> None:
    predictor = Predictor(served, tmp_path / "results")
    own, other = (sitk.ReadImage(str(predictor.predict(image, ending=e))) for e in ("", ending))
    assert (sitk.GetArrayFromImage(own) == sitk.GetArrayFromImage(other)).all()
    assert sitk.GetArrayFromImage(own).any()
    assert np.allclose(own.GetOrigin(), other.GetOrigin(), atol=1e-5)
    assert np.allclose(own.GetDirection(), other.GetDirection(), atol=1e-5)


def test_new_weights_are_taken_up_without_a_restart(served: ServedBundle, image: Path, tmp_path: Path) -> None:
    predictor = Predictor(served, tmp_path / "results")
    before = predictor.predict(image).read_bytes()
    old = predictor.weights_sha256()
    shutil.copytree(served.source.root, served.tuned.root)
    state = torch.load(served.tuned.weights, weights_only=True)
    torch.save({name: value * 0 for name, value in state.items()}, served.tuned.weights)
    build(served.tuned)  # enters the new hash
    assert predictor.predict(image).read_bytes() != before
    assert predictor.weights_sha256() != old


def test_an_image_that_fails_does_not_spoil_the_next(served: ServedBundle, image: Path, tmp_path: Path) -> None:
    predictor = Predictor(served, tmp_path / "results")
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(image.read_bytes()[:2000])
    before = predictor.predict(image).read_bytes()
    with pytest.raises(CaseError, match=r"broken\.nii\.gz"):
        predictor.predict(broken)
    assert predictor.predict(image).read_bytes() == before


@pytest.mark.parametrize("ending", [".exe", ".seg.dcm", "nii/../../x"])
def test_endings_of_no_format_are_refused(served: ServedBundle, image: Path, ending: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unsupported suffix"):
        Predictor(served, tmp_path / "results").predict(image, ending=ending)


def test_unknown_knobs_are_refused(served: ServedBundle, image: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown setting 'overlop'"):
        Predictor(served, tmp_path / "results").predict(image, settings={"overlop": 0.5})


def test_a_bundle_that_turns_hostile_while_the_server_runs_is_refused(
    served: ServedBundle, image: Path, tmp_path: Path
) -> None:
    predictor = Predictor(served, tmp_path / "results")
    predictor.predict(image)
    config = served.source.config_path("inference")
    config.write_text(config.read_text().replace('"device_name": "auto"', '"device_name": "$exit()"'))
    with pytest.raises(UntrustedBundleError):
        predictor.predict(image)


def test_weights_that_could_run_code_are_refused(served: ServedBundle, image: Path, tmp_path: Path) -> None:
    torch.save({"weight": Predictor}, served.source.weights)
    build(served.source)
    with pytest.raises(RequestError, match="could run code"):
        Predictor(served, tmp_path / "results").predict(image)


def test_a_bundle_that_numbers_objects_gives_classes_here(served: ServedBundle, image: Path, tmp_path: Path) -> None:
    plain = Predictor(served, tmp_path / "plain").predict(image).read_bytes()
    source = load_json(served.source.root / "bundle.json")
    source["blocks"] = {"finishing": [{"block": "numbered_objects"}]}
    (served.source.root / "bundle.json").write_text(json.dumps(source), encoding="utf-8")
    build(served.source)
    predictor = Predictor(served, tmp_path / "results")
    assert predictor.predict(image).read_bytes() == plain
    numbered = predictor.predict(image, settings={"number_objects": True, "fill_object_holes": False})
    assert numbered.read_bytes() != plain
