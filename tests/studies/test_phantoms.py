"""The made-up CT volumes: reproducible, anatomically ordered, with awkward geometry and exact truth."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.errors import OutputError, RequestError
from medseg.studies.phantoms import LABELS, make_phantom, write_phantoms

SMALL = {"shape": (40, 40, 32), "spacing": (3.0, 3.0, 5.0)}
CASES = range(6)


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(case, seed=7) for case in CASES]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), cases=3, validation=1, unseen=2, seed=3, **SMALL)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_writes_the_same_bytes(dataset, tmp_path):
    write_phantoms(tmp_path, cases=3, validation=1, unseen=2, seed=3, **SMALL)
    assert digests(tmp_path) == digests(dataset.parent)
    assert len(digests(tmp_path)) == 2 * 5 + 1


def test_another_seed_writes_other_volumes(dataset, tmp_path):
    write_phantoms(tmp_path, cases=3, validation=1, unseen=2, seed=4, **SMALL)
    ours, theirs = digests(tmp_path), digests(dataset.parent)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours)


def test_a_case_does_not_depend_on_how_many_others_are_written(dataset, tmp_path):
    write_phantoms(tmp_path, cases=1, validation=0, unseen=0, seed=3, **SMALL)
    for name, digest in digests(tmp_path).items():
        if name != "dataset.json":
            assert digests(dataset.parent)[name] == digest


def test_cases_differ_in_size_and_content(phantoms):
    assert len({p.image.shape for p in phantoms}) > 1
    assert len({p.image.tobytes() for p in phantoms}) == len(phantoms)
    assert all(abs(n - m) <= 3 for p in phantoms for n, m in zip(p.image.shape, (96, 96, 64), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_every_label_is_present_and_nothing_else(phantoms, case):
    assert set(np.unique(phantoms[case].label)) == set(LABELS)
    assert phantoms[case].label.dtype == np.uint8
    assert phantoms[case].image.dtype == np.int16


@pytest.mark.parametrize("case", CASES)
def test_attenuation_looks_like_ct(phantoms, case):
    image, label = phantoms[case].image, phantoms[case].label
    mean = {name: image[label == value].mean() for value, name in LABELS.items()}
    assert -830 < mean["lung"] < -720
    assert 50 < mean["liver"] < 70
    assert -250 < mean["nodule"] < 60  # partial volume with the lung around it
    assert np.median(image[0]) == pytest.approx(-1000, abs=10)  # air beside the body
    assert np.percentile(image, 99.8) > 400  # bone
    assert 17 < image[2:-2, :3].std() < 23  # noise in air


@pytest.mark.parametrize("case", CASES)
def test_liver_is_barely_brighter_than_the_soft_tissue_around_it(phantoms, case):
    image, label = phantoms[case].image, phantoms[case].label
    soft = image[(label == 0) & (image > 0) & (image < 90)]
    contrast = np.median(image[label == 2]) - np.median(soft)
    assert 5 < contrast < 30  # about one standard deviation of the noise


@pytest.mark.parametrize("case", CASES)
def test_organs_lie_where_they_belong_in_the_world(phantoms, case):
    label, affine = phantoms[case].label, phantoms[case].affine
    center = {
        name: nib.affines.apply_affine(affine, np.argwhere(label == value).mean(axis=0))
        for value, name in LABELS.items()
    }
    assert center["liver"][0] > center["lung"][0] + 10  # RAS: the liver is on the right
    assert center["liver"][2] < center["lung"][2] - 30  # and below the lungs


@pytest.mark.parametrize("case", CASES)
def test_nodules_lie_in_the_lungs(phantoms, case):
    label = phantoms[case].label
    nodule = label == 3
    grown = nodule.copy()
    for axis in range(3):
        grown |= np.roll(nodule, 1, axis) | np.roll(nodule, -1, axis)
    shell = label[grown & ~nodule]
    assert (shell == 1).mean() > 0.4
    assert (shell == 2).mean() < 0.1


@pytest.mark.parametrize("case", CASES)
def test_affine_is_oblique_and_spacing_anisotropic(phantoms, case):
    affine = phantoms[case].affine
    spacing = nib.affines.voxel_sizes(affine)
    assert spacing[2] > 1.4 * max(spacing[:2])
    assert np.all(np.abs(spacing - (1.5, 1.5, 3.0)) <= 0.1 * np.array((1.5, 1.5, 3.0)) + 0.006)
    off_axis = np.rad2deg(nib.affines.obliquity(affine))
    assert off_axis.max() > 2
    assert off_axis.max() < 12
    np.testing.assert_array_equal(affine, affine.astype(np.float32))


def test_some_cases_are_mirrored_and_some_are_not():
    signs = {np.sign(np.linalg.det(make_phantom(case, **SMALL).affine[:3, :3])) for case in range(8)}
    assert signs == {-1, 1}


def test_files_hold_truth_and_image_on_one_grid_with_sform_equal_to_qform(dataset):
    for image_path in sorted(dataset.parent.glob("images*/*.nii.gz")):
        image = nib.load(image_path)
        label = nib.load(str(image_path).replace("images", "labels"))
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(image.affine, label.affine)
        assert image.header["sform_code"] == image.header["qform_code"] == 1
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        assert image.header.get_xyzt_units()[0] == "mm"


def test_written_volume_is_the_phantom(dataset):
    phantom = make_phantom(3, seed=3, **SMALL)
    image = nib.load(dataset.parent / "imagesTs/phantom_003.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), phantom.image)
    np.testing.assert_array_equal(image.affine, phantom.affine)


@pytest.mark.parametrize(("key", "count"), [("training", 2), ("validation", 1), ("test", 2)])
def test_monai_reads_the_listing(dataset, key, count):
    from monai.data import load_decathlon_datalist

    entries = load_decathlon_datalist(str(dataset), is_segmentation=True, data_list_key=key)
    assert len(entries) == count
    for entry in entries:
        assert Path(entry["image"]).is_file()
        assert Path(entry["label"]).is_file()
        assert Path(entry["image"]).name == Path(entry["label"]).name


def test_listing_tells_labels_and_modality(dataset):
    listing = json.loads(dataset.read_text())
    assert listing["labels"] == {"0": "background", "1": "lung", "2": "liver", "3": "nodule"}
    assert listing["modality"] == {"0": "CT"}
    assert (listing["numTraining"], listing["numTest"]) == (2, 2)


@pytest.mark.parametrize("content", ['{"name": "Somebody\'s scans"}', "not json", "[]"])
def test_another_data_set_is_not_overwritten(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(OutputError, match=r"dataset\.json"):
        write_phantoms(tmp_path, cases=1, validation=0, unseen=0, **SMALL)
    assert (tmp_path / "dataset.json").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_nothing_half_written_is_left_behind(dataset):
    folders = {"imagesTr", "labelsTr", "imagesTs", "labelsTs"}
    assert {path.name for path in dataset.parent.iterdir()} == {*folders, "dataset.json"}
    assert all(path.name.startswith("phantom_") for path in dataset.parent.glob("*/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cases": 0}, "cases=0"),
        ({"cases": 2, "validation": 2}, "validation=2"),
        ({"unseen": -1}, "unseen=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"shape": (96, 96)}, "three sides"),
        ({"shape": (96, 96, 31)}, "at least 32"),
        ({"spacing": (1.0, 1.0, 0.0)}, "invalid spacing"),
        ({"spacing": (1.0, 1.0, float("nan"))}, "invalid spacing"),
    ],
)
def test_impossible_requests_say_what_is_wrong_and_write_nothing(tmp_path, arguments, message):
    with pytest.raises(RequestError, match=message):
        write_phantoms(tmp_path / "new", **arguments)
    assert not list(tmp_path.rglob("*.nii.gz"))
