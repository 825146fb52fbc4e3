"""The command line as a user meets it: results, and one clear message for everything that cannot be."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from medseg.bundle.catalog import Bundle, shipped_bundles
from medseg.cli import console
from medseg.cli.predict import print_skipped
from medseg.tools.check import CHECKS
from medseg.types import Skipped


def _volume(path: Path, data: Any = None, affine: Any = None) -> Path:
    data = np.random.default_rng(0).normal(100, 20, (20, 28, 26)).astype(np.float32) if data is None else data
    image = nibabel.Nifti1Image(data, None)
    image.set_sform(np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine, code=1)
    if affine is not None:
        image.header["qform_code"] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def test_predict_writes_masks_manifest_and_pictures(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    _volume(tmp_path / "in" / "a.nii.gz")
    _volume(tmp_path / "in" / "b.nii")
    (tmp_path / "in" / "notes.txt").write_text("x")
    code, out, err = medseg("predict", trained.root, tmp_path / "in", "-o", tmp_path / "out", "--overlay")
    assert code == 0
    assert "2 masks written, 0 failed" in out
    assert "skipped: 1 (" in err
    assert "notes.txt" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.nii.gz",
        "a_overlay.png",
        "b.nii",
        "b_overlay.png",
        "manifest.json",
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["bundle"]["weights_sha256"] == trained.metadata["weights"]["models/model.pt"]["sha256"]
    assert manifest["software"]["monai"]
    assert manifest["peak_memory"]["host_bytes"] > 0


def test_pictures_of_masks_replace_no_mask_and_no_other_picture(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.nii"):
        _volume(tmp_path / "in" / name)
    code, _, _ = medseg("predict", trained.root, tmp_path / "in", "-o", tmp_path / "out", "--overlay")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "a.nii.gz_overlay.png",
        "a.nii_overlay.png",
    ]


def test_resume_tells_what_was_done_before(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    _volume(tmp_path / "in" / "a.nii.gz")
    request = ("predict", trained.root, tmp_path / "in", "-o", tmp_path / "out", "--resume")
    assert "1 masks written, 0 failed" in medseg(*request)[1]
    _volume(tmp_path / "in" / "b.nii.gz")
    assert "1 masks written, 1 finished earlier, 0 failed" in medseg(*request)[1]


def test_skipped_files_are_listed_by_reason_or_each_with_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    items = [*(Skipped(f"/d/n{number}.txt", "no image") for number in range(400)), Skipped("/d/.x", "hidden file")]
    console.reset()
    print_skipped(items)
    assert capsys.readouterr().err.splitlines() == [
        "skipped: 400 (no image): n0.txt, n1.txt, n2.txt and 397 more",
        "skipped: 1 (hidden file): .x",
    ]
    console.verbosity.verbose = True
    print_skipped(items)
    console.reset()
    assert len(capsys.readouterr().err.splitlines()) == 401


def test_several_files_and_a_knob(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    files = [_volume(tmp_path / "in" / name) for name in ("a.nii.gz", "b.nii.gz")]
    code, out, _ = medseg("predict", trained.root, *files, "-o", tmp_path / "out", "--set", "overlap=0", "--json")
    assert code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert json.loads(out)["cases"] == manifest["cases"]
    assert [case["status"] for case in manifest["cases"]] == ["done", "done"]
    assert manifest["knobs"]["overlap"] == 0.0
    assert manifest["overrides"] == ["overlap"]


def _truncated(path: Path) -> None:
    content = _volume(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _two_dimensional(path: Path) -> None:
    _volume(path, np.ones((20, 20), np.float32))


def _two_channels(path: Path) -> None:
    _volume(path, np.ones((20, 28, 26, 2), np.float32))


def _not_a_number(path: Path) -> None:
    data = np.ones((20, 28, 26), np.float32)
    data[3, 4, 5] = np.nan
    _volume(path, data)


def _zero_affine(path: Path) -> None:
    _volume(path, affine=np.diag([0.0, 0.0, 0.0, 1.0]))


def _nan_affine(path: Path) -> None:
    content = bytearray(gzip.decompress(_volume(path).read_bytes()))
    content[280:284] = np.float32(np.nan).tobytes()  # first number of the sform
    path.write_bytes(gzip.compress(content))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncated, "bad.nii.gz"),
        (_two_dimensional, "is a 2D image (20, 20): expected a volume"),
        (_two_channels, "channel"),
        (_not_a_number, "NaN"),
        (_zero_affine, "bad.nii.gz"),
        (_nan_affine, "bad.nii.gz"),
        (_empty, "empty"),
    ],
)
def test_a_bad_image_gives_one_message_and_no_file(
    medseg: Any, trained: Bundle, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    (tmp_path / "in").mkdir()
    bad = tmp_path / "in" / "bad.nii.gz"
    spoil(bad)
    code, out, err = medseg("predict", trained.root, bad, "-o", tmp_path / "out")
    assert code == 1
    assert err.count("failed: bad.nii.gz") == 1
    assert message in err
    assert "0 masks written, 1 failed" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_a_strict_error_names_its_file_once(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    scan = _volume(tmp_path / "in" / "a.nii.gz")
    image = nibabel.load(scan)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine @ np.diag([1, -1, 1, 1]), 1)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header), scan)
    code, _, err = medseg("predict", trained.root, scan, "-o", tmp_path / "out", "--strict")
    assert code == 1
    assert "(sform-qform-conflict)" in err
    assert err.count("failed: a.nii.gz: ") == 1
    assert "a.nii.gz: a.nii.gz" not in err


def test_a_picture_for_a_volume_bundle_is_refused(medseg: Any, trained: Bundle, tmp_path: Path) -> None:
    Image.new("L", (32, 32)).save(tmp_path / "picture.png")
    code, _, err = medseg("predict", trained.root, tmp_path / "picture.png", "-o", tmp_path / "out")
    assert code == 1
    assert "a 2D image: expected a volume" in err


def test_requests_that_cannot_be_are_refused_before_anything_is_written(
    medseg: Any, trained: Bundle, tmp_path: Path
) -> None:
    scan = _volume(tmp_path / "in" / "a.nii.gz")
    out = tmp_path / "out"
    torch.save(torch.nn.Conv3d(1, 2, 3).state_dict(), tmp_path / "other.pt")
    (tmp_path / "file").write_text("x")
    cases: list[tuple[list[object], str]] = [
        (["predict", trained.root, tmp_path / "missing.nii.gz", "-o", out], "does not exist"),
        (["predict", "hipocampus_mri_unet", scan, "-o", out], "did you mean 'hippocampus_mri_unet'"),
        (["predict", tmp_path, scan, "-o", out], "is not a bundle"),
        (["predict", "gland_pathology_unet", scan, "-o", out], "No weights"),
        (["predict", trained.root, scan, "-o", out, "--set", "overlapp=0"], "did you mean 'overlap'"),
        (["predict", trained.root, scan, "-o", out, "--set", "overlap"], "invalid setting"),
        (["predict", trained.root, scan, "-o", out, "--set", "roi_size=big"], "roi_size: found 'big', expected a list"),
        (["predict", trained.root, scan, "-o", out, "--set", "inferer=$1"], "unknown setting"),
        (["predict", trained.root, scan, "-o", tmp_path / "file" / "out"], "cannot write"),
        (["predict", trained.root, scan, "-o", out, "--trust", "0" * 64], "--trust"),
        (["evaluate", trained.root, "--data", tmp_path / "nowhere"], "No data set"),
        (["evaluate", trained.root, "--data", tmp_path / "in"], "is not a data set in a supported layout"),
        (["train", trained.root, "--data", tmp_path / "nowhere"], "No data set"),
        (["bundle", "build"], "no bundles given"),
        (["bundle", "build", "x", "--all"], "use one of them"),
        (["bundle", "inspect", "nothing"], "unknown bundle"),
    ]
    for arguments, message in cases:
        code, _, err = medseg(*arguments)
        assert code == 2, arguments
        assert message in err, (arguments, err)
        assert not out.exists(), arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["weights={other}"], "another network"),
        (["weights={missing}"], "No weights"),
        (["device_name=gpu"], "Unknown device"),
    ],
)
def test_what_shows_while_loading_gives_one_message(
    medseg: Any, trained: Bundle, tmp_path: Path, settings: list[str], message: str
) -> None:
    torch.save(torch.nn.Conv3d(1, 2, 3).state_dict(), tmp_path / "other.pt")
    scan = _volume(tmp_path / "in" / "a.nii.gz")
    places = {"other": tmp_path / "other.pt", "missing": tmp_path / "missing.pt"}
    options = [part for setting in settings for part in ("--set", setting.format(**places))]
    code, _, err = medseg("predict", trained.root, scan, "-o", tmp_path / "out", *options)
    assert code == 2
    assert message in err
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_train_refuses_to_replace_weights_and_trains_a_copy(
    medseg: Any, trained_copy: Bundle, tiny_data: Path, tmp_path: Path
) -> None:
    before = trained_copy.weights.read_bytes()
    code, _, err = medseg("train", trained_copy.root, "--data", tiny_data)
    assert code == 2
    assert "--output NEW_FOLDER" in err
    copy = tmp_path / "mine"
    record = tmp_path / "run.json"
    request = ("--data", tiny_data, "-o", copy, "--set", "max_epochs=2", "--json", record)
    code, out, _ = medseg("train", trained_copy.root, *request)
    assert code == 0
    best = max(json.loads(record.read_text())["validations"], key=lambda entry: entry["val_mean_dice"])
    rows = dict(line.split() for line in out.splitlines() if re.fullmatch(r"\w+ +\d\.\d{4}", line))
    assert rows == {
        "small": f"{best['val_mean_dice/small']:.4f}",
        "large": f"{best['val_mean_dice/large']:.4f}",
        "mean": f"{best['val_mean_dice']:.4f}",
    }
    assert f"best validation, epoch {best['epoch']}" in out
    assert f"best weights: {copy / 'models' / 'model.pt'}" in out
    assert out.endswith(f"next:\n  medseg evaluate {copy} --data {tiny_data}\n")
    assert (copy / "models" / "model.pt").is_file()
    assert trained_copy.weights.read_bytes() == before
    assert medseg("bundle", "build", copy)[0] == 0
    scan = _volume(tmp_path / "in" / "a.nii.gz")
    assert medseg("predict", copy, scan, "-o", tmp_path / "out")[0] == 0


def test_evaluate_prints_the_dice_of_each_label(medseg: Any, trained: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    record = tmp_path / "scores.json"
    code, out, _ = medseg("evaluate", trained.root, "--data", tiny_data, "-o", tmp_path / "scores", "--json", record)
    assert code == 0
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert json.loads(record.read_text())["cases"] == manifest["cases"]
    title, head, _, *lines = out.splitlines()
    assert title == f"Dice of {trained.name}, {len(manifest['cases'])} cases"
    assert head.split() == ["label", "n", "mean", "SD", "lowest", "lowest", "in"]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert list(rows) == ["small", "large", "mean"]
    values = [case["metrics"]["large"] for case in manifest["cases"]]
    assert rows["large"][:2] == [str(len(values)), f"{sum(values) / len(values):.4f}"]


def test_inspect_shows_what_a_bundle_would_run_without_running_it(
    medseg: Any, trained_copy: Bundle, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    path = trained_copy.config_path("inference")
    config = json.loads(path.read_text())
    config["evaluator"] = {"_target_": "os.system", "command": f"touch {marker}"}
    path.write_text(json.dumps(config))
    code, out, _ = medseg("bundle", "inspect", trained_copy.root)
    assert code == 1
    assert "os.system" in out
    assert "NOT" in out
    assert not marker.exists()
    scan = _volume(tmp_path / "in" / "a.nii.gz")
    code, _, err = medseg("predict", trained_copy.root, scan, "-o", tmp_path / "out")
    assert code == 2
    assert "os.system" in err
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_inspect_shows_the_first_of_endless_findings(medseg: Any, trained_copy: Bundle) -> None:
    path = trained_copy.root / "configs" / "other\x1b[2J.json"
    path.write_text(json.dumps({"a": ["$x"] * 5000}))
    code, out, _ = medseg("bundle", "inspect", trained_copy.root)
    assert code == 1
    assert 2000 < out.count("\n") < 2010
    assert re.search(r"\.\.\. and \d+ more; --json lists all", out)
    assert r"other\x1b[2J.json" in out
    assert "\x1b" not in out


def test_inspect_as_json_is_json(medseg: Any, trained: Bundle) -> None:
    code, out, _ = medseg("bundle", "inspect", trained.root, "--json")
    assert code == 0
    content = json.loads(out)
    assert re.fullmatch("[0-9a-f]{64}", content["sha256"])
    assert all(finding["allowed"] for finding in content["findings"])


def test_list_names_every_shipped_bundle(medseg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = medseg("bundle", "list")
    assert code == 0
    assert out.count("_unet") >= 3


def test_check_passes_for_every_shipped_bundle(medseg: Any) -> None:
    code, out, err = medseg("bundle", "check", "--all")
    assert code == 0, err
    assert "failed" not in out + err
    assert "skipped" not in out
    _, _, *lines = out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert set(rows) == {bundle.name for bundle in shipped_bundles()}
    assert {len(re.findall(r"\bok\b", row)) for row in rows.values()} == {len(CHECKS)}


def test_phantoms_are_written(medseg: Any, tmp_path: Path) -> None:
    code, _, _ = medseg("phantoms", tmp_path / "data", "--cases", 2, "--validation", 1)
    assert code == 0
    assert len(list((tmp_path / "data" / "imagesTr").glob("*.nii.gz"))) == 2
