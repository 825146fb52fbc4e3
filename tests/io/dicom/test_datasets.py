"""Data sets of DICOM series whose labels are DICOM SEG and RT-STRUCT: listed, trained on, scored and examined."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import medseg
from medseg.bundle.catalog import Bundle
from medseg.diagnosis.doctor import Needs, examine
from medseg.diagnosis.repair import repair
from medseg.errors import CaseError, RequestError
from medseg.files import sha256_file
from medseg.io import find_cases, find_dataset, list_cases, load_label, write_mask
from medseg.io.dicom.seg import write_seg
from medseg.transforms.load import LoadCased
from tests.io.dicom.conftest import ABDOMEN, DATA, written_by_highdicom, written_by_pydicom

NAMES = {1: "small", 2: "large"}
SHAPE = (24, 28, 12)


def balls(seed: int) -> NDArray[np.uint8]:
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    center = np.array(SHAPE) * np.random.default_rng(seed).uniform(0.35, 0.65, 3)
    distance = np.linalg.norm((grid - center) / np.array([1, 1, 0.5]), axis=-1)
    return ((distance < 8).astype(np.uint8) + (distance < 5)).astype(np.uint8)


def one_hot(mask: NDArray[Any], values: Any = NAMES) -> NDArray[np.uint8]:
    """Return `(z, y, x, segment)` as highdicom takes it."""
    return np.stack([mask.transpose(2, 1, 0) == value for value in values], axis=-1).astype(np.uint8)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def sources(write_series: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Series of MR whose folders lie beside each other."""
    root = tmp_path_factory.mktemp("sources")

    def write(name: str, seed: int) -> Any:
        options = {"shape": SHAPE, "spacing": (1.7, 1.9, 3.5), "modality": "MR", "seed": seed}
        return write_series(root / name, edit=lambda ds, _: setattr(ds, "PatientID", name), **options)

    return {name: write(name, seed) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def masks() -> dict[str, NDArray[np.uint8]]:
    return {name: balls(seed) for seed, name in enumerate("abc")}


@pytest.fixture
def dicom_set(sources: dict[str, Any], masks: dict[str, Any], tmp_path: Path) -> Path:
    """Three cases: a SEG of ours, one of highdicom in a folder, and an RT-STRUCT of pydicom for validation."""
    root = tmp_path / "dicom_set"
    for name, source in sources.items():
        shutil.copytree(source.folder, root / "images" / name)
    (root / "labels").mkdir()
    write_seg(masks["a"], root / "labels" / "a.dcm", sources["a"].folder, labels=NAMES)
    written_by_highdicom(sources["b"], root / "labels" / "b" / "1-1.dcm", one_hot(masks["b"]), "BINARY", NAMES)
    written_by_pydicom(sources["c"], root / "labels" / "c.dcm", masks["c"], NAMES)
    write_json(root / "dataset.json", {"labels": {"0": "background", "1": "small", "2": "large"}})
    write_json(root / "split.json", {"train": ["a", "b"], "val": ["c"]})
    return root


@pytest.fixture
def nrrd_set(dicom_set: Path, sources: dict[str, Any], masks: dict[str, Any], tmp_path: Path) -> Path:
    """The same series with the same labels as NRRD, which holds their place to the last bit."""
    root = tmp_path / "nrrd_set"
    shutil.copytree(dicom_set / "images", root / "images")
    shutil.copy(dicom_set / "split.json", root)
    for name, source in sources.items():
        write_mask(masks[name], root / "labels" / f"{name}.nrrd", like=source.folder)
    return root


def test_folders_of_dicom_files_are_the_images_and_files_or_folders_the_labels(dicom_set: Path) -> None:
    cases = find_dataset(dicom_set, "train") + find_dataset(dicom_set, "val")
    assert [case["name"] for case in cases] == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert [case["image"] for case in cases] == [str(dicom_set / "images" / name) for name in "abc"]
    assert [case["label"] for case in cases] == [str(dicom_set / "labels" / name) for name in ("a.dcm", "b", "c.dcm")]
    assert cases[0]["label_options"]["names"] == {"small": 1, "large": 2}
    listed = list_cases(dicom_set)
    assert [case.entry() for case in listed.cases] == [{"image": str(dicom_set / "images" / "c"), "name": "c.nii.gz"}]
    assert not [item for item in listed.skipped if item.path.startswith(str(dicom_set / "images" / "c"))]


def test_a_decathlon_listing_names_folders_series_and_objects(dicom_set: Path) -> None:
    pairs = [{"image": f"images/{name}", "label": f"labels/{name}.dcm"} for name in "ac"]
    pairs[0]["image"] += "::3"
    pairs.append({"image": "images/b", "label": "labels/b"})
    content = {"labels": {"1": "small", "2": "large"}, "training": pairs[:2], "validation": pairs[2:]}
    write_json(dicom_set / "dataset.json", content)
    train = find_dataset(dicom_set, "train")
    assert [case["name"] for case in train] == ["a_3.nii.gz", "c.nii.gz"]
    assert train[0]["image"] == f"{dicom_set / 'images' / 'a'}::3"
    assert [case["name"] for case in find_dataset(dicom_set, "val")] == ["b.nii.gz"]
    assert find_cases(dicom_set) == [{"image": str(dicom_set / "images" / "b"), "name": "b.nii.gz"}]
    loaded = LoadCased(["image", "label"])(train[0])
    assert loaded["label"].unique().tolist() == [0, 1, 2]
    assert not [item for item in examine(dicom_set).findings if item.severity == "error"]


@pytest.mark.parametrize("key", ["image", "label"])
def test_a_listed_folder_without_dicom_files_is_refused(dicom_set: Path, key: str) -> None:
    (dicom_set / "empty").mkdir()
    pair = {"image": "images/a", "label": "labels/a.dcm", key: "empty"}
    write_json(dicom_set / "dataset.json", {"training": [pair]})
    with pytest.raises(RequestError, match="'empty' in 'training' is a folder without DICOM files"):
        find_dataset(dicom_set, "train")


def test_the_loader_gives_each_label_on_the_grid_of_its_image(
    dicom_set: Path, sources: dict[str, Any], masks: dict[str, Any]
) -> None:
    load = LoadCased(["image", "label"], spatial_dims=3, channels=1)
    for case in find_dataset(dicom_set, "train") + find_dataset(dicom_set, "val"):
        loaded, name = load(case), case["name"][0]
        assert set(loaded) == {"image", "label", "name"}
        assert np.array_equal(loaded["label"][0].numpy(), masks[name])
        assert np.array_equal(loaded["image"][0].numpy(), sources[name].values)
        assert np.array_equal(loaded["label"].affine, loaded["image"].affine)


def test_files_in_a_folder_that_have_labels_of_their_own_stay_images(dicom_set: Path) -> None:
    files = sorted(path for path in (dicom_set / "images" / "c").iterdir())[:2]
    for number, path in enumerate(files):
        for folder in ("images", "labels"):
            target = dicom_set / folder / "site" / f"{number}.dcm"
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    write_json(dicom_set / "split.json", {"train": ["site/0"], "val": ["site/1"]})
    (case,) = find_dataset(dicom_set, "train")
    assert (case["image"], case["name"]) == (str(dicom_set / "images/site/0.dcm"), "site/0.nii.gz")
    assert case["label"] == str(dicom_set / "labels/site/0.dcm")


def test_a_folder_without_a_label_is_named(dicom_set: Path) -> None:
    shutil.rmtree(dicom_set / "labels" / "b")
    with pytest.raises(RequestError, match="images/b has no label"):
        find_dataset(dicom_set, "train")


def test_names_come_from_the_loader_where_the_set_has_none_and_else_are_asked_for(
    dicom_set: Path, masks: dict[str, Any]
) -> None:
    (dicom_set / "dataset.json").unlink()
    (case,) = find_dataset(dicom_set, "val")
    with pytest.raises(CaseError, match=r"c\.dcm: no label values are given .* 11 'small', 12 'large'"):
        LoadCased(["image", "label"])(case)
    loaded = LoadCased(["image", "label"], label_names={"small": 1, "large": 2})(case)
    assert np.array_equal(loaded["label"][0].numpy(), masks["c"])


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ({"labels": {"background": 0, "small": 1, "large": 2}}, {1: 1, 2: 2}),
        ({"labels": {"1": ["tiny", "small"], "2": "large"}}, {1: 1, 2: 2}),
        ({"labels": {"7": "large"}}, {1: 0, 2: 7}),
        ({"labels": {"1": "small", "2": "large", "3": "huge"}, "optional_labels": ["huge"]}, {1: 1, 2: 2}),
        ({"labels": {"1": "2", "2": "1"}}, {1: 2, 2: 1}),
    ],
)
def test_a_listing_names_labels_in_several_ways(
    dicom_set: Path, masks: dict[str, Any], content: Any, values: dict[int, int]
) -> None:
    write_json(dicom_set / "dataset.json", content)
    loaded = LoadCased(["image", "label"])(find_dataset(dicom_set, "train")[0])
    expected = np.select([masks["a"] == value for value in values], list(values.values()))
    assert np.array_equal(loaded["label"][0].numpy(), expected)


