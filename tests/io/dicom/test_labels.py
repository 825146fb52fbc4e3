"""DICOM SEG and RT-STRUCT as labels, laid on the image that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from medseg.errors import CaseError, GeometryError, RequestError
from medseg.io import load, load_label, read_grid, write_mask
from medseg.io.dicom.rtstruct import write_rtstruct
from medseg.io.dicom.seg import write_seg
from medseg.io.geometry import Grid
from tests.io.dicom.conftest import LABELS, random_mask, written_by_highdicom, written_by_pydicom

VALUES = {name: value for value, name in LABELS.items()}
WRITERS: dict[str, Callable[[Any, Path, NDArray[Any]], Path]] = {
    "our SEG": lambda source, path, mask: write_seg(mask, path, source.folder, labels=LABELS),
    "our RT-STRUCT": lambda source, path, mask: write_rtstruct(mask, path, source.folder, labels=LABELS),
    "SEG of highdicom": lambda source, path, mask: written_by_highdicom(
        source,
        path,
        np.stack([mask.transpose(2, 1, 0) == value for value in LABELS], axis=-1).astype(np.uint8),
        "BINARY",
        {number: name.upper() for number, name in enumerate(LABELS.values(), start=1)},
    ),
    "RT-STRUCT of pydicom": lambda source, path, mask: written_by_pydicom(source, path, mask, LABELS),
}


@pytest.fixture
def source(write_series: Callable[..., Any], tmp_path: Path) -> Any:
    return write_series(tmp_path / "ct", shape=(9, 8, 5))


@pytest.fixture
def seg(source: Any, tmp_path: Path) -> Path:
    return write_seg(random_mask(source.values.shape), tmp_path / "seg.dcm", source.folder, labels=LABELS)


@pytest.fixture
def structures(source: Any, tmp_path: Path) -> Path:
    return write_rtstruct(random_mask(source.values.shape), tmp_path / "rs.dcm", source.folder, labels=LABELS)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("where", ["a.dcm", "no_suffix", "folder/1-1.dcm"])
def test_any_writers_object_lies_on_the_voxels_of_its_image(
    source: Any, tmp_path: Path, writer: str, where: str
) -> None:
    mask = random_mask(source.values.shape)
    path = WRITERS[writer](source, tmp_path / "labels" / where, mask)
    label = load_label(path.parent if "/" in where else path, like=source.folder, names=VALUES)
    assert label.dtype == torch.int32
    assert np.array_equal(label[0].numpy(), mask)
    assert torch.equal(label.affine, load(source.folder).affine)
    assert label.meta["filename_or_obj"] == str(path)


def test_segments_are_named_in_any_case_by_number_or_by_one_of_several_names(source: Any, seg: Path) -> None:
    mask = random_mask(source.values.shape)
    found = load_label(seg, like=source.folder, names={"Liver ": 1, "2": 5, "Leber": 1, "hepar": 1})
    assert np.array_equal(found[0].numpy(), (mask == 2) + 5 * (mask == 4))
    by_number = load_label(seg, like=source.folder)
    assert np.array_equal(by_number[0].numpy(), (mask == 2) + 2 * (mask == 4) + 3 * (mask == 7))


def test_a_name_counts_before_a_number(source: Any, tmp_path: Path) -> None:
    mask = random_mask(source.values.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels={2: "3", 4: "b", 7: "c"})
    found = load_label(path, like=source.folder, names={"3": 1})
    assert np.array_equal(found[0].numpy(), mask == 2)


@pytest.mark.parametrize("name", ["seg.dcm", "rs.dcm"])
def test_missing_names_are_refused_with_those_found_unless_they_are_optional(
    source: Any, seg: Path, structures: Path, name: str
) -> None:
    path = seg.with_name(name)
    names = {"liver": 1, "spleen": 2}
    with pytest.raises(CaseError, match=r"has no \w+ 'spleen': it has \d 'liver', \d 'kidney_left', \d 'something"):
        load_label(path, like=source.folder, names=names)
    found = load_label(path, like=source.folder, names=names, optional=["spleen"])
    assert np.array_equal(found[0].numpy(), random_mask(source.values.shape) == 2)
    with pytest.raises(CaseError, match=r"no label values are given .* 'liver'.* in dataset\.json"):
        load_label(path, like=source.folder, names={})


def test_overlapping_segments_are_refused_unless_a_rule_is_given(source: Any, tmp_path: Path) -> None:
    pixels = np.zeros((5, 8, 9, 2), np.uint8)
    pixels[2:4, 1:3, 1:3, 0] = pixels[3:5, 2:4, 1:3, 1] = 1
    path = written_by_highdicom(source, tmp_path / "seg.dcm", pixels, "BINARY", {1: "organ", 2: "tumor"})
    with pytest.raises(CaseError, match="'organ' and 'tumor' in 2 voxels"):
        load_label(path, like=source.folder, names={"organ": 1, "tumor": 2})
    for names, counts in (({"organ": 1, "tumor": 2}, [6, 8]), ({"tumor": 2, "organ": 1}, [8, 6])):
        found = load_label(path, like=source.folder, names=names, on_overlap="later")
        assert found.flatten().bincount()[1:].tolist() == counts


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPR", "AIL"])
def test_a_seg_lies_on_the_conversion_of_its_series_to_nifti_whatever_its_axes(
    source: Any, seg: Path, tmp_path: Path, axes: str
) -> None:
    grid, mask = read_grid(source.folder), random_mask(source.values.shape)
    turn = ornt_transform(io_orientation(grid.affine), axcodes2ornt(axes))
    image = nib.Nifti1Image(np.stack([source.values, mask], axis=-1).astype(np.int16), grid.affine).as_reoriented(turn)
    values = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(values[..., 0], image.affine), tmp_path / "a.nii.gz")
    label = load_label(seg, like=tmp_path / "a.nii.gz", names=VALUES)
    assert np.array_equal(label[0].numpy(), values[..., 1])
    assert torch.equal(label.affine, load(tmp_path / "a.nii.gz").affine)


def test_a_seg_of_another_grid_or_frame_of_reference_is_refused(
    write_series: Callable[..., Any], source: Any, seg: Path, structures: Path, tmp_path: Path
) -> None:
    def edit(ds: Any, _: int) -> None:
        ds.FrameOfReferenceUID = "1.2.3.99"

    other = write_series(tmp_path / "other", shape=source.values.shape, edit=edit)
    for path in (seg, structures):
        with pytest.raises(GeometryError, match=r"1\.2\.3\.99"):
            load_label(path, like=other.folder, names=VALUES)
    halved = write_series(tmp_path / "halved", shape=(18, 16, 5), spacing=(0.35, 0.45, 2.5))
    with pytest.raises(GeometryError, match="another spacing"):
        load_label(seg, like=halved.folder, names=VALUES)
    moved = read_grid(source.folder).affine.copy()
    moved[:3, 3] += 0.5 * moved[:3, 0]
    with pytest.raises(GeometryError, match="off the grid"):
        load_label(seg, like=Grid(source.values.shape, moved), names=VALUES)


def test_an_rtstruct_needs_the_dicom_series_that_it_was_drawn_on(source: Any, structures: Path, tmp_path: Path) -> None:
    write_mask(random_mask(source.values.shape), tmp_path / "a.nii.gz", like=source.folder)
    with pytest.raises(CaseError, match=r"needs its DICOM series, but its image .*a\.nii\.gz is not DICOM"):
        load_label(structures, like=tmp_path / "a.nii.gz", names=VALUES)
    for like in (None, read_grid(source.folder)):
        with pytest.raises(RequestError, match="give the path of its images"):
            load_label(structures, like=like, names=VALUES)


def test_a_seg_without_an_image_comes_on_the_grid_of_its_frames(source: Any, seg: Path) -> None:
    label = load_label(seg, names=VALUES)
    assert np.array_equal(label[0].numpy(), random_mask(source.values.shape)[:, :, 1:])


def test_a_picture_without_a_place_takes_no_object_of_places(source: Any, seg: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(GeometryError, match=r"a\.png has none"):
        load_label(seg, like=tmp_path / "a.png", names=VALUES)


def test_a_single_slice_can_be_a_picture_with_two_axes(write_series: Callable[..., Any], tmp_path: Path) -> None:
    source = write_series(tmp_path / "one", shape=(9, 8, 1))
    mask = np.random.default_rng(0).choice([0, 2, 4], source.values.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels=LABELS)
    label = load_label(path, like=source.folder, names=VALUES, spatial_dims=2)
    assert np.array_equal(label[0].numpy(), mask[..., 0])
    assert torch.equal(label.affine, load(source.folder, spatial_dims=2).affine)
    flat = Grid(source.values.shape[:2], read_grid(source.folder).affine)
    assert np.array_equal(load_label(path, like=flat, names=VALUES)[0].numpy(), mask[..., 0])


def test_a_volume_is_no_picture_with_two_axes(source: Any, seg: Path) -> None:
    with pytest.raises(CaseError, match="expected a single slice"):
        load_label(seg, like=source.folder, names=VALUES, spatial_dims=2)


def test_a_folder_with_several_objects_is_refused_by_their_names(source: Any, seg: Path, structures: Path) -> None:
    with pytest.raises(CaseError, match=r"has 2 segmentations or structure sets.*rs\.dcm, .*seg\.dcm"):
        load_label(seg.parent, like=source.folder, names=VALUES)


def test_label_maps_are_read_as_by_load(source: Any, tmp_path: Path) -> None:
    mask = random_mask(source.values.shape)
    write_mask(mask, tmp_path / "a.nii.gz", like=source.folder)
    label = load_label(tmp_path / "a.nii.gz", like=source.folder, names=VALUES, spatial_dims=3)
    assert np.array_equal(label[0].numpy(), mask)
    assert np.array_equal(load_label(source.folder)[0].numpy(), source.values)


@pytest.mark.parametrize("name", ["missing.dcm", "missing", "text.dcm", "empty.dcm"])
def test_what_cannot_be_a_label_is_refused_by_name(source: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.dcm").write_bytes(b"text" * 100)
    (tmp_path / "empty.dcm").touch()
    with pytest.raises(CaseError, match=name):
        load_label(tmp_path / name, like=source.folder, names=VALUES)


def test_a_damaged_object_is_refused_with_the_reason(source: Any, seg: Path) -> None:
    whole = seg.read_bytes()
    for length in range(200, len(whole) - 1, len(whole) // 12):
        seg.write_bytes(whole[:length])
        with pytest.raises(CaseError, match=r"seg\.dcm"):
            load_label(seg, like=source.folder, names=VALUES)
