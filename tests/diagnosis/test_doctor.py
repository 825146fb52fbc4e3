"""Every finding: a data set with one fault gives it, and the faultless one gives none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medseg.checks.suitability import Needs
from medseg.diagnosis.doctor import examine
from medseg.errors import RequestError
from tests.diagnosis.conftest import AFFINE, SHAPE, ball, edit_listing, image, kinds, label, noise, one, write_nifti

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the project")


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
        (_shift, "geometry mismatch: shifted", "(0, 0, 6) mm, (0, 0, 2) voxels", ""),
        (_flip, "geometry mismatch: flipped", "LAS instead of RAS", ""),
        (_turn, "geometry mismatch: reoriented", "instead of RAS", "resample"),
        (_stretch, "geometry mismatch: affine", "differ in spacing", ""),
        (_halve, "geometry mismatch: shape", "100.0% of the label's foreground", "resample"),
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
        (_with_label(np.zeros(SHAPE, np.uint8)), "warning", "empty mask", "labelsTr/case0.nii.gz has no foreground"),
        (_with_label(np.ones(SHAPE, np.uint8)), "warning", "full mask", "is 1"),
        (
            _with_label(ball() + np.uint8(6) * (ball() > 1)),
            "error",
            "unknown label",
            "the label value 8, which is missing in",
        ),
        (_with_label(-ball().astype(np.int16)), "error", "negative label", "-2"),
        (_with_label(SOFT), "error", "unreadable", "non-integer value 0.5: expected integers"),
        (_with_label(ball().astype(np.float32)), "note", "floating-point label", "float32"),
        (_with_image(np.full(SHAPE, 7, np.int16)), "warning", "constant image", "is 7"),
        (_with_image(np.stack([noise(0)] * 3, axis=-1)), "error", "channels", "has 3 channels, but dataset.json"),
        (_with_image(noise(0)[..., None]), "note", "singleton dimension", "(12, 14, 10, 1)"),
        (_nan, "error", "non-finite values", "imagesTr/case0.nii.gz contains 2 non-finite values"),
        (_on_nothing, "warning", "label on padding", "100% of the label"),
        (_sform_qform, "warning", "sform and qform", "differ by up to"),
        (_pixdim, "warning", "sform and pixdim", "ITK"),
        (_cut_short, "error", "unreadable", "imagesTr/case0.nii.gz is damaged"),
        (_ct_without_offset, "warning", "not Hounsfield units", "intercept of -1024"),
        (_ct_padded, "note", "padding value", "8.3% of imagesTr/case0.nii.gz is the padding value -3024"),
        (_ct_too_low, "warning", "not Hounsfield units", "not Hounsfield units"),
        (_ct_of_one_millimeter, "warning", "suspicious affine", "exactly 1 mm"),
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


def test_one_file_and_a_folder_of_images(dataset: Path) -> None:
    assert [case.name for case in examine(image(dataset)).cases] == ["case0"]
    (dataset / "imagesTr" / "notes.txt").write_text("x")
    report = examine(dataset / "imagesTr")
    assert len(report.cases) == 4
    assert "notes.txt" in one(report, "skipped").message


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
    assert "Incompatible with bundle pictures" in next(
        i.message for i in report.findings if i.kind == "incompatible image"
    )
    unknown = [item for item in report.findings if item.kind == "unknown label"]
    assert len(unknown) == 4
    assert "the label value 2, which is missing in the mapping of pictures" in unknown[0].message
    assert examine(dataset, needs=Needs("good", 3, 1, {"0": 0, "1": 1, "2": 2}, "MRI")).findings == ()


# --- real data


@pytest.mark.data
@needs_data
def test_the_real_trap_is_found() -> None:
    finding = one(examine(DATA / "ct_abdomen_totalseg"), "leak")
    assert "ct_full 82-111, ct_small 0-29" in finding.message
    assert "246 mm apart by their affines: at least one affine is wrong" in finding.message


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
