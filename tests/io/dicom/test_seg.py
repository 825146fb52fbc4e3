from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from medseg.errors import CaseError, GeometryError, RequestError
from medseg.io.dicom import open_series
from medseg.io.dicom.seg import read_seg, write_seg
from medseg.io.geometry import Grid, corner_distance
from tests.io.dicom.conftest import (
    ABDOMEN,
    DATA,
    LABELS,
    LPS,
    WHEN,
    edited,
    index_closed,
    random_mask,
    written_by_highdicom,
)

# Of the extra `dev`: in the folder of the running Python, or anywhere on the path.
FOLDERS = [str(Path(sys.executable).parent), *os.get_exec_path()]
DCMQI = shutil.which("segimage2itkimage", path=os.pathsep.join(FOLDERS))


def same_places(a: NDArray[Any], affine_a: NDArray[np.float64], b: NDArray[Any], affine_b: NDArray[np.float64]) -> bool:
    """Whether the voxels of two images that are not zero have the same centers, within a hundredth of a voxel."""
    world = np.argwhere(a) @ affine_a[:3, :3].T + affine_a[:3, 3]
    inverse = np.linalg.inv(affine_b)
    voxels = world @ inverse[:3, :3].T + inverse[:3, 3]
    whole = np.rint(voxels)
    near = np.abs(voxels - whole).max(initial=0) < 0.01
    return bool(near and np.array_equal(np.unique(whole, axis=0).reshape(-1, 3), np.argwhere(b)))


def read_by_itk(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Values `(x, y, z)` and affine to RAS+ as SimpleITK sees them."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), LPS @ affine


@pytest.fixture
def source(write_series: Callable[..., Any], tmp_path: Path) -> Any:
    return write_series(tmp_path / "ct", shape=(7, 5, 6))


@pytest.fixture
def seg(source: Any, tmp_path: Path) -> Path:
    return write_seg(random_mask(source.values.shape), tmp_path / "seg.dcm", source.folder, labels=LABELS, created=WHEN)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(3, 9), st.integers(3, 9), st.integers(2, 5)),
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 4)] * 3),
    seed=st.integers(0, 99),
)
def test_on_any_oblique_series_highdicom_reads_the_same_voxels_at_the_same_places(
    write_series: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, shape, angles, spacing, seed
) -> None:
    folder = tmp_path_factory.mktemp("oblique")
    source = write_series(folder / "ct", shape=shape, angles=angles, spacing=spacing, seed=seed)
    mask = np.random.default_rng(seed).choice([0, 2, 4, 7], shape)
    path = write_seg(mask, folder / "seg.dcm", source.folder, labels=LABELS)
    with index_closed(hd.seg.segread(path)) as found:
        volume = found.get_volume(combine_segments=False, allow_missing_positions=True)
    for segment, value in enumerate(LABELS):
        assert same_places(volume.array[..., segment], LPS @ volume.affine, mask == value, source.affine)
    back, grid = read_seg(path, like=source.folder, labels={"liver": 2, 2: 4, "SOMETHING else": 7})
    assert np.array_equal(back, mask)
    assert np.allclose(grid.affine, source.affine, atol=1e-4)


def test_plain_pydicom_finds_each_frame_at_its_place(source: Any, seg: Path) -> None:
    dataset = pydicom.dcmread(seg)
    mask = random_mask(source.values.shape)
    to_voxels = np.linalg.inv(LPS @ source.affine)
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    found = np.zeros_like(mask)
    size = dataset.Rows * dataset.Columns
    for index, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        x, y, z = (to_voxels @ [*map(float, position), 1])[:3]
        assert (x, y) == pytest.approx((0, 0), abs=1e-4)
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        plane = bits[index * size : (index + 1) * size].reshape(dataset.Rows, dataset.Columns).T
        found[:, :, round(z)] += plane * list(LABELS)[number - 1]
    assert np.array_equal(found, mask)


def test_simpleitk_reads_the_same_voxels_at_the_same_places(write_series: Callable[..., Any], tmp_path: Path) -> None:
    source = write_series(tmp_path / "ct", shape=(8, 6, 5))  # GDCM needs frames of whole bytes
    mask = np.ones(source.values.shape, np.uint8)
    mask[np.random.default_rng(0).random(mask.shape) < 0.5] = 0
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels={1: "liver"})
    array, affine = read_by_itk(path)
    assert same_places(array, affine, mask, source.affine)


