"""`medseg plan` as a user meets it: the bundle, its record, its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.build import built_files
from medseg.bundle.catalog import Bundle
from medseg.tools.samples import write_samples

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def data(make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path) -> Path:
    return write_samples(tmp_path / "balls", make_bundle(tiny_source), cases=3)


SMALL = ("--set", "patch_size=[16,24,16]", "--set", "max_epochs=1", "--device", "cpu")


def test_the_whole_circle_without_a_hand_on_it(medseg: Any, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "balls_mri_unet"
    code, out, err = medseg("plan", data, "-o", root, *SMALL)
    assert code == 0, err
    assert "patch_size = [16, 24, 16]: set by the user" in out
    assert "memory, measured" in out
    source = json.loads((root / "bundle.json").read_text())
    assert source["name"] == "balls_mri_unet"
    assert "spacing" in source["plan"]
    assert "## Choices and reasons" in (root / "docs" / "README.md").read_text()
    assert json.loads((root / "plan.json").read_text())["fingerprint"]["summary"]["training_cases"] == 2
    for name, text in built_files(Bundle(root)).items():
        assert (root / name).read_text() == text
    code, _, err = medseg("train", root, "--data", data)
    assert code == 0, err
    code, out, err = medseg("evaluate", root, "--data", data)
    assert code == 0, err
    code, _, err = medseg("predict", root, data / "imagesTr", "-o", tmp_path / "masks")
    assert code == 0, err
    code, _, err = medseg("plan", data, "-o", root, *SMALL, "--overwrite")
    assert code == 2
    assert "contains a trained bundle" in err


def test_a_plan_without_measuring_passes_the_checks_of_bundles(medseg: Any, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "balls_mri_unetplusplus"
    code, out, err = medseg("plan", data, "-o", root, "--network", "unet++", "--no-measure", *SMALL)
    assert code == 0, err
    assert "not measured" in out
    code, out, err = medseg("bundle", "check", root)
    assert code == 0, out + err


def test_a_second_plan_needs_a_word_and_reuses_what_was_seen(medseg: Any, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "balls_mri_unet"
    assert medseg("plan", data, "-o", root, "--no-measure", *SMALL)[0] == 0
    first = (root / "bundle.json").read_bytes()
    code, _, err = medseg("plan", data, "-o", root, "--no-measure", *SMALL)
    assert code == 2
    assert "--overwrite" in err
    record = json.loads((root / "plan.json").read_text())
    record["fingerprint"]["dataset"] = "seen before"
    (root / "plan.json").write_text(json.dumps(record))
    assert medseg("plan", data, "-o", root, "--no-measure", *SMALL, "--overwrite")[0] == 0
    assert json.loads((root / "bundle.json").read_text())["data_source"] == "seen before"
    (root / "plan.json").write_text("{")
    assert medseg("plan", data, "-o", root, "--no-measure", *SMALL, "--overwrite")[0] == 0
    assert (root / "bundle.json").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "unett"], "Did you mean 'unet'"),
        (["--memory", "lots"], "Invalid amount of memory"),
        (["--budget", "soon"], "Invalid duration"),
        (["--budget", "30m", "--no-measure"], "--budget needs"),
        (["--dims", "2"], "medseg does not train 2D models on slices"),
        (["--set", "learning_rat=1", "--no-measure"], "did you mean 'learning_rate'"),
        (["--name", "Bad Name", "--no-measure"], "expected a name of the form <target>_<modality>_<network>"),
        (["--memory", "200M", "--no-measure"], "the limit is 200 MiB"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_no_bundle(
    arguments: list[str], message: str, medseg: Any, data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "balls_mri_unet"
    code, _, err = medseg("plan", data, "-o", root, "--device", "cpu", *arguments)
    assert code == 2
    assert message in err
    assert not (root / "bundle.json").exists()


def test_a_folder_of_other_things_is_left_alone(medseg: Any, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    code, _, err = medseg("plan", data, "-o", folder)
    assert code == 2
    assert "is not empty and is not a bundle" in err
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


@pytest.mark.data
@pytest.mark.parametrize("name", ["ct_sarcoma_sts", "dsb2018", "msd_hippocampus"])
def test_real_data_sets_give_bundles_that_pass_the_checks(name: str, medseg: Any, tmp_path: Path) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here")
    # A bundle bears the name of its folder, which is to say target, modality and network.
    root = tmp_path / {"dsb2018": "nuclei_microscopy_unet"}.get(name, f"{name}_unet")
    code, out, err = medseg("plan", DATA / name, "-o", root, "--no-measure")
    assert code == 0, err
    code, out, err = medseg("bundle", "check", root)
    assert code == 0, out + err
