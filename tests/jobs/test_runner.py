"""Training, resuming, predicting and scoring through a bundle's own configs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle
from medseg.errors import BundleError, RequestError, UntrustedBundleError, WeightsError, own_error
from medseg.files import sha256_file
from medseg.io import list_cases, list_dataset
from medseg.jobs import api, runner
from medseg.jobs.job import open_workflow, prepare
from medseg.tools.samples import write_samples
from tests.deploy.deploy_check import write_series


def _predict(bundle: Bundle, images: Any, output: Path, resume: bool = False, **settings: Any) -> Any:
    paths = {"dataset_dir": [str(p) for p in images] if isinstance(images, list) else str(images)}
    job = prepare("predict", bundle, settings, paths={**paths, "output_dir": str(output)})
    wanted = str(settings.get("output_format") or job.config["output_format"])
    return runner.predict(job, list_cases(images, output_format=wanted).cases, output, resume=resume)


def test_training_leaves_weights_their_hash_and_a_manifest(trained: Bundle) -> None:
    manifest = json.loads((trained.root / "runs" / "train" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert [entry["epoch"] for entry in manifest["validations"]] == [2, 4]
    assert trained.metadata["weights"]["models/model.pt"]["sha256"] == sha256_file(trained.weights)
    state = torch.load(trained.weights, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert "head.weight" in state


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    trained: Bundle, make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    again = make_bundle(tiny_source)
    runner.train(prepare("train", again, {}, paths={"dataset_dir": str(tiny_data), "resume": False}))
    assert sha256_file(again.weights) == sha256_file(trained.weights)
    other = make_bundle(tiny_source)
    runner.train(prepare("train", other, {"seed": 1}, paths={"dataset_dir": str(tiny_data), "resume": False}))
    assert sha256_file(other.weights) != sha256_file(trained.weights)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    trained: Bundle, make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path
) -> None:
    bundle = make_bundle(tiny_source)

    def stop(done: float, total: int, note: str) -> None:
        if done > 2.5:
            raise KeyboardInterrupt

    job = prepare("train", bundle, {}, paths={"dataset_dir": str(tiny_data), "resume": False})
    with pytest.raises(KeyboardInterrupt):
        runner.train(job, report=stop)
    job = prepare("train", bundle, {}, paths={"dataset_dir": str(tiny_data), "resume": True})
    epochs: list[float] = []
    runner.train(job, report=lambda done, total, note: epochs.append(done))
    assert epochs[0] > 2
    last = [torch.load(b.root / "runs" / "train" / "last.pt", weights_only=True) for b in (trained, bundle)]
    assert last[0]["progress"] == last[1]["progress"]
    for name, tensor in last[0]["network"].items():
        assert torch.equal(tensor, last[1]["network"][name]), name
    assert sha256_file(bundle.weights) == sha256_file(trained.weights)


def test_resuming_without_a_run_is_refused(make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path) -> None:
    bundle = make_bundle(tiny_source)
    job = prepare("train", bundle, {}, paths={"dataset_dir": str(tiny_data), "resume": True})
    with pytest.raises(WeightsError, match="nothing to resume"):
        runner.train(job)


def _oblique(folder: Path, name: str, flip: bool) -> Path:
    """Write an anisotropic, oblique image whose sform and qform differ in code."""
    rng = np.random.default_rng(5)
    image = nibabel.Nifti1Image(rng.normal(100, 20, (21, 30, 26)).astype(np.int16), None)
    c, s = np.cos(0.3), np.sin(0.3)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([-1.7 if flip else 1.7, 1.1, 2.3])
    affine[:3, 3] = (12.5, -7.25, 3.0)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=3)
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, folder / name)
    return folder / name


@pytest.mark.parametrize("flip", [False, True])
def test_the_mask_lies_exactly_on_the_input(trained: Bundle, tmp_path: Path, flip: bool) -> None:
    path = _oblique(tmp_path / "in", "scan.nii.gz", flip)
    assert _predict(trained, path, tmp_path / "out").exit_code == 0
    image, mask = nibabel.load(path), nibabel.load(tmp_path / "out" / "scan.nii.gz")
    assert mask.shape == image.shape
    for form in ("sform", "qform"):
        ours, code = getattr(mask.header, f"get_{form}")(coded=True)
        theirs, wanted = getattr(image.header, f"get_{form}")(coded=True)
        assert code == wanted
        assert ours.tobytes() == theirs.tobytes()
    assert mask.affine.tobytes() == image.affine.tobytes()


def _monai_run(elsewhere: Path, bundle: Bundle, configs: list[str], **options: object) -> str:
    """Run a bundle by MONAI's own command from a folder that has nothing to do with it."""
    elsewhere.mkdir()
    files = [str(bundle.config_path(name)) for name in configs]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files) if files[1:] else files[0]]
    for name, value in {"bundle_root": bundle.root, **options}.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(elsewhere.iterdir()) == []
    return done.stdout + done.stderr