@pytest.mark.skipif(DCMQI is None, reason="needs segimage2itkimage: pip install dcmqi")
def test_dcmqi_reads_the_same_voxels_at_the_same_places(write_series: Callable[..., Any], tmp_path: Path) -> None:
    source = write_series(tmp_path / "ct", shape=(9, 7, 6))
    mask = random_mask(source.values.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels=LABELS)
    command = [str(DCMQI), "--inputDICOM", str(path), "--outputDirectory", str(tmp_path), "-t", "nii"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    for number, value in enumerate(LABELS, start=1):
        array, affine = read_by_itk(tmp_path / f"{number}.nii.gz")
        assert same_places(array, affine, mask == value, source.affine)


def test_segments_carry_codes_side_color_and_algorithm(seg: Path) -> None:
    dataset = pydicom.dcmread(seg)
    liver, kidney, other = dataset.SegmentSequence
    assert [item.SegmentNumber for item in dataset.SegmentSequence] == [1, 2, 3]
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == codes.SCT.Liver.value
    modifier = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert modifier.CodeValue == codes.SCT.Left.value
    assert other.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99MEDSEG"
    assert dataset.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99MEDSEG"
    assert len(liver.RecommendedDisplayCIELabValue) == 3
    assert liver.SegmentAlgorithmType == "AUTOMATIC"
    assert liver.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "medseg"


def test_every_frame_refers_to_the_image_at_its_place(source: Any, seg: Path) -> None:
    images = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, source.files)}
    dataset = pydicom.dcmread(seg)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        (item,) = frame.DerivationImageSequence[0].SourceImageSequence
        image = images[item.ReferencedSOPInstanceUID]
        assert item.ReferencedSOPClassUID == image.SOPClassUID
        assert frame.PlanePositionSequence[0].ImagePositionPatient == image.ImagePositionPatient
    (series,) = dataset.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == source.uid
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == set(images)
    first = next(iter(images.values()))
    assert (dataset.FrameOfReferenceUID, dataset.StudyInstanceUID) == (
        first.FrameOfReferenceUID,
        first.StudyInstanceUID,
    )


def test_attributes_that_must_be_there_are_empty_where_the_source_lacks_them(seg: Path) -> None:
    dataset = pydicom.dcmread(seg)
    assert dataset.AccessionNumber == dataset.ReferringPhysicianName == dataset.PatientBirthDate == ""


