"""What is listed at a path, and what is wrong with the listing, before any image is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medseg.checks.subjects import Collection, find_subjects
from medseg.checks.suitability import Needs, check_case
from medseg.errors import RequestError
from medseg.io.survey import open_image
from tests.diagnosis.conftest import edit_listing, image, label, noise, write_nifti


def faults(collection: Collection) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.severity, finding.cases) for finding in collection.findings]


def test_a_faultless_listing_has_no_findings(dataset: Path) -> None:
    found = find_subjects(dataset)
    assert found == find_subjects(dataset / "dataset.json")
    assert found.findings == ()
    assert [(subject.name, subject.part) for subject in found.subjects] == [
        ("case0", "train"),
        ("case1", "train"),
        ("case2", "train"),
        ("case3", "val"),
    ]
    assert [subject.label for subject in found.subjects] == [str(label(dataset, number)) for number in range(4)]
    assert found.labels == {0: "background", 1: "shell", 2: "core"}
    assert (found.modality, found.channels, found.listings) == ("MRI", 1, (dataset / "dataset.json",))


def test_nothing_is_opened_to_list_cases(dataset: Path) -> None:
    for number in range(4):
        image(dataset, number).write_bytes(b"no image")
        label(dataset, number).write_bytes(b"no label")
    assert len(find_subjects(dataset).subjects) == 4
    assert find_subjects(dataset).findings == ()


def test_a_folder_of_images_lists_them_and_what_it_skips(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    for number in range(2):
        write_nifti(folder / f"s{number}.nii.gz", noise(number))
    for number in range(5):
        (folder / f"note{number}.docx").write_text("dear")
    found = find_subjects(folder)
    assert [(subject.name, subject.label, subject.part) for subject in found.subjects] == [
        ("s0", None, ""),
        ("s1", None, ""),
    ]
    (finding,) = found.findings
    assert finding.severity == "note"
    assert "5" in finding.message
    assert [f"note{number}.docx" in finding.message for number in range(5)] == [True] * 3 + [False] * 2
    assert "2 more" in finding.message


def test_one_file_is_a_collection_of_one(dataset: Path) -> None:
    found = find_subjects(image(dataset))
    assert [subject.name for subject in found.subjects] == ["case0"]
    assert found.root == image(dataset).parent


@pytest.mark.parametrize("images", [["a/x", "b/x"], ["a/x", "a/y"]])
def test_cases_are_named_by_their_file_and_by_their_path_if_names_repeat(images: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(images):
        write_nifti(tmp_path / f"{name}.nii.gz", noise(number))
    entries = [{"image": f"{name}.nii.gz"} for name in images]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries, "validation": []}))
    stems = [name.rpartition("/")[2] for name in images]
    expected = stems if len(set(stems)) == 2 else images
    assert [subject.name for subject in find_subjects(tmp_path).subjects] == expected


def test_a_listing_of_files_that_are_all_missing_is_refused(dataset: Path) -> None:
    for number in range(4):
        image(dataset, number).unlink()
    with pytest.raises(RequestError, match=r"dataset\.json"):
        find_subjects(dataset)


@pytest.mark.parametrize("entry", [3, None, {}, {"image": ""}, {"image": 3}, ["imagesTr/case0.nii.gz"]])
def test_an_entry_without_an_image_is_an_error_and_the_others_stay(entry: Any, dataset: Path) -> None:
    edit_listing(dataset, lambda content: content["training"].append(entry))
    found = find_subjects(dataset)
    assert len(found.subjects) == 4
    assert "error" in {finding.severity for finding in found.findings}


@pytest.mark.parametrize(("section", "severity"), [("training", "error"), ("validation", "error"), ("test", None)])
def test_every_case_but_those_for_testing_needs_a_label(section: str, severity: str | None, dataset: Path) -> None:
    write_nifti(dataset / "imagesTr" / "new.nii.gz", noise(9))
    entry: Any = {"image": "imagesTr/new.nii.gz"}
    edit_listing(dataset, lambda content: content.update({section: [*content.get(section, []), entry]}))
    found = faults(find_subjects(dataset))
    assert ((severity, ("new",)) in found) == (severity is not None)
    assert len([cases for _, cases in found if cases == ("new",)]) == (severity is not None)


@pytest.mark.parametrize(
    ("changes", "modality", "channels"),
    [
        ({"modality": {"0": "CT", "1": "PET"}}, "CT", 2),
        ({"modality": {}, "channel_names": {"0": "T1"}}, "T1", 1),
        ({"modality": "CT"}, "CT", None),
        ({"modality": None}, "", None),
    ],
)
def test_modality_and_channels_are_those_of_the_listing(
    changes: dict[str, Any], modality: str, channels: int | None, dataset: Path
) -> None:
    edit_listing(dataset, lambda content: content.update(changes))
    found = find_subjects(dataset)
    assert (found.modality, found.channels) == (modality, channels)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"0": "background", "3": ["liver", "Leber"]}, {0: "background", 3: "liver or Leber"}),
        ({"background": 0, "whole": [1, 2], "core": 2}, {0: "background", 1: "whole", 2: "whole"}),
        ({"liver": "1"}, {}),
        (["background", "liver"], {}),
        (None, {}),
    ],
)
def test_label_names_are_read_from_both_kinds_of_listing(labels: Any, names: dict[int, str], dataset: Path) -> None:
    edit_listing(dataset, lambda content: content.update(labels=labels))
    assert find_subjects(dataset).labels == names


@pytest.mark.parametrize("changes", [{"optional_labels": "core"}, {"on_overlap": "first"}])
def test_a_faulty_rule_for_dicom_labels_leaves_the_cases_listed(changes: dict[str, Any], dataset: Path) -> None:
    edit_listing(dataset, lambda content: content.update(changes))
    found = find_subjects(dataset)
    assert found.label_options == {}
    assert len(found.subjects) == 4


def test_folders_that_cannot_be_paired_are_listed_without_labels(tmp_path: Path) -> None:
    for folder, name in (("images", "a.nii.gz"), ("images", "a.nii"), ("labels", "a.nii.gz")):
        write_nifti(tmp_path / folder / name, noise(1))
    found = find_subjects(tmp_path)
    assert found.findings[0].severity == "error"
    assert {subject.label for subject in found.subjects} == {None}
    assert {Path(subject.image).name for subject in found.subjects} == {"a.nii", "a.nii.gz"}


def test_paths_are_shown_relative_to_the_root(tmp_path: Path) -> None:
    collection = Collection(tmp_path / "set", ())
    assert collection.relative(tmp_path / "set" / "imagesTr" / "a.nii") == "imagesTr/a.nii"
    assert collection.relative(tmp_path / "settings" / "a.nii") == "a.nii"
    assert collection.shortened(f"{tmp_path}/set/a.nii is damaged") == "a.nii is damaged"


@pytest.mark.parametrize(
    ("changes", "severities"),
    [
        ({}, []),
        ({"channels": 2}, ["error"]),
        ({"spatial_dims": 2}, ["error"]),
    ],
)
def test_an_image_that_a_bundle_cannot_read_is_one_error(
    changes: dict[str, Any], severities: list[str], dataset: Path
) -> None:
    found = find_subjects(dataset)
    facts = open_image(str(image(dataset)), "case0.nii.gz").facts
    needs: dict[str, Any] = {"spatial_dims": 3, "channels": 1, **changes}
    wanted = Needs(name="balls", mapping=None, modality="MRI", **needs)
    findings = list(check_case(found.subjects[0], found, facts, wanted))
    assert [finding.severity for finding in findings] == severities
    assert all("balls" in finding.message and str(dataset) not in finding.message for finding in findings)
