"""Repaired copies: what is repaired, proven by nibabel and SimpleITK, and that nothing else changes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medseg.diagnosis.doctor import examine
from medseg.diagnosis.repair import Change, repair, resample_nearest
from medseg.errors import RequestError
from medseg.io import Grid
from tests.diagnosis.conftest import AFFINE, SHAPE, ball, noise, write_nifti


def hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def repaired(root: Path) -> tuple[Path, list[Change]]:
    """Repair a set, after a check that only the files that changes name differ, and the original not at all."""
    out, before = root.parent / "out", hashes(root)
    changes = repair(examine(root), out)
    assert hashes(root) == before
    after = hashes(out)
    named = {change.file for change in changes}
    left_out = {change.file for change in changes if change.what == "skipped"}
    assert {file for file in after if after[file] != before[file]} == named - left_out
    assert not any(path.name.startswith(".partial") for path in out.rglob("*"))
    return out, changes


def image(root: Path, number: int = 0) -> Path:
    return root / "imagesTr" / f"case{number}.nii.gz"


def label(root: Path, number: int = 0) -> Path:
    return root / "labelsTr" / f"case{number}.nii.gz"


def by_itk(path: Path) -> tuple[Any, Any]:
    """Voxels and the world positions of three corners, as SimpleITK reads them."""
    read = sitk.ReadImage(str(path))
    far = [size - 1 for size in read.GetSize()]
    corners = [(0, 0, 0), (far[0], 0, 0), (0, far[1], far[2])]
    return sitk.GetArrayFromImage(read), np.array([read.TransformIndexToPhysicalPoint(corner) for corner in corners])


def itk_resampled(source: Path, onto: Path) -> Any:
    reference = sitk.ReadImage(str(onto))
    moved = sitk.Resample(sitk.ReadImage(str(source)), reference, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    return sitk.GetArrayFromImage(moved)


def test_a_faultless_set_is_copied_byte_by_byte(dataset: Path) -> None:
    out, changes = repaired(dataset)
    assert changes == []
    assert hashes(out) == hashes(dataset)
    assert image(out).stat().st_ino != image(dataset).stat().st_ino
    assert image(out).stat().st_nlink == 1


def test_a_rounded_header_becomes_that_of_the_image(dataset: Path) -> None:
    rounded = AFFINE.copy()
    rounded[0, 3] += 0.05
    write_nifti(label(dataset), ball(), rounded)
    out, changes = repaired(dataset)
    assert [change.what for change in changes] == ["given the image's geometry"]
    np.testing.assert_array_equal(nib.load(label(out)).affine, nib.load(image(out)).affine)
    np.testing.assert_array_equal(np.asarray(nib.load(label(out)).dataobj), ball())
    np.testing.assert_array_equal(by_itk(label(out))[1], by_itk(image(out))[1])
    assert examine(out).findings == ()


def test_a_label_in_another_order_of_axes_keeps_every_voxel(dataset: Path) -> None:
    turned = nib.Nifti1Image(ball(), AFFINE).as_reoriented(np.array([[1, -1], [0, 1], [2, 1]]))
    write_nifti(label(dataset), np.asarray(turned.dataobj), turned.affine)
    out, changes = repaired(dataset)
    assert [change.what for change in changes] == ["resampled to the image's grid"]
    np.testing.assert_array_equal(np.asarray(nib.load(label(out)).dataobj), ball())
    np.testing.assert_array_equal(nib.load(label(out)).affine, nib.load(image(out)).affine)
    assert examine(out).findings == ()


def test_a_label_on_a_finer_grid_is_resampled_as_by_itk(dataset: Path) -> None:
    fine = AFFINE @ np.diag([0.4, 0.6, 1, 1])
    fine[:3, 3] += [-0.31, 0.17, 0.2]
    write_nifti(label(dataset), ball((30, 23, 10)), fine)
    expected = itk_resampled(label(dataset), image(dataset))
    out, _ = repaired(dataset)
    voxels, corners = by_itk(label(out))
    np.testing.assert_array_equal(voxels, expected)
    np.testing.assert_array_equal(corners, by_itk(image(out))[1])


@pytest.mark.parametrize("seed", range(5))
def test_nearest_neighbors_are_those_of_itk_on_oblique_grids(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-0.4, 0.4)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    other = np.eye(4)
    other[:3, :3] = turn @ np.diag(rng.uniform(0.8, 3, 3))
    other[:3, 3] = AFFINE[:3, 3] + rng.uniform(-4, 4, 3)
    values = rng.integers(0, 5, (9, 8, 11)).astype(np.uint8)
    source = write_nifti(tmp_path / "label.nii.gz", values, other)
    onto = write_nifti(tmp_path / "image.nii.gz", noise(0))
    ours = resample_nearest(values, Grid(values.shape, other), Grid(SHAPE, AFFINE))
    np.testing.assert_array_equal(ours.T, itk_resampled(source, onto))


def test_a_label_that_would_lose_a_value_is_not_resampled(dataset: Path) -> None:
    values = np.zeros((60, 70, 50), np.uint8)
    values[20:40, 20:40, 20:40] = 1
    values[3, 3, 3] = 2
    write_nifti(label(dataset), values, AFFINE @ np.diag([0.2, 0.2, 0.2, 1]))
    out = dataset.parent / "out"
    changes = repair(examine(dataset), out)
    assert [change.what for change in changes] == ["not repaired"]
    assert "the label 2 would have no voxel" in changes[0].before
    assert label(out).read_bytes() == label(dataset).read_bytes()


@pytest.mark.parametrize("move", ["shift", "flip"])
def test_a_label_of_the_same_shape_elsewhere_is_not_guessed_at(dataset: Path, move: str) -> None:
    affine = AFFINE @ np.diag([-1, 1, 1, 1]) if move == "flip" else AFFINE.copy()
    affine[2, 3] += 6
    write_nifti(label(dataset), ball(), affine)
    out, changes = repaired(dataset)
    assert changes == []
    assert examine(out).errors == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_labels_become_whole_numbers_in_the_same_place(dataset: Path, dtype: type) -> None:
    write_nifti(label(dataset), ball().astype(dtype))
    out, changes = repaired(dataset)
    assert changes == [Change("labelsTr/case0.nii.gz", "converted to integers", np.dtype(dtype).name, "uint8")]
    loaded = nib.load(label(out))
    assert loaded.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(loaded.dataobj), ball())
    np.testing.assert_array_equal(loaded.affine, nib.load(label(dataset)).affine)


def test_values_that_are_no_numbers_become_the_lowest(dataset: Path) -> None:
    array = noise(0).astype(np.float32)
    array[1, 2, 3], array[4, 5, 6], array[7, 7, 7] = np.nan, np.inf, -np.inf
    write_nifti(image(dataset), array)
    out, changes = repaired(dataset)
    lowest = noise(0).min()
    assert changes == [
        Change(
            "imagesTr/case0.nii.gz",
            "non-finite values replaced",
            "3 of 1,680",
            f"{lowest}, the lowest finite value",
        )
    ]
    expected = np.where(np.isfinite(array), array, lowest)
    np.testing.assert_array_equal(np.asarray(nib.load(image(out)).dataobj), expected)
    np.testing.assert_array_equal(nib.load(image(out)).affine, nib.load(image(dataset)).affine)
    assert examine(out).findings == ()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_sform_becomes_the_qform_and_the_voxels_stay(tmp_path: Path, zipped: bool, order: str) -> None:
    root = tmp_path / "in"
    root.mkdir()
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.int16)
    made = nib.Nifti1Image(noise(0), None, header)
    made.set_sform(AFFINE, code=2)
    made.set_qform(np.diag([1.5, 1.5, 3, 1]), code=1)
    made.header["descrip"] = b"kept"
    made.header.set_slope_inter(2, 5)
    path = root / f"a.nii{'.gz' if zipped else ''}"
    nib.save(made, path)
    out, changes = repaired(root)
    assert [change.what for change in changes] == ["sform copied to qform"]
    loaded, source = nib.load(out / path.name), nib.load(path)
    np.testing.assert_allclose(loaded.get_qform(), loaded.get_sform(), atol=1e-4)
    np.testing.assert_array_equal(loaded.get_sform(), source.get_sform())
    np.testing.assert_array_equal(loaded.get_fdata(), source.get_fdata())
    assert bytes(loaded.header["descrip"].item()) == b"kept"
    assert loaded.header.endianness == order
    np.testing.assert_allclose(by_itk(out / path.name)[1][0], (-AFFINE[0, 3], -AFFINE[1, 3], AFFINE[2, 3]), atol=1e-4)
    assert examine(out).findings == ()


def test_the_voxel_size_of_the_sform_becomes_the_pixdim(dataset: Path) -> None:
    loaded = nib.load(image(dataset))
    loaded.header["pixdim"][1:4] = 1
    nib.save(nib.Nifti1Image(np.asarray(loaded.dataobj), None, loaded.header), image(dataset))
    out, changes = repaired(dataset)
    assert changes == [
        Change("imagesTr/case0.nii.gz", "voxel size of the sform copied to pixdim", "1 x 1 x 1", "1.5 x 1.5 x 3")
    ]
    np.testing.assert_allclose(sitk.ReadImage(str(image(out))).GetSpacing(), (1.5, 1.5, 3), atol=1e-5)
    np.testing.assert_allclose(by_itk(image(out))[1], by_itk(label(out))[1], atol=1e-4)


def test_axes_of_length_one_are_taken_off(dataset: Path) -> None:
    write_nifti(image(dataset), noise(0)[..., None])
    write_nifti(label(dataset), ball().astype(np.float32)[..., None, None])
    out, changes = repaired(dataset)
    assert sorted(change.what for change in changes) == [
        "converted to integers",
        "singleton dimensions removed",
        "singleton dimensions removed",
    ]
    assert nib.load(image(out)).shape == nib.load(label(out)).shape == SHAPE
    np.testing.assert_array_equal(np.asarray(nib.load(image(out)).dataobj), noise(0))
    np.testing.assert_array_equal(np.asarray(nib.load(label(out)).dataobj), ball())
    assert examine(out).findings == ()


def test_of_copies_across_the_split_the_training_case_goes(dataset: Path) -> None:
    shutil.copy(image(dataset, 0), image(dataset, 3))
    shutil.copy(label(dataset, 0), label(dataset, 3))
    out, changes = repaired(dataset)
    assert [(change.file, change.what) for change in changes] == [
        ("imagesTr/case0.nii.gz", "skipped"),
        ("dataset.json", "cases removed"),
    ]
    assert (changes[1].before, changes[1].after) == ("3 training, 1 validation", "2 training, 1 validation")
    assert not image(out, 0).exists()
    content = json.loads((out / "dataset.json").read_text())
    assert content["numTraining"] == 2
    report = examine(out)
    assert [(case.name, case.part) for case in report.cases][-1] == ("case3", "val")
    assert report.findings == ()


def test_copies_are_taken_out_of_a_split_file(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number, stem in enumerate("abc"):
        write_nifti(root / "images" / f"{stem}.nii.gz", noise(number % 2))
        write_nifti(root / "labels" / f"{stem}.nii.gz", ball(center=0.4 + 0.1 * (number % 2)))
    (root / "split.json").write_text(json.dumps({"train": ["a", "b"], "val": ["c"]}))
    out, _ = repaired(root)
    assert json.loads((out / "split.json").read_text()) == {"train": ["b"], "val": ["c"]}
    assert examine(out).errors == 0


def test_copies_with_other_labels_stay(dataset: Path) -> None:
    shutil.copy(image(dataset, 0), image(dataset, 1))
    _, changes = repaired(dataset)
    assert changes == []


def test_a_file_that_is_listed_twice_stays(dataset: Path) -> None:
    content = json.loads((dataset / "dataset.json").read_text())
    content["validation"].append(content["training"][0])
    (dataset / "dataset.json").write_text(json.dumps(content))
    out, changes = repaired(dataset)
    assert changes == []
    assert examine(out).errors == 2


def test_what_cannot_be_read_is_copied_as_it_is(dataset: Path) -> None:
    image(dataset).write_bytes(image(dataset).read_bytes()[:700])
    label(dataset, 1).write_bytes(b"nothing")
    _, changes = repaired(dataset)
    assert changes == []


def test_series_archives_and_headers_with_data_beside_them_are_copied(
    dicom: Callable[..., Path], tmp_path: Path
) -> None:
    root = tmp_path / "in"
    dicom(root / "ct", noise(0))
    sitk.WriteImage(sitk.GetImageFromArray(noise(1)), str(root / "a.mhd"))
    sitk.WriteImage(sitk.GetImageFromArray(noise(2)), str(root / "b.nhdr"))
    out, changes = repaired(root)
    assert changes == []
    assert hashes(out) == hashes(root)


@pytest.mark.parametrize("name", ["./b.raw", "below/b.raw", "below/../b.raw"])
def test_voxels_that_a_header_names_come_along(tmp_path: Path, name: str) -> None:
    root = tmp_path / "in"
    (root / "below").mkdir(parents=True)
    for number, (file, field) in enumerate((("b.nhdr", "data file: "), ("c.mhd", "ElementDataFile = "))):
        sitk.WriteImage(sitk.GetImageFromArray(noise(number)), str(root / file))
        text, voxels = (root / file).read_text(), next(root.glob(f"{file[0]}.*raw*"))
        there = name.replace("b.", f"{file[0]}.")
        (root / file).write_text(text.replace(f"{field}{voxels.name}", f"{field}{there}"))
        voxels.rename(root / there)
    out, changes = repaired(root)
    assert changes == []
    assert hashes(out) == hashes(root)
    assert [case.image is not None for case in examine(out).cases] == [True, True]


def test_headers_that_name_each_other_end(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_nifti(root / "a.nii.gz", noise(0))
    (root / "b.nhdr").write_text("NRRD0004\ndata file: c.mhd\n\n")
    (root / "c.mhd").write_text("NDims = 3\nElementDataFile = b.nhdr\n")
    out, changes = repaired(root)
    assert changes == []
    assert hashes(out) == hashes(root)


def test_what_is_no_file_any_more_is_left_out_and_the_rest_copied(dataset: Path) -> None:
    image(dataset).unlink()
    os.mkfifo(image(dataset))
    label(dataset, 1).unlink()
    os.mkfifo(label(dataset, 1))
    out = dataset.parent / "out"
    changes = repair(examine(dataset), out)
    assert [(change.file, change.what) for change in changes] == [
        ("imagesTr/case0.nii.gz", "not copied"),
        ("labelsTr/case1.nii.gz", "not copied"),
    ]
    assert len(hashes(out)) == len(hashes(dataset)) == 7


def test_a_broken_link_does_not_stop_the_repair(tmp_path: Path) -> None:
    write_nifti(tmp_path / "in" / "b.nii.gz", noise(0))
    (tmp_path / "in" / "a.nii.gz").symlink_to("nowhere")
    changes = repair(examine(tmp_path / "in"), tmp_path / "out")
    assert [(change.file, change.what) for change in changes] == [("a.nii.gz", "not copied")]
    assert list(hashes(tmp_path / "out")) == ["b.nii.gz"]


def test_copies_are_taken_out_of_every_fold_of_nnunet(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number, stem in enumerate("abc"):
        write_nifti(root / "images" / f"{stem}.nii.gz", noise(number % 2))
        write_nifti(root / "labels" / f"{stem}.nii.gz", ball(center=0.4 + 0.1 * (number % 2)))
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c", "a"], "val": ["b"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    out, _ = repaired(root)
    assert json.loads((out / "splits_final.json").read_text()) == [
        {"train": ["b"], "val": ["c"]},
        {"train": ["c"], "val": ["b"]},
    ]
    assert examine(out).errors == 0


def test_a_header_is_repaired_without_unpacking_the_file_into_memory(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "in" / "a.nii.gz", noise(0)[..., None])
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content + bytes(200 << 20), 1))
    found = examine(path.parent)
    tracemalloc.start()
    try:
        changes = repair(found, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [change.what for change in changes] == ["singleton dimensions removed"]
    assert peak < 50 << 20
    assert nib.load(tmp_path / "out" / "a.nii.gz").shape == SHAPE


def test_values_beyond_what_images_are_read_as_are_replaced_too(tmp_path: Path) -> None:
    values = noise(0).astype(np.float64)
    values[1, 2, 3], values[4, 5, 6] = 1e300, np.nan
    write_nifti(tmp_path / "in" / "a.nii.gz", values)
    out, changes = repaired(tmp_path / "in")
    assert [(change.what, change.before) for change in changes] == [
        ("non-finite values replaced", f"2 of {values.size:,}")
    ]
    assert examine(out).errors == 0


def test_a_packed_file_of_a_plain_name_does_not_stop_the_repair(tmp_path: Path) -> None:
    values = noise(0).astype(np.float32)
    values[1, 2, 3] = np.nan
    path = write_nifti(tmp_path / "in" / "a.nii", values)
    path.write_bytes(gzip.compress(path.read_bytes()))
    _, changes = repaired(path.parent)
    assert changes == []


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_place_that_holds_something_is_refused(dataset: Path, tmp_path: Path, taken: str) -> None:
    out = tmp_path / "out"
    if taken == "file":
        out.write_text("x")
    else:
        out.mkdir()
        (out / "kept.txt").write_text("x")
    with pytest.raises(RequestError, match="exists and is not empty"):
        repair(examine(dataset), out)
    assert len(list(tmp_path.glob("out/*"))) == (taken == "folder")