def test_a_listing_says_which_of_two_that_overlap_counts(dicom_set: Path, sources: dict[str, Any]) -> None:
    pixels = one_hot(balls(1))
    pixels[..., 0] |= pixels[..., 1]
    written_by_highdicom(sources["b"], dicom_set / "labels" / "b" / "1-1.dcm", pixels, "BINARY", NAMES)
    with pytest.raises(CaseError, match="'small' and 'large' in"):
        LoadCased(["image", "label"])(find_dataset(dicom_set, "train")[1])
    write_json(dicom_set / "dataset.json", {"labels": {"1": "small", "2": "large"}, "on_overlap": "later"})
    loaded = LoadCased(["image", "label"])(find_dataset(dicom_set, "train")[1])
    assert np.array_equal(loaded["label"][0].numpy(), balls(1))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"labels": {"1": "small", "2": "Small "}}, "has the name 'Small ' twice"),
        ({"labels": {"whole": [1, 2], "core": [2]}}, r"has 'whole': \[1, 2\]"),
        ({"labels": {"1": 7.5}}, "has '1': 7.5"),
        ({"labels": {"1": ["a", 3]}}, "need a value and a name"),
        ({"labels": ["small"]}, "expected an object of values and names"),
        ({"labels": {"1": "small"}, "optional_labels": "large"}, "expected a list of names"),
        ({"labels": {"1": "small"}, "on_overlap": "first"}, "expected 'refuse' or 'later'"),
    ],
)
def test_names_that_are_wrongly_written_are_refused(dicom_set: Path, content: Any, told: str) -> None:
    write_json(dicom_set / "dataset.json", content)
    with pytest.raises(RequestError, match=told) as error:
        find_dataset(dicom_set, "train")
    assert str(dicom_set / "dataset.json") in str(error.value)


