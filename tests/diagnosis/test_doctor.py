"""Every finding: a data set with one fault gives it, and the faultless one gives none."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medseg.checks.suitability import Needs
from medseg.diagnosis.doctor import examine
from medseg.errors import RequestError
from medseg.io.patients import patient_of
from tests.diagnosis.conftest import AFFINE, SHAPE, ball, noise, write_nifti

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the project")


def kinds(report: Any, *severities: str) -> set[str]:
    return {item.kind for item in report.findings if item.severity in (severities or ("error", "warning", "note"))}


def one(report: Any, kind: str) -> Any:
    found = [item for item in report.findings if item.kind == kind]
    assert len(found) == 1, report.findings
    return found[0]


def image(root: Path, number: int = 0) -> Path:
    return root / "imagesTr" / f"case{number}.nii.gz"


def label(root: Path, number: int = 0) -> Path:
    return root / "labelsTr" / f"case{number}.nii.gz"


def edit_listing(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((root / "dataset.json").read_text())
    change(content)
    (root / "dataset.json").write_text(json.dumps(content))


def test_a_faultless_set_has_no_findings_and_true_facts(dataset: Path) -> None:
    report = examine(dataset)
    assert report.findings == ()
    assert [(case.name, case.part) for case in report.cases] == [
        ("case0", "train"),
        ("case1", "train"),
        ("case2", "train"),
        ("case3", "val"),
    ]
    facts, marks = report.cases[0].image, report.cases[0].label
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(image(dataset))))
    values, counts = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(label(dataset)))), return_counts=True)
    assert facts.shape == array.T.shape
    assert facts.spacing == pytest.approx(sitk.ReadImage(str(image(dataset))).GetSpacing(), abs=1e-5)
    assert facts.orientation == "".join(nib.aff2axcodes(AFFINE))
    assert (facts.minimum, facts.maximum) == (array.min(), array.max())
    assert facts.percentiles == pytest.approx(np.percentile(array, (1, 50, 99)))
    assert marks.labels == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_the_report_is_json_and_holds_no_absolute_path(dataset: Path) -> None:
    label(dataset).write_bytes(b"damaged")
    text = json.dumps(examine(dataset).to_json())
    assert "labelsTr/case0.nii.gz" in text
    assert str(dataset) not in text


def _shift(root: Path) -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += AFFINE[:3, 2] * 2
    write_nifti(label(root), ball(), moved)


def _flip(root: Path) -> None:
    write_nifti(label(root), ball(), AFFINE @ np.diag([-1, 1, 1, 1]))


def _turn(root: Path) -> None:
    loaded = nib.Nifti1Image(ball(), AFFINE)
    turned = loaded.as_reoriented(np.array([[1, -1], [0, 1], [2, 1]]))
    write_nifti(label(root), np.asarray(turned.dataobj), turned.affine)


def _stretch(root: Path) -> None:
    write_nifti(label(root), ball(), AFFINE @ np.diag([2, 2, 2, 1]))


def _halve(root: Path) -> None:
    write_nifti(label(root), ball((24, 28, 10)), AFFINE @ np.diag([0.5, 0.5, 1, 1]))


def _round(root: Path) -> None:
    rounded = AFFINE.copy()
    rounded[0, 3] += 0.05
    write_nifti(label(root), ball(), rounded)


@pytest.mark.parametrize(
    ("spoil", "kind", "says", "repair"),
    [
        (_shift, "grids: shifted", "(0, 0, 6) mm, (0, 0, 2) voxels", ""),
        (_flip, "grids: flipped", "LAS instead of RAS", ""),
        (_turn, "grids: turned", "instead of RAS", "resample"),
        (_stretch, "grids: other place", "differ in spacing", ""),
        (_halve, "grids: other shape", "100.0% of the label's foreground", "resample"),
        (_round, "rounded header", "0.05 mm", "header"),
    ],
)
def test_grids_that_differ_are_told_apart(
    dataset: Path, spoil: Callable[[Path], None], kind: str, says: str, repair: str
) -> None:
    spoil(dataset)
    report = examine(dataset)
    finding = one(report, kind)
    assert kinds(report) == {kind}
    assert says in finding.message
    assert finding.cases == ("case0",)
    assert finding.repair == repair
    assert finding.severity == ("note" if kind == "rounded header" else "error")


def _with_label(array: Any) -> Callable[[Path], None]:
    return lambda root: write_nifti(label(root), array) and None


def _with_image(array: Any, **options: Any) -> Callable[[Path], None]:
    return lambda root: write_nifti(image(root), array, **options) and None


def _nan(root: Path) -> None:
    array = noise(0).astype(np.float32)
    array[1, 2, 3], array[4, 5, 6] = np.nan, np.inf
    write_nifti(image(root), array)


def _on_nothing(root: Path) -> None:
    array = noise(0)
    array[ball() > 0] = -1024
    write_nifti(image(root), array)


def _sform_qform(root: Path) -> None:
    write_nifti(image(root), noise(0), qform=np.diag([1.5, 1.5, 3, 1]))


def _pixdim(root: Path) -> None:
    loaded = nib.load(image(root))
    loaded.header["pixdim"][1:4] = 1
    nib.save(nib.Nifti1Image(np.asarray(loaded.dataobj), None, loaded.header), image(root))


def _cut_short(root: Path) -> None:
    image(root).write_bytes(image(root).read_bytes()[:900])


def _ct(root: Path) -> None:
    edit_listing(root, lambda content: content.update(modality={"0": "CT"}))


def _ct_without_offset(root: Path) -> None:
    _ct(root)
    write_nifti(image(root), noise(0) + np.int16(1024))


def _ct_padded(root: Path) -> None:
    _ct(root)
    array = noise(0)
    array[0] = -3024
    write_nifti(image(root), array)


def _ct_too_low(root: Path) -> None:
    _ct(root)
    write_nifti(image(root), noise(0) * np.int16(10))


def _ct_of_one_millimeter(root: Path) -> None:
    _ct(root)
    for number in range(4):
        write_nifti(image(root, number), noise(number), np.eye(4))
        write_nifti(label(root, number), ball(center=0.4 + 0.05 * number), np.eye(4))


SOFT = ball().astype(np.float32) * 0.5


@pytest.mark.parametrize(
    ("spoil", "severity", "kind", "says"),
    [
        (_with_label(np.zeros(SHAPE, np.uint8)), "warning", "empty mask", "labelsTr/case0.nii.gz marks nothing"),
        (_with_label(np.ones(SHAPE, np.uint8)), "warning", "full mask", "is 1"),
        (_with_label(ball() + np.uint8(6) * (ball() > 1)), "error", "unknown label", "the label 8, which dataset.json"),
        (_with_label(-ball().astype(np.int16)), "error", "negative label", "-2"),
        (_with_label(SOFT), "error", "not read", "holds 0.5: expected whole numbers"),
        (_with_label(ball().astype(np.float32)), "note", "label as float", "float32"),
        (_with_image(np.full(SHAPE, 7, np.int16)), "warning", "constant image", "is 7"),
        (_with_image(np.stack([noise(0)] * 3, axis=-1)), "error", "channels", "has 3 values per voxel, dataset.json"),
        (_with_image(noise(0)[..., None]), "note", "extra axis", "(12, 14, 10, 1)"),
        (_nan, "error", "no numbers", "2 values of imagesTr/case0.nii.gz are NaN or infinite"),
        (_on_nothing, "warning", "label on nothing", "100% of the label"),
        (_sform_qform, "warning", "sform and qform", "mm apart"),
        (_pixdim, "warning", "sform and pixdim", "ITK"),
        (_cut_short, "error", "not read", "imagesTr/case0.nii.gz is damaged"),
        (_ct_without_offset, "warning", "no Hounsfield units", "offset of -1024"),
        (_ct_padded, "note", "padding", "8.3% of imagesTr/case0.nii.gz is the padding value -3024"),
        (_ct_too_low, "warning", "no Hounsfield units", "no Hounsfield units"),
        (_ct_of_one_millimeter, "warning", "made-up header", "exactly 1 mm"),
    ],
    ids=lambda value: value if isinstance(value, str) and value else None,
)
def test_each_fault_of_a_case_is_found(
    dataset: Path, spoil: Callable[[Path], None], severity: str, kind: str, says: str
) -> None:
    spoil(dataset)
    report = examine(dataset)
    found = [item for item in report.findings if item.kind == kind]
    assert found[0].severity == severity
    assert says in found[0].message
    assert found[0].cases == ("case0",)
    assert report.errors == sum(item.severity == "error" for item in report.findings)


def test_values_beyond_a_slab_are_counted(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = examine(dataset).to_json()
    monkeypatch.setattr("medseg.io.survey._SLAB_VALUES", 200)
    assert examine(dataset).to_json() == whole
    monkeypatch.setattr("medseg.io.survey._TABLE", 1)
    assert examine(dataset).to_json() == whole


# --- the set


def test_copies_are_found_however_they_are_stored(dataset: Path) -> None:
    loaded = nib.load(image(dataset, 0))
    turned = nib.Nifti1Image(np.asarray(loaded.dataobj), loaded.affine).as_reoriented(
        np.array([[1, -1], [0, 1], [2, -1]])
    )
    write_nifti(image(dataset, 1), np.asarray(turned.dataobj).astype(np.float32), turned.affine)
    finding = one(examine(dataset), "duplicate")
    assert finding.cases == ("case0", "case1")
    assert "their labels differ" in finding.message
    assert finding.repair == ""


def test_a_copy_on_both_sides_of_the_split_is_an_error(dataset: Path) -> None:
    shutil.copy(image(dataset, 0), image(dataset, 3))
    shutil.copy(label(dataset, 0), label(dataset, 3))
    finding = one(examine(dataset), "leak")
    assert (finding.severity, finding.cases, finding.repair) == ("error", ("case0", "case3"), "duplicate")


def test_a_part_of_a_volume_with_the_affine_of_the_whole_is_found(dataset: Path) -> None:
    write_nifti(image(dataset, 3), noise(0)[..., 4:9])
    write_nifti(label(dataset, 3), ball()[..., 4:9])
    finding = one(examine(dataset), "leak")
    assert "share 5 slices (case0 4-8, case3 0-4" in finding.message
    assert "12 mm apart: at least one affine is wrong" in finding.message


def test_a_part_of_a_volume_in_its_true_place_is_no_fault_of_the_affine(dataset: Path) -> None:
    place = AFFINE.copy()
    place[:3, 3] += AFFINE[:3, 2] * 4
    write_nifti(image(dataset, 1), noise(0)[..., 4:9], place)
    write_nifti(label(dataset, 1), ball()[..., 4:9], place)
    finding = one(examine(dataset), "duplicate")
    assert finding.severity == "warning"
    assert "affine" not in finding.message


def test_one_label_for_two_images_is_suspicious(dataset: Path) -> None:
    shutil.copy(label(dataset, 0), label(dataset, 1))
    assert one(examine(dataset), "one label twice").cases == ("case0", "case1")


def test_a_grid_unlike_the_others_is_found(dataset: Path, nifti: Callable[..., Path]) -> None:
    folder = dataset.parent / "images"
    for number in range(6):
        affine = AFFINE @ np.diag([4, 4, 4, 1]) if number == 5 else AFFINE
        nifti(folder / f"x{number}.nii.gz", noise(number), affine)
    nifti(folder / "x6.nii.gz", noise(6), AFFINE @ np.diag([-1, 1, 1, 1]))
    report = examine(folder)
    assert one(report, "unusual spacing").cases == ("x5",)
    assert one(report, "unusual extent").cases == ("x5",)
    assert one(report, "unusual orientation").cases == ("x6",)


def test_a_label_that_no_case_holds_is_noted(dataset: Path) -> None:
    edit_listing(dataset, lambda content: content["labels"].update({"3": "rim"}))
    assert "3 (rim)" in one(examine(dataset), "unused label").message


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("sub-012_ses-1_T1w", "sub-012"),
        ("TCGA-AB-1234-01Z", "tcga-ab-1234"),
        ("LIDC-IDRI-0314_1", "lidc-idri-0314"),
        ("patient_07_slice_3", "patient_07"),
        ("abc_slice_012", "abc"),
        ("Image_01L", "image_01"),
        ("knee12_right", "knee12"),
        ("hippocampus_001", ""),
        ("train_10", ""),
        ("0280fa8f60f6", ""),
        ("CELL", ""),
    ],
)
def test_patients_are_told_by_names_carefully(name: str, patient: str) -> None:
    assert patient_of(name) == patient


def test_a_patient_on_both_sides_by_name_is_a_warning(tmp_path: Path) -> None:
    root = tmp_path / "eyes"
    names = ["Image_01L", "Image_01R", "Image_02L"]
    for number, name in enumerate(names):
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise(number, (20, 30)) % 200).astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(ball((20, 30), 0.4 + 0.1 * number)).save(root / "labels" / f"{name}.png")
    (root / "split.json").write_text(json.dumps({"train": names[:1], "val": names[1:]}))
    finding = one(examine(root), "patient")
    assert (finding.severity, finding.cases) == ("warning", ("Image_01L", "Image_01R"))


def test_a_dicom_patient_on_both_sides_is_an_error_without_a_name(dicom: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "set"
    entries = []
    for number, patient in enumerate(("Secret-1", "Secret-1", "Secret-2")):
        folder = dicom(root / f"series{number}", noise(number), patient=patient)
        mask = nib.Nifti1Image(ball(center=0.4 + number * 0.1), np.diag([-0.8, -0.8, 2.5, 1]))
        mask.affine[:2, 3] = 30, 40
        write_nifti(root / f"label{number}.nii.gz", np.asarray(mask.dataobj), mask.affine)
        entries.append({"image": folder.name, "label": f"label{number}.nii.gz"})
    listing = {"training": entries[:1], "validation": entries[1:]}
    (root / "dataset.json").write_text(json.dumps(listing))
    report = examine(root)
    finding = one(report, "patient")
    assert (finding.severity, finding.cases) == ("error", ("series0", "series1"))
    assert report.cases[0].image.modality == "CT"
    assert "Secret" not in json.dumps(report.to_json())
    assert "Secret" not in repr(report)


# --- the listing


def test_a_listed_file_that_is_missing_does_not_stop_the_rest(dataset: Path) -> None:
    image(dataset, 1).unlink()
    report = examine(dataset)
    assert "imagesTr/case1.nii.gz is listed in dataset.json and is not there" in one(report, "missing file").message
    assert [case.name for case in report.cases] == ["case0", "case2", "case3"]


def test_paths_out_of_the_folder_are_not_followed(dataset: Path) -> None:
    (dataset.parent / "secret.nii.gz").write_bytes(image(dataset).read_bytes())
    edit_listing(dataset, lambda content: content["training"][0].update(image="../secret.nii.gz"))
    report = examine(dataset)
    assert any("leads out of the data set's folder" in item.message for item in report.findings)
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
    assert kinds(report) == {"no split", "no label", "label without image"}
    assert one(report, "no label").cases == ("b",)
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


def test_one_file_and_a_folder_of_images(dataset: Path) -> None:
    assert [case.name for case in examine(image(dataset)).cases] == ["case0"]
    (dataset / "imagesTr" / "notes.txt").write_text("x")
    report = examine(dataset / "imagesTr")
    assert len(report.cases) == 4
    assert "notes.txt" in one(report, "left out").message


def test_nothing_to_examine_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Nothing to predict"):
        examine(tmp_path)


def test_a_missing_package_is_a_finding_not_the_end(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RequestError('pip install "medseg[dicom]"')

    monkeypatch.setattr("medseg.diagnosis.doctor.open_label", refuse)
    report = examine(dataset)
    assert [item.message for item in report.findings] == ['pip install "medseg[dicom]"'] * 4
    assert all(case.image for case in report.cases)


# --- a bundle


def test_what_a_bundle_cannot_read_is_an_error(dataset: Path) -> None:
    needs = Needs("pictures", 2, 3, {"0": 0, "1": 1}, "RGB")
    report = examine(dataset, needs=needs)
    assert "pictures cannot read it" in next(i.message for i in report.findings if i.kind == "not for this bundle")
    unknown = [item for item in report.findings if item.kind == "unknown label"]
    assert len(unknown) == 4
    assert "the label 2, which the mapping of pictures does not name" in unknown[0].message
    assert examine(dataset, needs=Needs("good", 3, 1, {"0": 0, "1": 1, "2": 2}, "MRI")).findings == ()


# --- real data


@pytest.mark.data
@needs_data
def test_the_real_trap_is_found() -> None:
    finding = one(examine(DATA / "ct_abdomen_totalseg"), "leak")
    assert "ct_full 82-111, ct_small 0-29" in finding.message
    assert "246 mm apart: at least one affine is wrong" in finding.message


@pytest.mark.data
@needs_data
@pytest.mark.parametrize("name", ["msd_hippocampus", "glas", "dsb2018"])
def test_real_sets_have_no_errors(name: str, tmp_path: Path) -> None:
    """Three cases of each; the sets are whole, so nothing of them may be an error.

    A case takes some 20 ms of processor time; the bound leaves room for slow machines, not for reading everything twice
    per finding.
    """
    source, root = DATA / name, tmp_path / name
    root.mkdir()
    listing = source / "dataset.json"
    if listing.is_file():
        content = json.loads(listing.read_text())
        content |= {"training": content["training"][:2], "validation": content["validation"][:1], "test": []}
        (root / "dataset.json").write_text(json.dumps(content))
        files = [entry[key] for part in ("training", "validation") for entry in content[part] for key in entry]
    else:
        split = json.loads((source / "split.json").read_text())
        split = {"train": split["train"][:2], "val": split["val"][:1]}
        (root / "split.json").write_text(json.dumps(split))
        stems = [*split["train"], *split["val"]]
        files = [path.relative_to(source).as_posix() for stem in stems for path in source.glob(f"*/{stem}.*")]
    for file in files:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).symlink_to(source / file)
    start = time.process_time()
    report = examine(root)
    assert time.process_time() - start < 3
    assert len(report.cases) == 3
    assert all(case.image and case.label and case.label.labels for case in report.cases)
    assert report.errors == 0
