"""Saved labels as training data: values by their names, voxels on the image."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medseg.errors import CaseError, GeometryError, RequestError
from medseg.io import find_dataset
from medseg.label.annotations import Annotation, collect, dice, label_mapping, read_annotation, segment_infos

LABELS = {"anterior": 1, "posterior": 2}
AFFINE = np.array([[-1.5, 0.0, 0.1, 20.0], [0.1, -1.2, 0.0, 30.0], [0.0, 0.1, 2.0, -10.0], [0.0, 0.0, 0.0, 1.0]])
AFFINE[:3, :3] = np.linalg.qr(AFFINE[:3, :3])[0] * [1.5, 1.2, 2.0]


def _write(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def truth() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (7, 8, 9)).astype(np.uint8)


@pytest.fixture
def image(tmp_path: Path, truth: np.ndarray) -> Path:
    return _write(tmp_path / "MUELLER.nii.gz", (truth * 100).astype(np.int16), AFFINE)


def _annotation(image: Path, label: Path, info: list[dict[str, object]] | None = None) -> Annotation:
    return Annotation("MUELLER", image, label, info or [])


@pytest.mark.parametrize("flips", [(), (0,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_axes_in_another_order_or_direction_are_brought_back(image, truth, flips, order, tmp_path: Path) -> None:
    turned = nibabel.Nifti1Image(truth, AFFINE)
    orientation = np.array([[order[axis], -1 if axis in flips else 1] for axis in range(3)])
    turned = turned.as_reoriented(orientation)
    label = tmp_path / "label.nii.gz"
    nibabel.save(turned, label)
    assert (read_annotation(_annotation(image, label), LABELS) == truth).all()


def test_a_label_that_itk_wrote_as_nrrd_is_the_same(image, truth, tmp_path: Path) -> None:
    label = _write(tmp_path / "label.nii.gz", truth, AFFINE)
    sitk.WriteImage(sitk.ReadImage(str(label)), str(tmp_path / "label.nrrd"))
    assert (read_annotation(_annotation(image, tmp_path / "label.nrrd"), LABELS) == truth).all()


def test_values_are_told_by_the_names_that_the_viewer_gave(image, truth, tmp_path: Path) -> None:
    renumbered = np.array([0, 7, 3], np.uint8)[truth]
    label = _write(tmp_path / "label.nii.gz", renumbered, AFFINE)
    info = [{"name": "Posterior", "idx": 3}, {"name": "anterior", "idx": 7}]
    assert (read_annotation(_annotation(image, label, info), LABELS) == truth).all()


def test_names_of_other_bundles_may_be_listed_where_no_voxel_has_them(image, truth, tmp_path: Path) -> None:
    label = _write(tmp_path / "label.nii.gz", truth, AFFINE)
    info = [{"name": name, "idx": idx} for idx, name in enumerate(("anterior", "posterior", "nucleus", "vessel"), 1)]
    assert (read_annotation(_annotation(image, label, info), LABELS) == truth).all()
    empty = _write(tmp_path / "empty.nii.gz", truth * 0, AFFINE)
    assert not read_annotation(_annotation(image, empty, info[2:]), LABELS).any()


def test_a_segmentation_of_3d_slicer_brings_its_own_names(image, truth, tmp_path: Path) -> None:
    label = _write(tmp_path / "label.nii.gz", np.array([0, 7, 3], np.uint8)[truth], AFFINE)
    stored = sitk.ReadImage(str(label))
    for number, (name, value) in enumerate({"posterior": 3, "anterior": 7, "Segment_1": 8}.items()):
        stored.SetMetaData(f"Segment{number}_Name", name)
        stored.SetMetaData(f"Segment{number}_LabelValue", str(value))
    sitk.WriteImage(stored, str(tmp_path / "label.nrrd"))
    assert b"Segment1_LabelValue:=7" in (tmp_path / "label.nrrd").read_bytes()
    places = [{"name": "posterior", "idx": 1}, {"name": "anterior", "idx": 2}, {"name": "Segment_1", "idx": 3}]
    assert (read_annotation(_annotation(image, tmp_path / "label.nrrd", places), LABELS) == truth).all()


def test_values_without_names_are_the_bundles_own(image, truth, tmp_path: Path) -> None:
    label = _write(tmp_path / "label.nii.gz", truth, AFFINE)
    for info in ([], [{"name": "anterior"}]):
        assert (read_annotation(_annotation(image, label, info), LABELS) == truth).all()


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ([{"name": "tumor", "idx": 1}], r"unknown labels 'tumor' \(1\)"),
        ([{"name": "anterior", "idx": 1}, {"name": "tumor", "idx": 2}], r"unknown labels 'tumor' \(2\)"),
        ([{"name": "anterior", "idx": "x"}], "expected an integer"),
        ([{"name": "anterior", "idx": 1}], r"values \[2\]"),
    ],
)
def test_values_that_nothing_explains_are_refused(info, message, image, truth, tmp_path: Path) -> None:
    label = _write(tmp_path / "label.nii.gz", truth, AFFINE)
    with pytest.raises(CaseError, match=message):
        read_annotation(_annotation(image, label, info), LABELS)


def test_a_label_elsewhere_is_refused(image, truth, tmp_path: Path) -> None:
    moved = AFFINE.copy()
    moved[0, 3] += 5
    with pytest.raises(GeometryError, match="geometry mismatch"):
        read_annotation(_annotation(image, _write(tmp_path / "a.nii.gz", truth, moved)), LABELS)
    with pytest.raises(GeometryError, match="geometry mismatch"):
        read_annotation(_annotation(image, _write(tmp_path / "b.nii.gz", truth[:-1], AFFINE)), LABELS)


def test_a_picture_has_no_place_to_check(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 2, (5, 6)).astype(np.uint8)
    Image.fromarray(pixels * 200).save(tmp_path / "tile.png")
    Image.fromarray(pixels).save(tmp_path / "label.png")
    found = read_annotation(Annotation("tile", tmp_path / "tile.png", tmp_path / "label.png"), {"gland": 1})
    assert (found == pixels.T).all()


def test_the_mapping_is_none_where_the_viewer_said_nothing() -> None:
    assert label_mapping([], LABELS) is None
    assert label_mapping([{"name": "background", "idx": 4}], LABELS) == {4: 0}
    assert label_mapping([{"name": "tumor", "idx": 1}], LABELS) == {}


def test_saved_labels_become_a_data_set_that_names_nobody(image, truth, tmp_path: Path) -> None:
    label = _write(tmp_path / "labels" / "final.nii.gz", truth, AFFINE)
    annotations = [Annotation(f"MUELLER_{number}", image, label) for number in range(5)]
    wrong = Annotation("MUELLER_bad", image, label, [{"name": "tumor", "idx": 1}])
    folder = tmp_path / "set"
    found = collect([*annotations, wrong], LABELS, folder, val_split=0.4, pseudonym=lambda name: f"case-{name[-1]}")
    assert (len(found.train), len(found.val), list(found.left_out)) == (3, 2, ["case-d"])
    cases = {part: find_dataset(folder, part) for part in ("train", "val")}
    assert sorted(case["name"] for part in cases.values() for case in part) == [f"case-{n}.nii.gz" for n in range(5)]
    first = cases["train"][0]
    assert (np.asarray(nibabel.load(first["label"]).dataobj) == truth).all()
    assert "MUELLER" not in str(list(folder.rglob("*"))) + (folder / "split.json").read_text()
    again = collect(annotations, LABELS, tmp_path / "again", val_split=0.4, pseudonym=lambda name: f"case-{name[-1]}")
    assert json.loads((tmp_path / "again" / "split.json").read_text()) == {"train": again.train, "val": again.val}
    assert again.val == found.val


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_labels_are_an_error(count: int, image, truth, tmp_path: Path) -> None:
    label = _write(tmp_path / "label.nii.gz", truth, AFFINE)
    annotations = [Annotation("a", image, label)] * count
    with pytest.raises(RequestError, match=f"{count} saved label"):
        collect(annotations, LABELS, tmp_path / "set", pseudonym=str)


def test_a_case_that_was_trained_on_does_not_judge_while_there_are_others(image, truth, tmp_path: Path) -> None:
    label = _write(tmp_path / "label.nii.gz", truth, AFFINE)
    annotations = [Annotation(str(number), image, label) for number in range(5)]
    found = collect(annotations, LABELS, tmp_path / "a", val_split=0.4, pseudonym=str, trained_on={"0", "1", "3"})
    assert (found.val, found.train) == (["2", "4"], ["0", "1", "3"])
    found = collect(annotations, LABELS, tmp_path / "b", val_split=0.4, pseudonym=str, trained_on=set("01234"))
    assert (found.val, found.train) == (["0", "1"], ["2", "3", "4"])


@pytest.mark.parametrize("share", [0, 1, -0.2, "0.2", True])
def test_shares_that_leave_a_part_empty_are_refused(share: object, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="val_split"):
        collect([], LABELS, tmp_path, val_split=share, pseudonym=str)  # type: ignore[arg-type]


def test_dice_of_known_overlaps() -> None:
    truth = np.array([0, 1, 1, 0, 0, 0])
    predicted = np.array([0, 1, 0, 1, 1, 0])
    assert dice(truth, predicted, {"a": 1, "b": 2}) == {"a": 2 * 1 / 5, "b": None}
    assert dice(truth, truth, {"a": 1}) == {"a": 1.0}


@pytest.mark.parametrize(
    ("info", "values", "names"),
    [
        ([{"name": "posterior", "idx": 2}, {"name": "anterior", "idx": 1}], [1, 2], ["anterior", "posterior"]),
        ([{"name": "anterior", "id": 1}, {"name": "posterior", "id": 2}], [2], ["posterior"]),
        ([{"name": "anterior"}, {"name": "posterior"}], [2], ["posterior"]),
        ([{"name": "anterior", "idx": 1}], [1, 4], ["anterior", "label 4"]),
        ([], [3], ["label 3"]),
    ],
)
def test_segments_are_named_by_their_values_whatever_the_order(info, values, names) -> None:
    assert [entry["name"] for entry in segment_infos(info, values)] == names
