"""The cases of a data set, listed even where the listing is faulty."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from medseg.diagnosis.doctor import examine
from medseg.errors import RequestError
from tests.diagnosis.conftest import ball, edit_listing, image, kinds, noise, one, write_nifti

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the project")


def test_a_listed_file_that_is_missing_does_not_stop_the_rest(dataset: Path) -> None:
    image(dataset, 1).unlink()
    report = examine(dataset)
    assert "imagesTr/case1.nii.gz is listed in dataset.json but does not exist" in one(report, "missing file").message
    assert [case.name for case in report.cases] == ["case0", "case2", "case3"]


def test_paths_out_of_the_folder_are_not_followed(dataset: Path) -> None:
    (dataset.parent / "secret.nii.gz").write_bytes(image(dataset).read_bytes())
    edit_listing(dataset, lambda content: content["training"][0].update(image="../secret.nii.gz"))
    report = examine(dataset)
    assert any("is outside the data set's folder" in item.message for item in report.findings)
    assert [case.name for case in report.cases] == ["case1", "case2", "case3"]


def test_a_split_that_repeats_a_case_is_an_error(dataset: Path) -> None:
    edit_listing(dataset, lambda content: content["validation"].append(content["training"][0]))
    report = examine(dataset)
    assert "more than once" in one(report, "listing").message
    assert "leak" in kinds(report, "error")


@pytest.mark.parametrize("section", ["training", "validation", "test"])
@pytest.mark.parametrize("value", [5, {"a": 1}, "imagesTr"])
def test_a_section_that_is_no_list_is_a_finding(dataset: Path, section: str, value: object) -> None:
    edit_listing(dataset, lambda content: content.update({"validation": content["training"], section: value}))
    report = examine(dataset)
    assert any(f"'{section}' is a {type(value).__name__}" in item.message for item in report.findings)
    assert report.cases


@pytest.mark.parametrize("name", ["²", "--5", "9" * 5000])
def test_label_keys_that_only_look_like_numbers_are_names(dataset: Path, name: str) -> None:
    edit_listing(dataset, lambda content: content["labels"].update({name: 7}))
    assert examine(dataset).collection.labels[7] == name


@pytest.mark.parametrize("text", ["a" * 5000, "a" * 5000 + "::3", "a\0b"])
def test_names_that_no_file_has_are_missing_files(dataset: Path, text: str) -> None:
    edit_listing(dataset, lambda content: content["training"][0].update(image=text))
    assert one(examine(dataset), "missing file").severity == "error"


@pytest.mark.parametrize("split", [{"train": 5, "val": ["a"]}, {"train": [["a"]], "val": ["b"]}])
def test_a_split_that_lists_no_names_is_a_finding(tmp_path: Path, split: object) -> None:
    root = _folders(tmp_path, ["a", "b"], ["a", "b"])
    (root / "split.json").write_text(json.dumps(split))
    assert "expected a list of case names" in one(examine(root), "listing").message


@pytest.mark.parametrize("name", ["dataset.json", "split.json", "splits_final.json"])
def test_json_that_is_too_deep_is_told(tmp_path: Path, name: str) -> None:
    root = _folders(tmp_path, ["a", "b"], ["a", "b"])
    (root / name).write_text("[" * 100_000)
    if name == "dataset.json":
        with pytest.raises(RequestError, match="too deep"):
            examine(root)
    else:
        assert any("too deep" in item.message for item in examine(root).findings)


def test_the_first_fold_of_nnunet_tells_the_parts_and_their_leaks(tmp_path: Path) -> None:
    root = _folders(tmp_path, ["a", "b", "c"], ["a", "b", "c"])
    shutil.copy(root / "images" / "a.nii.gz", root / "images" / "c.nii.gz")
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    report = examine(root)
    assert [case.part for case in report.cases] == ["train", "train", "val"]
    assert one(report, "leak").cases == ("a", "c")
    assert "no split" not in kinds(report)


def _folders(tmp_path: Path, stems: list[str], labels: list[str]) -> Path:
    root = tmp_path / "folders"
    for number, stem in enumerate(stems):
        write_nifti(root / "images" / f"{stem}.nii.gz", noise(number))
    for number, stem in enumerate(labels):
        write_nifti(root / "labels" / f"{stem}.nii.gz", ball(center=0.4 + 0.05 * number))
    return root


def test_folders_without_a_split_and_unpaired_files(tmp_path: Path) -> None:
    report = examine(_folders(tmp_path, ["a", "b"], ["a", "c"]))
    assert kinds(report) == {"no split", "missing label", "label without image"}
    assert one(report, "missing label").cases == ("b",)
    assert one(report, "label without image").cases == ("c",)


def test_the_split_file_of_folders_counts(tmp_path: Path) -> None:
    root = _folders(tmp_path, ["a", "b"], ["a", "b"])
    (root / "split.json").write_text(json.dumps({"train": ["a"], "val": ["b", "z"]}))
    report = examine(root)
    assert [case.part for case in report.cases] == ["train", "val"]
    assert "'z'" in one(report, "listing").message


def test_an_nnunet_folder_is_read_with_its_labels(tmp_path: Path) -> None:
    root = tmp_path / "Dataset001"
    for number in range(2):
        write_nifti(root / "imagesTr" / f"a_{number}_0000.nii.gz", noise(number))
        write_nifti(root / "labelsTr" / f"a_{number}.nii.gz", ball(center=0.4 + 0.1 * number))
    content = {"labels": {"background": 0, "shell": 1}, "channel_names": {"0": "CT"}}
    (root / "dataset.json").write_text(json.dumps(content))
    report = examine(root)
    assert report.collection.modality == "CT"
    unknown = [item for item in report.findings if item.kind == "unknown label"]
    assert [item.cases for item in unknown] == [("a_0_0000",), ("a_1_0000",)]