def _monai_run_here(bundle: Bundle, config: str, **options: object) -> None:
    """Run a bundle by the function behind MONAI's command, without the seconds that a process takes to start."""
    from monai.bundle import run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(config_file=str(bundle.config_path(config)), bundle_root=str(bundle.root), **options)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"max_memory": "8G", "sw_batch_size": 2, "inference_precision": "bfloat16", "memory_format": "channels_last"},
        {"backend": "onnxruntime", "foreground": 0.5},
    ],
)
def test_monai_and_medseg_write_the_same_masks(trained: Bundle, tmp_path: Path, knobs: dict[str, Any]) -> None:
    images = tmp_path / "in"
    _oblique(images, "a.nii.gz", False)
    _oblique(images / "sub", "b.nii.gz", True)
    _predict(trained, images, tmp_path / "ours", **knobs)
    paths = {"dataset_dir": str(images), "output_dir": str(tmp_path / "theirs")}
    if knobs:
        _monai_run_here(trained, "inference", **paths, **knobs)
    else:
        _monai_run(tmp_path / "x", trained, ["inference"], **paths)
    for name in ("a.nii.gz", "sub/b.nii.gz"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_monai_and_medseg_train_the_same_weights_and_find_the_same_dice(
    trained: Bundle, make_bundle: Any, tiny_source: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(tiny_source)
    _monai_run(tmp_path / "x", bundle, ["train"], dataset_dir=tiny_data)
    assert sha256_file(bundle.weights) == sha256_file(trained.weights)
    log = _monai_run(tmp_path / "y", bundle, ["train", "evaluate"], dataset_dir=tiny_data)
    paths = {"dataset_dir": str(tiny_data), "split": "val", "output_dir": str(tmp_path / "scores")}
    manifest = runner.evaluate(
        prepare("evaluate", trained, {}, paths=paths), list_dataset(tiny_data, "val"), tmp_path / "scores"
    )
    (record,) = manifest.cases.values()
    assert f"val_mean_dice: {record.metrics['mean']:.4f}" in log


def test_segments_of_dicom_bear_the_names_of_the_bundles_labels(trained: Bundle, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom")
    pytest.importorskip("highdicom", reason="needs highdicom")
    write_series(np.arange(24 * 20 * 16).reshape(24, 20, 16), np.diag([2.0, 2.0, 2.0, 1.0]), tmp_path / "series")
    _predict(trained, tmp_path / "series", tmp_path / "masks", output_format="dicom-seg")
    (written,) = (tmp_path / "masks").glob("*.dcm")
    assert [item.SegmentLabel for item in pydicom.dcmread(written).SegmentSequence] == ["small", "large"]


def test_a_failing_case_is_reported_and_the_others_go_on(trained: Bundle, tmp_path: Path) -> None:
    images = tmp_path / "in"
    _oblique(images, "a.nii.gz", False)
    _oblique(images, "b.nii.gz", False)
    content = (images / "a.nii.gz").read_bytes()
    (images / "a.nii.gz").write_bytes(content[: len(content) // 2])
    manifest = _predict(trained, images, tmp_path / "out")
    assert manifest.exit_code == 1
    assert {name: record.status for name, record in manifest.cases.items()} == {
        "a.nii.gz": "failed",
        "b.nii.gz": "done",
    }
    assert "a.nii.gz" in str(manifest.cases["a.nii.gz"].error)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.nii.gz", "manifest.json"]


def test_resume_leaves_out_what_is_done_and_does_what_failed(trained: Bundle, tmp_path: Path) -> None:
    images = tmp_path / "in"
    good = _oblique(images, "a.nii.gz", False)
    (images / "b.nii.gz").write_bytes(b"broken")
    _predict(trained, images, tmp_path / "out")
    before = (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns
    shutil.copy(good, images / "b.nii.gz")
    manifest = _predict(trained, images, tmp_path / "out", resume=True)
    assert manifest.counts == {"done": 2, "failed": 0, "skipped": 0}
    assert (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns == before
    changed = _predict(trained, images, tmp_path / "out", resume=True, overlap=0.0)
    assert changed.exit_code == 0
    assert (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns != before


def test_one_image_too_large_for_the_limit_does_not_stop_the_others(
    trained: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        _oblique(tmp_path / "in", name, False)
    held = iter([0, 1 << 60, 0, 0])  # of each case before its trial window and after
    monkeypatch.setattr("medseg.inferers.window_runner.resident_bytes", lambda: next(held))
    manifest = _predict(trained, tmp_path / "in", tmp_path / "out", max_memory="900G")
    assert [manifest.cases[name].status for name in ("a.nii.gz", "b.nii.gz")] == ["failed", "done"]
    assert "the limit is" in str(manifest.cases["a.nii.gz"].error)


def test_what_a_transform_found_wrong_is_told_without_its_place_in_memory(trained: Bundle, tmp_path: Path) -> None:
    image = _oblique(tmp_path / "in", "a.nii.gz", False)
    manifest = _predict(trained, image, tmp_path / "out", orientation="XYZ")
    assert " at 0x" not in str(manifest.cases["a.nii.gz"].error)
    assert "axis codes" in str(manifest.cases["a.nii.gz"].error)


def test_masks_never_replace_their_images(trained: Bundle, tmp_path: Path) -> None:
    path = _oblique(tmp_path / "in", "a.nii.gz", False)
    before = path.read_bytes()
    with pytest.raises(RequestError, match="would overwrite the image itself"):
        _predict(trained, tmp_path / "in", tmp_path / "in")
    assert path.read_bytes() == before


def test_masks_never_replace_images_of_other_cases(trained: Bundle, tmp_path: Path) -> None:
    _oblique(tmp_path / "in", "a.nii.gz", False)
    below = _oblique(tmp_path / "in" / "sub", "a.nii.gz", True)
    before = below.read_bytes()
    with pytest.raises(RequestError, match=r"would overwrite the image '.*sub.a\.nii\.gz'"):
        _predict(trained, tmp_path / "in", tmp_path / "in" / "sub")
    assert below.read_bytes() == before


def test_masks_that_an_output_format_gives_one_name_are_refused(trained: Bundle, tmp_path: Path) -> None:
    _oblique(tmp_path / "in", "a.nii.gz", False)
    _oblique(tmp_path / "in", "a.nii", True)
    with pytest.raises(RequestError, match=r"have the same mask name a\.nrrd"):
        _predict(trained, tmp_path / "in", tmp_path / "out", output_format="nrrd")


def test_plain_monai_refuses_them_too(trained: Bundle, tmp_path: Path) -> None:
    _oblique(tmp_path / "in", "a.nii.gz", False)
    _oblique(tmp_path / "in", "a.nii", True)
    paths = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(RuntimeError) as caught:
        _monai_run_here(trained, "inference", **paths, output_format="nrrd")
    assert "have the same mask name a.nrrd" in str(own_error(caught.value))
    assert not (tmp_path / "out").exists()


def test_resume_does_not_take_the_mask_of_another_image_of_that_name(trained: Bundle, tmp_path: Path) -> None:
    first, second = _oblique(tmp_path / "one", "a.nii.gz", False), _oblique(tmp_path / "two", "a.nii.gz", True)
    _predict(trained, first, tmp_path / "out", resume=True)
    manifest = _predict(trained, second, tmp_path / "out", resume=True)
    assert manifest.earlier == set()
    mask, image = nibabel.load(tmp_path / "out" / "a.nii.gz"), nibabel.load(second)
    assert mask.affine.tobytes() == image.affine.tobytes()


def test_evaluation_scores_on_the_native_grid_like_a_plain_dice(
    trained: Bundle, tiny_data: Path, tmp_path: Path
) -> None:
    paths = {"dataset_dir": str(tiny_data), "split": "val", "output_dir": str(tmp_path / "scores")}
    manifest = runner.evaluate(
        prepare("evaluate", trained, {}, paths=paths), list_dataset(tiny_data, "val"), tmp_path / "scores"
    )
    (case,) = list_dataset(tiny_data, "val")
    _predict(trained, [Path(case.image)], tmp_path / "out")
    mask = np.asarray(nibabel.load(tmp_path / "out" / case.name).dataobj)
    label = np.asarray(nibabel.load(case.label).dataobj)
    record = manifest.cases[case.name]
    for value, name in trained.label_names.items():
        dice = 2 * ((mask == value) & (label == value)).sum() / ((mask == value).sum() + (label == value).sum())
        assert record.metrics[name] == pytest.approx(dice, abs=1e-6)
    assert record.metrics["mean"] == pytest.approx(np.mean([record.metrics[n] for n in ("small", "large")]))


def test_weights_of_another_network_are_refused(trained_copy: Bundle, tmp_path: Path) -> None:
    torch.save(torch.nn.Conv3d(1, 3, 3).state_dict(), tmp_path / "other.pt")
    path = _oblique(tmp_path / "in", "a.nii.gz", False)
    with pytest.raises(WeightsError, match="another network"):
        _predict(trained_copy, path, tmp_path / "out", weights=str(tmp_path / "other.pt"))


def test_an_undeclared_bundle_runs_only_for_who_names_its_fingerprint(trained_copy: Bundle, tmp_path: Path) -> None:
    from medseg.bundle.trust import fingerprint

    marker = tmp_path / "ran"
    path = trained_copy.config_path("inference")
    config = json.loads(path.read_text())
    config["handlers"] = f"$[__import__('pathlib').Path({str(marker)!r}).touch()] and []"
    path.write_text(json.dumps(config))
    image = _oblique(tmp_path / "in", "a.nii.gz", False)
    paths = {"dataset_dir": str(image), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UntrustedBundleError, match="handlers"):
        prepare("predict", trained_copy, {}, paths=paths)
    assert not marker.exists()
    trust = fingerprint(trained_copy.root)
    job = prepare("predict", trained_copy, {}, paths=paths, trust=trust)
    assert runner.predict(job, list_cases(image).cases, tmp_path / "out").exit_code == 0
    assert marker.exists()
    assert fingerprint(trained_copy.root) == trust


def test_what_runs_is_what_was_checked(trained_copy: Bundle, tmp_path: Path) -> None:
    image = _oblique(tmp_path / "in", "a.nii.gz", False)
    marker = tmp_path / "ran"
    job = prepare("predict", trained_copy, {}, paths={"dataset_dir": str(image), "output_dir": str(tmp_path / "out")})
    path = trained_copy.config_path("inference")
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "handlers": f"$[__import__('pathlib').Path({str(marker)!r}).touch()] and []"})
    )
    assert runner.predict(job, list_cases(image).cases, tmp_path / "out").exit_code == 0
    assert not marker.exists()


def _with(bundle: Bundle, config: str, **changes: Any) -> Bundle:
    path = bundle.config_path(config)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return bundle


def test_metadata_that_change_after_the_check_are_not_what_runs(trained_copy: Bundle, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    image = _oblique(tmp_path / "in", "a.nii.gz", False)
    _with(trained_copy, "inference", mask_labels="@_meta_::labels")
    _with(trained_copy, "metadata", labels="none")
    paths = {"dataset_dir": str(image), "output_dir": str(tmp_path / "out")}
    job = prepare("predict", trained_copy, {}, paths=paths)
    _with(trained_copy, "metadata", labels=f"$__import__('pathlib').Path({str(marker)!r}).touch()")
    assert open_workflow(job, "infer").parser["_meta_::labels"] == "none"


def test_a_config_that_monai_reads_in_another_way_does_not_run(
    trained_copy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai.bundle import ReferenceResolver

    paths = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out")}
    job = prepare("predict", trained_copy, {}, paths=paths)

    def renamed(self: Any, config: Any) -> Any:
        return {**config, "overlap": "x"} if "overlap" in config else config

    monkeypatch.setattr(ReferenceResolver, "normalize_meta_id", renamed)
    with pytest.raises(BundleError, match="differ from those that were checked"):
        open_workflow(job, "infer")


@pytest.mark.parametrize("place", ["runs", {"_target_": "medseg.components.inside", "root": "runs", "path": "x"}])
def test_a_bundle_does_not_choose_a_folder_where_the_user_is(trained_copy: Bundle, tmp_path: Path, place: Any) -> None:
    _with(trained_copy, "train", output_dir=place)
    paths = {"dataset_dir": str(tmp_path), "resume": False}
    with pytest.raises(BundleError, match=r"sets its own output folder .* pass --set output_dir"):
        prepare("train", trained_copy, {}, paths=paths)
    job = prepare("train", trained_copy, {"output_dir": str(tmp_path / "mine")}, paths=paths)
    assert job.config["output_dir"] == str(tmp_path / "mine")


_NETWORK = {"_target_": "medseg.components.UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network_def": {**_NETWORK, "feature": [4, 8]}}, "unexpected keyword argument 'feature'"),
        ({"network_def": {**_NETWORK, "features": [10**9, 10**9]}}, "medseg.components.UNet.* memory"),
        ({"network_def": {**_NETWORK, "features": [10**99, 10**99]}}, "medseg.components.UNet"),
        ({"evaluator": {"_target_": "medseg.components.identity", "value": 3}}, "no usable evaluator"),
        ({"preprocessing": 3}, "no usable preprocessing"),
        ({"note": "x@:::::y"}, "out of the range"),
        ({"max_memory": [1]}, "SlidingWindowInferer"),
    ],
    ids=["argument", "memory", "overflow", "no engine", "no transform", "odd text", "kind"],
)
def test_parts_that_do_not_go_together_are_an_error_of_the_bundle(
    trained_copy: Bundle, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    _with(trained_copy, "inference", **changes)
    with pytest.raises(BundleError, match=f"(?s)are incompatible.*{said}"):
        _predict(trained_copy, _oblique(tmp_path / "in", "a.nii.gz", False), tmp_path / "out")


@pytest.mark.parametrize("labels", [["x"], {"liver": 1}, {"one": "liver"}])
def test_labels_of_another_form_are_an_error_of_the_bundle(trained_copy: Bundle, labels: Any) -> None:
    _with(trained_copy, "metadata", network_data_format={"outputs": {"pred": {"channel_def": labels}}})
    with pytest.raises(BundleError, match="does not list the labels"):
        _ = trained_copy.label_names


def test_nothing_of_a_bundle_with_links_that_lead_out_is_copied(trained_copy: Bundle, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (trained_copy.root / "LICENSE").unlink(missing_ok=True)
    (trained_copy.root / "LICENSE").symlink_to(tmp_path / "secret")
    for settings in ({}, {"recipe": ""}):
        with pytest.raises(UntrustedBundleError, match="LICENSE"):
            api.train(trained_copy.root, tmp_path, output=tmp_path / "new", settings=settings)
    assert not (tmp_path / "new").exists()


def test_configs_are_not_built_into_a_folder_elsewhere(trained_copy: Bundle, tmp_path: Path) -> None:
    shutil.rmtree(trained_copy.root / "configs")
    (tmp_path / "elsewhere").mkdir()
    (trained_copy.root / "configs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="links outside the bundle"):
        build(trained_copy)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_output_format_of_another_kind_is_refused(trained_copy: Bundle, tmp_path: Path) -> None:
    _with(trained_copy, "inference", output_format={"a": 1})
    with pytest.raises(RequestError, match="'a': 1"):
        _predict(trained_copy, _oblique(tmp_path / "in", "a.nii.gz", False), tmp_path / "out")


def test_pictures_are_trained_on_predicted_and_scored(
    make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path
) -> None:
    tiny_source.update(name="balls_rgb_unet", template="rgb_image", channels={"0": "r", "1": "g", "2": "b"})
    tiny_source["network_def"].update(spatial_dims=2, in_channels=3)
    tiny_source["knobs"] = {"patch_size": [48, 64], "roi_size": [48, 64], "max_epochs": 2, "val_interval": 1}
    bundle = make_bundle(tiny_source)
    data = write_samples(tmp_path / "data", bundle, cases=3)
    runner.train(prepare("train", bundle, {}, paths={"dataset_dir": str(data), "resume": False}))
    assert _predict(bundle, data / "images", tmp_path / "out").exit_code == 0
    with Image.open(data / "images" / "case_0.png") as image, Image.open(tmp_path / "out" / "case_0.png") as mask:
        assert mask.size == image.size
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2}
    paths = {"dataset_dir": str(data), "split": "val", "output_dir": str(tmp_path / "scores")}
    manifest = runner.evaluate(
        prepare("evaluate", bundle, {}, paths=paths), list_dataset(data, "val"), tmp_path / "scores"
    )
    (record,) = manifest.cases.values()
    (case,) = list_dataset(data, "val")
    with Image.open(tmp_path / "out" / case.name) as mask, Image.open(case.label) as label:
        ours, truth = np.asarray(mask) == 1, np.asarray(label) == 1
    dice = 2 * (ours & truth).sum() / (ours.sum() + truth.sum())
    assert record.metrics["small"] == pytest.approx(dice, abs=1e-6)
