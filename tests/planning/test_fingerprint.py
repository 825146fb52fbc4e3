"""What is seen of a data set, against what was written into it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg.errors import RequestError
from medseg.io import find_dataset
from medseg.planning.case_stats import Fingerprint
from medseg.planning.fingerprint import dataset_key, take_fingerprint

DATA = Path(__file__).parents[3] / "shared" / "data"


def test_volumes_are_described_in_the_axes_of_the_model(volumes: Any, save_volume: Any) -> None:
    root = volumes()
    affine = np.array([[0, 0, -2.0, 10], [-1.0, 0, 0, 5], [0, 3.0, 0, 7], [0, 0, 0, 1]])
    for number in range(4):
        for folder, high in (("imagesTr", 300), ("labelsTr", 2)):
            array = np.random.default_rng(number).integers(0, high, (20, 30, 10)).astype(np.int16)
            save_volume(root / folder / f"case_{number}.nii.gz", array, affine=affine)
    found = take_fingerprint(root)
    assert found.cases[0].orientation == "PSL"
    assert found.median_shape() == (10, 20, 30)
    assert found.median_spacing == (2.0, 1.0, 3.0)
    reoriented = nibabel.as_closest_canonical(nibabel.load(root / "imagesTr" / "case_0.nii.gz"))
    assert reoriented.shape == found.cases[0].shape
    assert reoriented.header.get_zooms() == pytest.approx(found.cases[0].spacing)


def test_numbers_equal_those_of_numpy(volumes: Any) -> None:
    root = volumes(classes=2)
    found = take_fingerprint(root)
    inside, label_voxels = [], {1: 0, 2: 0}
    for number in range(3):
        image = np.asarray(nibabel.load(root / "imagesTr" / f"case_{number}.nii.gz").dataobj)
        label = np.asarray(nibabel.load(root / "labelsTr" / f"case_{number}.nii.gz").dataobj)
        inside.append(image[label > 0])
        for value in label_voxels:
            label_voxels[value] += int((label == value).sum())
    values = np.concatenate(inside).astype(float)
    (intensity,) = found.intensities
    assert intensity.samples == len(values)
    assert intensity.mean == pytest.approx(values.mean(), abs=1e-4)
    assert intensity.std == pytest.approx(values.std(), abs=1e-4)
    assert (intensity.low, intensity.high) == pytest.approx(np.percentile(values, (0.5, 99.5)), abs=1e-4)
    assert {value: sum(case.values[value] for case in found.cases) for value in label_voxels} == label_voxels


def test_pieces_of_a_label_are_counted_and_measured(volumes: Any, save_volume: Any) -> None:
    root = volumes(classes=1)
    label = np.zeros((34, 50, 36), np.uint8)
    label[2:4, 2:4, 2:4] = 1
    label[10:14, 10:14, 10:14] = 1
    label[20, 20, 20] = 2
    save_volume(root / "labelsTr" / "case_0.nii.gz", label)
    case = take_fingerprint(root).cases[0]
    assert case.objects == 3
    assert case.single == 1
    assert case.object_sizes[1] == 8
    assert case.values == {0: label.size - 73, 1: 72, 2: 1}


def test_the_cases_for_validation_are_not_opened(volumes: Any) -> None:
    root = volumes()
    (root / "imagesTr" / "case_3.nii.gz").write_bytes(b"not an image")
    (root / "labelsTr" / "case_3.nii.gz").write_bytes(b"nor a label")
    found = take_fingerprint(root)
    assert [case.name for case in found.cases] == ["case_0.nii.gz", "case_1.nii.gz", "case_2.nii.gz"]
    assert found.validation_cases == 1


def test_it_survives_json_and_is_taken_from_there_while_files_stay(volumes: Any, save_volume: Any) -> None:
    root = volumes()
    found = take_fingerprint(root)
    again = Fingerprint.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    seen: list[str] = []
    assert take_fingerprint(root, known=again, report=lambda done, total, note: seen.append(note)) is again
    assert not seen
    array = np.zeros((34, 50, 36), np.uint8)
    array[:3] = 1
    save_volume(root / "labelsTr" / "case_0.nii.gz", array)
    assert take_fingerprint(root, known=again) != again


def test_another_version_of_the_record_is_left_aside(volumes: Any) -> None:
    content = take_fingerprint(volumes()).to_json()
    assert Fingerprint.from_json({**content, "version": 0}) is None
    assert Fingerprint.from_json({"version": 1, "cases": 3}) is None


def test_the_same_data_give_the_same_fingerprint(volumes: Any) -> None:
    root = volumes()
    assert take_fingerprint(root) == take_fingerprint(root)


def test_grey_and_color_pictures_together_are_read_as_color(pictures: Any) -> None:
    found = take_fingerprint(pictures(colored=(True, False)))
    assert found.channels == 3
    assert len(found.intensities) == 3
    assert [case.color for case in found.cases] == [True, False, True, False, True]


def test_progress_is_told(pictures: Any) -> None:
    seen: list[tuple[float, int, str]] = []
    take_fingerprint(pictures(), report=lambda *state: seen.append(state))
    assert seen[0] == (0, 5, "p0.png")
    assert seen[-1][:2] == (5, 5)


def test_a_label_on_another_grid_is_refused_by_name(volumes: Any, save_volume: Any) -> None:
    root = volumes()
    save_volume(root / "labelsTr" / "case_1.nii.gz", np.ones((5, 5, 5), np.uint8))
    with pytest.raises(RequestError, match=r"1 of 3 training cases are unfit for training.*Geometry mismatch.*case_1"):
        take_fingerprint(root)


def test_a_damaged_image_is_refused_by_name(volumes: Any) -> None:
    root = volumes()
    (root / "imagesTr" / "case_0.nii.gz").write_bytes(b"\x1f\x8b nothing")
    with pytest.raises(RequestError, match="case_0"):
        take_fingerprint(root)


def test_a_missing_label_is_refused_by_name(pictures: Any) -> None:
    root = pictures()
    (root / "labels" / "p1.png").unlink()
    with pytest.raises(RequestError, match="p1"):
        take_fingerprint(root)


def test_labels_that_mark_nothing_are_refused(volumes: Any, save_volume: Any) -> None:
    root = volumes(classes=1)
    for number in range(3):
        shape = nibabel.load(root / "imagesTr" / f"case_{number}.nii.gz").shape
        save_volume(root / "labelsTr" / f"case_{number}.nii.gz", np.zeros(shape, np.uint8))
    with pytest.raises(RequestError, match="nothing to learn"):
        take_fingerprint(root)


def test_slices_of_volumes_are_not_planned(volumes: Any) -> None:
    with pytest.raises(RequestError, match="does not train 2D models on slices"):
        take_fingerprint(volumes(), spatial_dims=2)


def test_pictures_are_no_volumes(pictures: Any) -> None:
    with pytest.raises(RequestError, match="--dims 3"):
        take_fingerprint(pictures(), spatial_dims=3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_refused_with_the_number_of_its_voxels(
    value: float, volumes: Any, save_volume: Any
) -> None:
    root = volumes(dtype=np.float32)
    array = np.ones((36, 48, 35), np.float32)
    array[3, 4, 5:7] = value
    save_volume(root / "imagesTr" / "case_1.nii.gz", array)
    with pytest.raises(RequestError, match="case_1") as error:
        take_fingerprint(root)
    assert " 2 " in str(error.value)
    assert "case_0" not in str(error.value)


def test_the_first_three_faults_are_told_and_the_others_counted(volumes: Any) -> None:
    root = volumes(shapes=((12, 12, 12),) * 7)
    for number in range(5):
        (root / "imagesTr" / f"case_{number}.nii.gz").write_bytes(b"nothing")
    with pytest.raises(RequestError, match="5 of 6") as error:
        take_fingerprint(root)
    text = str(error.value)
    assert [f"case_{number}" in text for number in range(6)] == [True] * 3 + [False] * 3
    assert "2 more" in text


def test_volumes_and_images_together_are_refused_by_name(volumes: Any, pictures: Any) -> None:
    root = volumes(shapes=((12, 12, 12),) * 3)
    other = pictures()
    listing = json.loads((root / "dataset.json").read_text())
    pair = {"image": "imagesTr/p0.png", "label": "labelsTr/p0.png"}
    for theirs, ours in (("images/p0.png", pair["image"]), ("labels/p0.png", pair["label"])):
        (other / theirs).rename(root / ours)
    (root / "dataset.json").write_text(json.dumps({**listing, "training": [*listing["training"], pair]}))
    with pytest.raises(RequestError, match="p0") as error:
        take_fingerprint(root)
    assert "case_0" in str(error.value)


def test_volumes_of_unlike_channels_are_refused_by_name(volumes: Any, save_volume: Any) -> None:
    root = volumes(shapes=((12, 12, 12),) * 3)
    save_volume(root / "imagesTr" / "case_1.nii.gz", np.ones((12, 12, 12, 2), np.int16))
    with pytest.raises(RequestError, match="case_1") as error:
        take_fingerprint(root)
    assert "case_0" in str(error.value)
    assert "2" in str(error.value).partition("case_1")[2]


@pytest.mark.parametrize(
    ("dpi", "microns"),
    [(25_400.0, 1.0), (101_600.0, 0.25), (2_540.0, 10.0), (72.0, 0.0), (1e6, 0.0), (None, 0.0)],
)
def test_a_resolution_counts_if_a_microscope_has_it(dpi: float | None, microns: float, pictures: Any) -> None:
    root = pictures()
    file = root / "images" / "p0.png"
    with Image.open(file) as opened:
        opened.load()
        opened.save(file, **({} if dpi is None else {"dpi": (dpi, dpi)}))
    found = take_fingerprint(root)
    assert found.cases[0].microns == pytest.approx(microns, rel=1e-3)
    assert {case.microns for case in found.cases[1:]} == {0.0}


def test_pieces_of_a_huge_label_are_counted_on_every_second_voxel(volumes: Any, monkeypatch: Any) -> None:
    from medseg.planning import fingerprint

    label = np.zeros((40, 40, 40), np.uint8)
    label[2:12, 2:12, 2:12] = 1
    label[20:36, 20:36, 20:36] = 2
    exact = fingerprint._components(label)
    monkeypatch.setattr(fingerprint, "_COMPONENTS_LIMIT", 20_000)
    thinned = fingerprint._components(label)
    assert exact[:2] == thinned[:2] == (2, 2)
    assert thinned[2] == pytest.approx(exact[2], rel=0.01)


@pytest.mark.parametrize("count", [0, 1, 100, 10_000])
def test_drawn_values_are_foreground_without_repeats_and_alike_however_they_are_cut(
    count: int, monkeypatch: Any
) -> None:
    from medseg.planning import fingerprint

    label = np.random.default_rng(0).integers(0, 2, (11, 13, 17))
    image = np.stack([np.arange(label.size).reshape(label.shape), np.full(label.shape, 7)])
    whole = fingerprint._draw(image, label, count, np.random.default_rng(3))
    assert whole.shape == (2, min(count, int(label.sum())))
    values = whole[0].astype(int)
    assert (label.flat[values] == 1).all()
    assert len(set(values)) == len(values)
    monkeypatch.setattr(fingerprint, "_SLAB", 300)
    parts = fingerprint._draw(image, label, count, np.random.default_rng(3))
    assert parts.shape == whole.shape
    assert (label.flat[parts[0].astype(int)] == 1).all()
    if count >= label.sum():
        assert set(parts[0]) == set(whole[0])


def test_the_key_changes_with_files_and_names_of_labels_and_with_nothing_else(volumes: Any) -> None:
    root = volumes(shapes=((12, 12, 12),) * 3)
    cases = find_dataset(root, "train")
    listing = json.loads((root / "dataset.json").read_text())
    key = dataset_key(cases, listing)
    assert dataset_key(cases, {**listing, "description": "other"}) == key
    assert dataset_key(cases, {**listing, "labels": {"1": "liver"}}) != key
    assert dataset_key(cases, {**listing, "modality": {"0": "CT"}}) != key
    assert dataset_key(cases[:1], listing) != key
    assert dataset_key([{**cases[0], "name": "other"}, *cases[1:]], listing) != key
    file = Path(cases[0]["label"])
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))
    assert dataset_key(cases, listing) != key
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert dataset_key(cases, listing) == key


def test_a_listing_may_be_given_in_place_of_its_folder(volumes: Any) -> None:
    root = volumes(shapes=((12, 12, 12),) * 3, name="livers")
    assert take_fingerprint(root / "dataset.json") == take_fingerprint(root)
    assert take_fingerprint(root).dataset == "livers"


@pytest.mark.parametrize(
    ("listing", "names"),
    [
        ({"modality": {"0": "T1"}}, ("T1",)),
        ({"channel_names": {"0": "FLAIR"}, "modality": {"0": "T1"}}, ("FLAIR",)),
        ({"modality": "MRI"}, ("MRI",)),
        ({}, ()),
    ],
)
def test_channel_names_of_both_kinds_of_listing_are_read(
    listing: dict[str, Any], names: tuple[str, ...], volumes: Any
) -> None:
    assert take_fingerprint(volumes(shapes=((12, 12, 12),) * 3, listing=listing)).channel_names == names


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "cases", "shape", "kind"),
    [
        ("ct_sarcoma_sts", 7, (180, 170, 60), "classes"),
        ("isbi2012_em", 16, (512, 512), "two values"),
        ("glas", 61, (387, 261), "objects"),
        ("monuseg", 24, (512, 512), "two values"),
    ],
)
def test_real_data_sets_are_seen_as_what_they_are(name: str, cases: int, shape: tuple[int, ...], kind: str) -> None:
    from medseg.planning.labels import classes_of

    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here")
    found = take_fingerprint(DATA / name)
    assert len(found.cases) == cases
    assert found.median_shape() == pytest.approx(shape, rel=0.15)
    assert classes_of(found).kind == kind