def train(make_bundle: Any, source: dict[str, Any], data: Path) -> Bundle:
    bundle: Bundle = make_bundle(source)
    manifest = medseg.train(bundle.root, data, settings={"max_epochs": 1, "val_interval": 1})
    assert manifest.exit_code == 0
    assert np.isfinite(manifest.validations[0]["val_mean_dice"])
    return bundle


def test_training_and_scores_are_those_on_the_same_labels_as_label_maps(
    make_bundle: Any, tiny_source: dict[str, Any], dicom_set: Path, nrrd_set: Path, tmp_path: Path
) -> None:
    bundles = [train(make_bundle, tiny_source, data) for data in (dicom_set, nrrd_set)]
    assert sha256_file(bundles[0].weights) == sha256_file(bundles[1].weights)
    scores = [
        medseg.evaluate(bundles[0].root, data, output=tmp_path / data.name).cases["c.nii.gz"].metrics
        for data in (dicom_set, nrrd_set)
    ]
    assert scores[0] == scores[1]
    assert scores[0].keys() == {"small", "large", "mean"}
    assert medseg.predict(bundles[0].root, dicom_set, tmp_path / "out").counts["done"] == 1
    assert (tmp_path / "out" / "c.nii.gz").is_file()


@pytest.mark.slow
def test_plain_monai_trains_the_same_weights(make_bundle: Any, tiny_source: dict[str, Any], dicom_set: Path) -> None:
    ours, plain = train(make_bundle, tiny_source, dicom_set), make_bundle(tiny_source)
    command = [
        *(sys.executable, "-m", "monai.bundle", "run", "--config_file", plain.config_path("train")),
        *("--bundle_root", plain.root, "--dataset_dir", dicom_set, "--max_epochs", "1", "--val_interval", "1"),
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert sha256_file(plain.weights) == sha256_file(ours.weights)


def test_the_doctor_counts_the_voxels_of_each_label_and_finds_nothing_wrong(
    dicom_set: Path, masks: dict[str, Any]
) -> None:
    report = examine(dicom_set)
    assert report.errors == 0, report.findings
    for case in report.cases:
        counts = dict(zip(*(part.tolist() for part in np.unique(masks[case.name], return_counts=True)), strict=True))
        assert case.label is not None
        assert case.label.labels == counts
        assert case.image is not None
        assert case.image.modality == "MR"


def test_the_doctor_says_of_each_label_what_training_would_refuse(dicom_set: Path) -> None:
    write_json(dicom_set / "dataset.json", {"labels": {"1": "small", "3": "huge"}})
    found = [item for item in examine(dicom_set).findings if item.severity == "error"]
    assert {item.cases for item in found} == {("a",), ("b",), ("c",)}
    assert all("has no" in item.message and "'huge'" in item.message for item in found)
    (dicom_set / "dataset.json").unlink()
    assert "no label values are given" in examine(dicom_set).findings[0].message
    needs = Needs("b", 3, 1, {"0": 0, "1": 1, "2": 2}, "MR", {"small": 1, "large": 2})
    assert examine(dicom_set, needs=needs).errors == 0


def test_a_repaired_copy_has_the_objects_byte_by_byte(dicom_set: Path, tmp_path: Path) -> None:
    assert repair(examine(dicom_set), tmp_path / "fixed") == []
    for path in dicom_set.rglob("*"):
        if path.is_file():
            assert (tmp_path / "fixed" / path.relative_to(dicom_set)).read_bytes() == path.read_bytes()


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not ABDOMEN.is_dir(), reason=f"needs the real data sets in {DATA}")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom and highdicom, about these files
def test_a_bundle_trains_on_a_real_ct_with_objects_of_other_programs(
    make_bundle: Any, tiny_source: dict[str, Any], abdomen: Any, tmp_path: Path
) -> None:
    source, values = abdomen
    names = {1: "spleen", 5: "liver"}
    mask = np.where(np.isin(values, list(names)), values, 0)
    for name in ("first", "second"):
        shutil.copytree(source.folder, tmp_path / "set" / "images" / name)
    (tmp_path / "set" / "labels").mkdir()
    numbered = dict(enumerate(names.values(), start=1))
    written_by_highdicom(source, tmp_path / "set" / "labels" / "first.dcm", one_hot(mask, names), "BINARY", numbered)
    written_by_pydicom(source, tmp_path / "set" / "labels" / "second" / "rs.dcm", mask, names)
    write_json(tmp_path / "set" / "dataset.json", {"labels": {"1": "spleen", "2": "liver"}})
    write_json(tmp_path / "set" / "split.json", {"train": ["first"], "val": ["second"]})
    truth = (mask == 1) + 2 * (mask == 5)
    for part in ("train", "val"):
        (case,) = find_dataset(tmp_path / "set", part)
        label = load_label(case["label"], like=case["image"], **case["label_options"])
        assert np.array_equal(label[0].numpy(), truth)
    tiny_source.update(name="organs_ct_unet", template="ct_volume", labels={"0": "none", "1": "spleen", "2": "liver"})
    tiny_source["knobs"].update(spacing=[6.0, 6.0, 4.0], patch_size=[16, 16, 8], roi_size=[32, 32, 8])
    bundle = train(make_bundle, tiny_source, tmp_path / "set")
    (record,) = medseg.evaluate(bundle.root, tmp_path / "set", output=tmp_path / "out").cases.values()
    assert record.status == "done", record.error
    assert record.metrics.keys() == {"spleen", "liver", "mean"}