@pytest.mark.parametrize("fractional", [False, True])
def test_no_database_of_frames_stays_open(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fractional: bool
) -> None:
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **more: opened.append(connect(*given, **more)) or opened[-1])
    mask = random_mask(source.values.shape)
    values = np.stack([mask == value for value in LABELS]).astype(np.float32) if fractional else mask
    labels = dict(enumerate(LABELS.values())) if fractional else LABELS
    write_seg(values, tmp_path / "seg.dcm", source.folder, labels=labels, fractional=fractional)
    assert opened
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_an_empty_mask_becomes_a_valid_object_with_one_empty_frame(source: Any, tmp_path: Path) -> None:
    empty = np.zeros(source.values.shape, np.uint8)
    path = write_seg(empty, tmp_path / "seg.dcm", source.folder, labels=LABELS)
    with index_closed(hd.seg.segread(path)) as found:
        assert found.number_of_segments == 3
        assert found.pixel_array.sum() == 0
        assert int(found.NumberOfFrames) == 1
        assert len(found.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 6
    assert not read_seg(path, like=source.folder)[0].any()


def test_probabilities_are_stored_in_steps_of_a_255th(source: Any, tmp_path: Path) -> None:
    probabilities = np.random.default_rng(0).random((3, *source.values.shape)).astype(np.float32)
    path = write_seg(
        probabilities, tmp_path / "seg.dcm", source.folder, labels={1: "liver", 2: "spleen"}, fractional=True
    )
    with index_closed(hd.seg.segread(path)) as found:
        volume = found.get_volume(combine_segments=False, rescale_fractional=True)
    order = np.sign(volume.affine[:3, 0] @ (LPS @ source.affine)[:3, 2])
    stored = volume.array if order > 0 else volume.array[::-1]
    assert np.abs(stored.transpose(3, 2, 1, 0) - probabilities[1:]).max() <= 0.5 / 255 + 1e-6
    labels, _ = read_seg(path, like=source.folder, labels={"spleen": 9})
    assert np.array_equal(labels == 9, np.rint(probabilities[2] * 255) >= 127.5)


def test_probabilities_that_round_to_nothing_are_an_empty_object(
    source: Any, tmp_path: Path, assert_warns: Any
) -> None:
    small = np.full((1, *source.values.shape), 1e-4, np.float32)
    path = write_seg(small, tmp_path / "seg.dcm", source.folder, labels={0: "liver"}, fractional=True)
    assert_warns(lambda: read_seg(path, like=source.folder), "fraction-thresholded")
    assert not read_seg(path)[0].any()


def test_a_source_of_several_multi_frame_files_is_referred_to_file_by_file(
    write_enhanced: Callable[..., Any], tmp_path: Path
) -> None:
    def shift(dataset: Dataset) -> None:
        dataset.SeriesInstanceUID = series
        for group in dataset.PerFrameFunctionalGroupsSequence:
            place = group.PlanePositionSequence[0]
            place.ImagePositionPatient = [x + 4 * s for x, s in zip(place.ImagePositionPatient, step, strict=True)]

    lower = write_enhanced(tmp_path / "mr" / "a.dcm")
    series, step = lower.uid, ((LPS @ lower.affine)[:3, 2]).tolist()
    upper = write_enhanced(tmp_path / "mr" / "b.dcm", edit=shift)
    mask = np.full((6, 5, 8), 2)
    path = write_seg(mask, tmp_path / "seg.dcm", lower.folder, labels=LABELS)
    sources = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, (*lower.files, *upper.files))}
    written = pydicom.dcmread(path)
    referred = set()
    for frame in written.PerFrameFunctionalGroupsSequence:
        item = frame.DerivationImageSequence[0].SourceImageSequence[0]
        image = sources[item.ReferencedSOPInstanceUID]
        shown = image.PerFrameFunctionalGroupsSequence[item.ReferencedFrameNumber - 1]
        assert np.allclose(
            shown.PlanePositionSequence[0].ImagePositionPatient,
            frame.PlanePositionSequence[0].ImagePositionPatient,
            atol=1e-6,
        )
        referred.add((item.ReferencedSOPInstanceUID, item.ReferencedFrameNumber))
    assert len(referred) == 8
    listed = written.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPInstanceUID for item in listed} == set(sources)
    assert np.array_equal(read_seg(path, like=lower.folder, labels={"liver": 2})[0], mask)


def test_a_series_whose_orientations_differ_by_rounding_takes_a_mask(
    write_series: Callable[..., Any], tmp_path: Path
) -> None:
    def turn(ds: Dataset, k: int) -> None:
        ds.ImageOrientationPatient = [f"{float(value) + 1e-5 * (k % 2):.6f}" for value in ds.ImageOrientationPatient]

    source = write_series(tmp_path / "ct", edit=turn)
    mask = random_mask(source.values.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels=LABELS)
    assert np.array_equal(read_seg(path, like=source.folder, labels={1: 2, 2: 4, 3: 7})[0], mask)


@pytest.mark.parametrize("shared", [True, False])
def test_an_enhanced_source_is_referred_to_frame_by_frame(
    write_enhanced: Callable[..., Any], tmp_path: Path, shared: bool
) -> None:
    source = write_enhanced(tmp_path / "mr" / "a.dcm", times=2, shared=shared)
    series = open_series(source.folder, index=1)
    mask = random_mask(source.values.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", series, labels=LABELS)
    frames = pydicom.dcmread(source.files[0]).PerFrameFunctionalGroupsSequence
    for frame in pydicom.dcmread(path).PerFrameFunctionalGroupsSequence:
        number = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        referred = frames[number - 1]
        assert referred.PlanePositionSequence == frame.PlanePositionSequence
        assert referred.FrameContentSequence[0].TemporalPositionIndex == 2
    found, _ = read_seg(path, like=series, labels={1: 2, 2: 4, 3: 7})
    assert np.array_equal(found, mask)


def test_a_series_without_a_frame_of_reference_takes_its_own_object_back(
    write_series: Callable[..., Any], tmp_path: Path, assert_warns: Any
) -> None:
    def edit(ds: Dataset, _: int) -> None:
        del ds.FrameOfReferenceUID

    source, other = (write_series(tmp_path / name, edit=edit, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    mask = random_mask(source.values.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels=LABELS)
    assert np.array_equal(read_seg(path, like=source.folder, labels={1: 2, 2: 4, 3: 7})[0], mask)
    assert_warns(lambda: read_seg(path, like=source.folder), "uid-derived")
    with pytest.raises(GeometryError, match="frame of reference"):
        read_seg(path, like=other.folder)


@pytest.mark.parametrize(
    ("change", "labels", "error", "told"),
    [
        (lambda p: p * 2, {1: "a"}, CaseError, "expected 0 to 1"),
        (lambda p: p * np.nan, {1: "a"}, CaseError, "expected 0 to 1"),
        (lambda p: p, {2: "a"}, RequestError, "channels"),
        (lambda p: p[:, 1:], {1: "a"}, GeometryError, "shape"),
    ],
)
def test_probabilities_that_do_not_fit_are_refused(
    source: Any, tmp_path: Path, change: Any, labels: Any, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        write_seg(
            change(np.ones((2, *source.values.shape))),
            tmp_path / "x.dcm",
            source.folder,
            labels=labels,
            fractional=True,
        )


def test_without_highdicom_the_error_names_the_extra(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(RequestError, match=r'pip install "medseg\[dicom\]"'):
        write_seg(np.zeros(source.values.shape), tmp_path / "seg.dcm", source.folder, labels=LABELS)


def test_the_order_of_frames_does_not_matter(source: Any, tmp_path: Path, write_series: Callable[..., Any]) -> None:
    source = write_series(tmp_path / "bytes", shape=(8, 5, 6))
    mask = random_mask(source.values.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels=LABELS)

    def shuffle(dataset: Dataset) -> None:
        groups = list(dataset.PerFrameFunctionalGroupsSequence)
        order = np.random.default_rng(0).permutation(len(groups))
        planes = np.frombuffer(dataset.PixelData, np.uint8)[: len(groups) * 5].reshape(-1, 5)
        dataset.PerFrameFunctionalGroupsSequence = [groups[index] for index in order]
        dataset.PixelData = planes[order].tobytes() + b"\0" * (len(groups) * 5 % 2)

    found, _ = read_seg(edited(path, shuffle), like=source.folder, labels={1: 2, 2: 4, 3: 7})
    assert np.array_equal(found, mask)


def test_slices_far_thicker_than_they_are_apart_do_not_fall_together(source: Any, tmp_path: Path) -> None:
    def thicken(dataset: Dataset) -> None:
        measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        del measures.SpacingBetweenSlices
        measures.SliceThickness = 100

    mask = random_mask(source.values.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels=LABELS)
    found, grid = read_seg(edited(path, thicken), labels={1: 2, 2: 4, 3: 7})
    assert np.array_equal(found, mask[:, :, 1:])
    assert np.allclose(grid.spacing, np.linalg.norm(source.affine[:3, :3], axis=0), atol=1e-4)


def test_without_a_series_the_grid_is_the_smallest_that_the_frames_span(source: Any, tmp_path: Path) -> None:
    mask = np.zeros(source.values.shape, np.uint8)
    mask[2, 3, 1] = mask[4, 1, 4] = 1  # slices 2 and 3 have no frames
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels={1: "liver"})
    found, grid = read_seg(path)
    assert np.array_equal(found, mask[:, :, 1:5])
    assert same_places(found, grid.affine, mask, source.affine)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1), (1, -1, -1)])
def test_frames_are_placed_on_grids_of_other_axes(
    source: Any, seg: Path, axes: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    mask = random_mask(source.values.shape)
    shape = [mask.shape[axis] for axis in axes]
    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for new, old in enumerate(axes):
        turn[old, new] = flips[new]
        turn[old, 3] = 0 if flips[new] > 0 else shape[new] - 1
    expected = mask.transpose(axes)[tuple(slice(None, None, flip) for flip in flips)]
    found, _ = read_seg(seg, like=Grid(tuple(shape), source.affine @ turn), labels={1: 2, 2: 4, 3: 7})
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda a: a + np.outer([0.35, 0, 0, 0], [0, 0, 0, 1]),
            "off the grid",
        ),
        (lambda a: a @ np.diag([2, 1, 1, 1.0]), "another spacing"),
        (lambda a: a @ np.array([[1, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "covers voxels"),
    ],
)
def test_frames_off_the_grid_are_refused(source: Any, seg: Path, change: Any, told: str) -> None:
    with pytest.raises(GeometryError, match=told):
        read_seg(seg, like=Grid(source.values.shape, change(source.affine)))


def test_overlapping_segments_are_refused_unless_one_is_chosen_or_an_order_given(source: Any, tmp_path: Path) -> None:
    pixels = np.zeros((6, 5, 7, 2), np.uint8)
    pixels[2:4, 1:3, 1:3, 0] = pixels[3:5, 2:4, 1:3, 1] = 1
    path = written_by_highdicom(source, tmp_path / "seg.dcm", pixels, "BINARY", {1: "one", 2: "two"})
    with pytest.raises(CaseError, match="'one' and 'two' in 2 voxels"):
        read_seg(path)
    one, two = (read_seg(path, like=source.folder, labels={name: 1})[0] for name in ("one", "two"))
    assert np.array_equal(np.stack([one, two], axis=-1), pixels.transpose(2, 1, 0, 3))
    later, _ = read_seg(path, labels={"two": 2, "one": 1}, on_overlap="later")
    assert np.array_equal(np.bincount(later.ravel())[1:], [8, 6])
    same, _ = read_seg(path, labels={"two": 1, "one": 1})
    assert same.sum() == 14


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1"])
def test_label_map_segmentations_are_read_compressed_or_not(source: Any, tmp_path: Path, syntax: str) -> None:
    pixels = np.random.default_rng(0).choice([0, 3, 300], (6, 5, 7)).astype(np.uint16)
    path = written_by_highdicom(
        source, tmp_path / "seg.dcm", pixels, "LABELMAP", {3: "a", 300: "b"}, transfer_syntax_uid=syntax
    )
    found, _ = read_seg(path, like=source.folder)
    assert np.array_equal(found, pixels.transpose(2, 1, 0))


def set_frames(dataset: Dataset) -> None:
    dataset.NumberOfFrames = 2**31 - 1


def set_size(dataset: Dataset) -> None:
    dataset.Rows = dataset.Columns = 65535
    dataset.NumberOfFrames = len(dataset.PerFrameFunctionalGroupsSequence)


def cut_pixels(dataset: Dataset) -> None:
    dataset.PixelData = dataset.PixelData[:-4]


def undescribe(dataset: Dataset) -> None:
    dataset.SegmentSequence = dataset.SegmentSequence[:2]


def forget_place(dataset: Dataset) -> None:
    del dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence


def lose_segments(dataset: Dataset) -> None:
    del dataset.SegmentSequence


def number_twice(dataset: Dataset) -> None:
    dataset.SegmentSequence[1].SegmentNumber = 1


def be_an_image(dataset: Dataset) -> None:
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"


def use_odd_bits(dataset: Dataset) -> None:
    dataset.BitsAllocated = 32


def spoil_position(dataset: Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient = [1, 2]


def spoil_axes(dataset: Dataset) -> None:
    dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (set_frames, "NumberOfFrames is 2,147,483,647"),
        (set_size, "limit is"),
        (cut_pixels, "bytes of pixel data"),
        (undescribe, "undescribed segments"),
        (forget_place, "a frame has no ImagePositionPatient"),
        (lose_segments, "no SegmentSequence"),
        (number_twice, "several items with the SegmentNumber 1"),
        (be_an_image, "expected a segmentation"),
        (use_odd_bits, "32 bits"),
        (spoil_position, "incomplete"),
        (spoil_axes, "spacing of 0 mm"),
    ],
)
def test_damaged_or_hostile_objects_are_refused_with_the_reason(seg: Path, change: Any, told: str) -> None:
    with pytest.raises(CaseError, match=told):
        read_seg(edited(seg, change))


def test_a_file_that_is_no_dicom_cut_short_or_missing_is_a_case_error(seg: Path, tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="does not exist"):
        read_seg(tmp_path / "none.dcm")
    whole = seg.read_bytes()
    for index, content in enumerate((b"", b"text" * 100, whole[:200], whole[: len(whole) // 2], whole[:-9])):
        path = tmp_path / f"{index}.dcm"
        path.write_bytes(content)
        with pytest.raises(CaseError):
            read_seg(path)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"labels": {"spleen": 1}}, CaseError, "no segment 'spleen': it has 1 'liver', 2 'kidney_left'"),
        ({"labels": {9: 1}}, CaseError, "no segment 9"),
        ({"labels": {1: 0}}, RequestError, "expected 1 to"),
        ({"on_overlap": "first"}, RequestError, "'refuse' or 'later'"),
        ({"max_voxels": 10}, GeometryError, "limit is 10"),
    ],
)
def test_requests_that_do_not_fit_are_refused(seg: Path, options: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        read_seg(seg, **options)


def test_another_frame_of_reference_is_refused(
    write_series: Callable[..., Any], seg: Path, source: Any, tmp_path: Path
) -> None:
    def edit(ds: Dataset, _: int) -> None:
        ds.FrameOfReferenceUID = "1.2.3.99"

    other = write_series(tmp_path / "other", shape=source.values.shape, edit=edit)
    with pytest.raises(GeometryError, match=r"1\.2\.3\.99"):
        read_seg(seg, like=other.folder)


AWKWARD = DATA / "awkward" / "dicom"


@pytest.mark.data
@pytest.mark.skipif(not AWKWARD.is_dir(), reason=f"needs the real data sets in {DATA}")
@pytest.mark.parametrize(
    ("file", "segments"),
    [
        ("ct_3slice_with_seg/liver.dcm", [1]),
        ("ct_3slice_with_seg/partial_overlaps.dcm", [1, 2, 3, 4, 5]),
        ("ct_3slice_with_seg/sparse-labelmap-noppv.dcm", [1]),
        ("ct_3slice_with_seg/sparse-labelmap-ppv5.dcm", [1]),
        ("ct_tiny_23x38_with_seg/seg.dcm", [1]),
        ("single/liver.dcm", [1]),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom and highdicom, about these files
def test_objects_of_other_programs_read_as_highdicom_reads_them(file: str, segments: list[int]) -> None:
    with index_closed(hd.seg.segread(AWKWARD / file)) as found:
        for number in segments:
            labels, grid = read_seg(AWKWARD / file, labels={number: 1})
            volume = found.get_volume(segment_numbers=[number], combine_segments=False, allow_missing_positions=True)
            assert labels.any()
            assert same_places(labels, grid.affine, volume.array[..., 0], LPS @ volume.affine)


@pytest.mark.data
@pytest.mark.skipif(not AWKWARD.is_dir(), reason=f"needs the real data sets in {DATA}")
@pytest.mark.parametrize(
    ("folder", "file"), [("ct_3slice_with_seg", "liver.dcm"), ("ct_tiny_23x38_with_seg", "seg.dcm")]
)
def test_objects_of_other_programs_lie_on_their_series(folder: str, file: str) -> None:
    on_series, grid = read_seg(AWKWARD / folder / file, like=AWKWARD / folder)
    alone, own = read_seg(AWKWARD / folder / file)
    assert np.array_equal(on_series, alone)
    assert corner_distance(grid, own) < 1e-3


@pytest.mark.data
@pytest.mark.skipif(not AWKWARD.is_dir(), reason=f"needs the real data sets in {DATA}")
@pytest.mark.parametrize(
    "folder",
    ["mr_implicit_oblique", "mr_anisotropic", "mr_compressed_j2k", "mr_compressed_jpegls", "mr_enhanced_multiframe"],
)
def test_real_series_take_a_mask_and_give_it_back(folder: str, tmp_path: Path) -> None:
    series = open_series(AWKWARD / folder)
    mask = random_mask(series.grid.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", series, labels=LABELS)
    assert np.array_equal(read_seg(path, like=series, labels={1: 2, 2: 4, 3: 7})[0], mask)


@pytest.mark.data
@pytest.mark.skipif(not ABDOMEN.is_dir(), reason=f"needs the real data sets in {DATA}")
def test_a_real_ct_and_its_organs_come_back_from_highdicom_simpleitk_and_us(abdomen: Any, tmp_path: Path) -> None:
    source, label = abdomen
    series = open_series(source.folder)
    names = {1: "spleen", 2: "kidney_right", 3: "kidney_left", 5: "liver", 7: "pancreas"}
    mask = np.where(np.isin(label, list(names)), label, 0)
    path = write_seg(mask, tmp_path / "seg.dcm", series, labels=names)
    back, _ = read_seg(path, like=series, labels={name: value for value, name in names.items()})
    assert np.array_equal(back, mask)
    with index_closed(hd.seg.segread(path)) as found:
        volume = found.get_volume(combine_segments=False, allow_missing_positions=True)
    liver = list(names).index(5)
    assert same_places(volume.array[..., liver], LPS @ volume.affine, mask == 5, series.grid.affine)
    alone = write_seg((mask == 5).astype(int), tmp_path / "liver.dcm", series, labels={1: "liver"})
    array, affine = read_by_itk(alone)
    assert same_places(array, affine, mask == 5, series.grid.affine)
