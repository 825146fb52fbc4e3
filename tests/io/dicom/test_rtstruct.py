from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medseg.errors import CaseError, GeometryError
from medseg.io.dicom import open_series
from medseg.io.dicom.rtstruct import read_rtstruct, write_rtstruct
from tests.io.dicom.conftest import ABDOMEN, DATA, LABELS, LPS, WHEN, edited, random_mask

VALUES = {name: value for value, name in LABELS.items()}


def contours_of(path: Path) -> dict[str, list[tuple[Dataset, NDArray[np.float64]]]]:
    """Name of each region -> its contours, and their points in LPS mm."""
    dataset = pydicom.dcmread(path)
    names = {item.ROINumber: item.ROIName for item in dataset.StructureSetROISequence}
    return {
        names[item.ReferencedROINumber]: [
            (contour, np.array(contour.ContourData, dtype=float).reshape(-1, 3))
            for contour in item.get("ContourSequence", [])
        ]
        for item in dataset.ROIContourSequence
    }


def winding_fill(polygons: list[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Fill by another rule and another way: sum the angles under which each center sees the polygons' edges."""
    x, y = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    parity = np.zeros(shape, int)
    for polygon in polygons:
        turn = np.zeros(shape)
        for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            cross = (ax - x) * (by - y) - (ay - y) * (bx - x)
            turn += np.arctan2(cross, (ax - x) * (bx - x) + (ay - y) * (by - y))
        parity += np.rint(np.abs(turn) / (2 * np.pi)).astype(int)
    return parity % 2 == 1


@pytest.fixture
def source(write_series: Callable[..., Any], tmp_path: Path) -> Any:
    return write_series(tmp_path / "ct", shape=(9, 8, 5))


@pytest.fixture
def structures(source: Any, tmp_path: Path) -> Path:
    mask = random_mask(source.values.shape)
    return write_rtstruct(mask, tmp_path / "rs.dcm", source.folder, labels=LABELS, created=WHEN)


def test_contours_filled_by_winding_numbers_are_the_mask(source: Any, structures: Path) -> None:
    to_voxels = np.linalg.inv(LPS @ source.affine)
    found = np.zeros(source.values.shape, int)
    for name, contours in contours_of(structures).items():
        voxels = [points @ to_voxels[:3, :3].T + to_voxels[:3, 3] for _, points in contours]
        for index in range(found.shape[2]):
            here = [points[:, :2] for points in voxels if abs(points[:, 2].mean() - index) < 0.01]
            found[:, :, index] += VALUES[name] * winding_fill(here, found.shape[:2])
    assert np.array_equal(found, random_mask(found.shape))


def test_the_surface_of_contours_lies_within_half_a_voxel_of_the_masks(
    write_series: Callable[..., Any], tmp_path: Path
) -> None:
    source = write_series(tmp_path / "ct", shape=(30, 28, 3), spacing=(0.8, 0.8, 2.0))
    x, y = np.meshgrid(np.arange(30), np.arange(28), indexing="ij")
    disk = (x - 14) ** 2 + (y - 13) ** 2 < 100
    mask = np.repeat((disk & ((x - 14) ** 2 + (y - 13) ** 2 > 20))[..., None], 3, axis=2)
    path = write_rtstruct(mask.astype(int), tmp_path / "rs.dcm", source.folder, labels={1: "ring"})
    contours = [points for _, points in contours_of(path)["ring"]]
    steps = np.linspace(0, 1, 41)
    drawn = np.concatenate([c + (np.roll(c, -1, axis=0) - c) * step for c in contours for step in steps])
    # The mask's surface: half way between neighbors of which one is inside.
    surface = []
    for axis in (0, 1):
        beside = np.argwhere(np.diff(mask.astype(int), axis=axis)).astype(float)
        beside[:, axis] += 0.5
        surface.append(beside)
    to_mm = LPS @ source.affine
    expected = np.concatenate(surface) @ to_mm[:3, :3].T + to_mm[:3, 3]
    apart = np.linalg.norm(drawn[:, None] - expected[None], axis=2)
    assert apart.min(axis=1).max() <= 0.5 * 0.8 + 1e-6
    assert apart.min(axis=0).max() <= 0.5 * 0.8 + 1e-6


def test_holes_and_islands_in_holes_survive(write_series: Callable[..., Any], tmp_path: Path) -> None:
    source = write_series(tmp_path / "ct", shape=(11, 11, 3))
    mask = np.zeros((11, 11, 3), int)
    mask[1:10, 1:10, 1] = 1
    mask[3:8, 3:8, 1] = 0
    mask[5, 5, 1] = 1
    path = write_rtstruct(mask, tmp_path / "rs.dcm", source.folder, labels={1: "shell"})
    assert len(contours_of(path)["shell"]) == 3
    assert np.array_equal(read_rtstruct(path, like=source.folder)[0], mask)


def test_the_object_has_what_the_standard_asks_for(source: Any, structures: Path) -> None:
    dataset = pydicom.dcmread(structures)
    image = pydicom.dcmread(source.files[0])
    assert dataset.SOPClassUID.name == "RT Structure Set Storage"
    assert dataset.Modality == "RTSTRUCT"
    assert dataset.StudyInstanceUID == image.StudyInstanceUID
    assert dataset.StructureSetLabel
    assert dataset.ApprovalStatus == "UNAPPROVED"
    (frame,) = dataset.ReferencedFrameOfReferenceSequence
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert frame.FrameOfReferenceUID == image.FrameOfReferenceUID
    assert series.SeriesInstanceUID == source.uid
    images = {ds.SOPInstanceUID for ds in map(pydicom.dcmread, source.files)}
    assert {item.ReferencedSOPInstanceUID for item in series.ContourImageSequence} == images
    for region, observation, drawn in zip(
        dataset.StructureSetROISequence, dataset.RTROIObservationsSequence, dataset.ROIContourSequence, strict=True
    ):
        assert LABELS[region.ROINumber] == region.ROIName
        assert region.ROINumber == observation.ReferencedROINumber == drawn.ReferencedROINumber
        assert region.ReferencedFrameOfReferenceUID == image.FrameOfReferenceUID
        assert region.ROIGenerationAlgorithm == "AUTOMATIC"
        assert len(drawn.ROIDisplayColor) == 3


def test_every_contour_refers_to_the_image_that_it_lies_in(source: Any, structures: Path) -> None:
    images = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, source.files)}
    for contours in contours_of(structures).values():
        for contour, points in contours:
            image = images[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            row, column = np.array(image.ImageOrientationPatient, dtype=float).reshape(2, 3)
            apart = (points - np.array(image.ImagePositionPatient, dtype=float)) @ np.cross(row, column)
            assert np.abs(apart).max() < 1e-4
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            assert contour.NumberOfContourPoints == len(points)


def test_long_contours_and_names_of_any_script_are_stored_whole(
    write_series: Callable[..., Any], tmp_path: Path
) -> None:
    source = write_series(tmp_path / "ct", shape=(100, 102, 2))
    mask = np.zeros(source.values.shape, int)
    mask[:, ::3, 0] = mask[1::2, 1::3, 0] = mask[0, :, 0] = 1  # a comb of saws
    path = write_rtstruct(mask, tmp_path / "rs.dcm", source.folder, labels={1: "肝臓"})
    ((contour, points),) = contours_of(path)["肝臓"]
    assert len(points) > 6000
    assert len(contour[0x30060050].value) == 3 * len(points)
    assert path.stat().st_size > 2**16
    assert np.array_equal(read_rtstruct(path, like=source.folder, labels={"肝臓": 1})[0], mask)


def test_an_empty_mask_becomes_regions_without_contours(source: Any, tmp_path: Path) -> None:
    empty = np.zeros(source.values.shape, np.uint8)
    path = write_rtstruct(empty, tmp_path / "rs.dcm", source.folder, labels=LABELS)
    assert contours_of(path) == {name: [] for name in VALUES}
    assert not read_rtstruct(path, like=source.folder)[0].any()


def test_an_enhanced_source_is_referred_to_frame_by_frame(write_enhanced: Callable[..., Any], tmp_path: Path) -> None:
    source = write_enhanced(tmp_path / "mr" / "a.dcm", times=2)
    series = open_series(source.folder, index=1)
    mask = random_mask(source.values.shape)
    path = write_rtstruct(mask, tmp_path / "rs.dcm", series, labels=LABELS)
    frames = pydicom.dcmread(source.files[0]).PerFrameFunctionalGroupsSequence
    row, column = (series.slices[0].plane.orientation[:3], series.slices[0].plane.orientation[3:])
    for contours in contours_of(path).values():
        for contour, points in contours:
            frame = frames[contour.ContourImageSequence[0].ReferencedFrameNumber - 1]
            position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
            assert np.abs((points - position) @ np.cross(row, column)).max() < 1e-4
            assert frame.FrameContentSequence[0].TemporalPositionIndex == 2
    assert np.array_equal(read_rtstruct(path, like=series, labels=VALUES)[0], mask)


def test_regions_are_chosen_by_name_in_any_case_or_by_number(source: Any, structures: Path) -> None:
    mask = random_mask(source.values.shape)
    found, _ = read_rtstruct(structures, like=source.folder, labels={"LIVER ": 1, 7: 2})
    assert np.array_equal(found, (mask == 2) + 2 * (mask == 7))
    with pytest.raises(CaseError, match="no ROI 'spleen': it has 2 'liver', 4 'kidney_left', 7"):
        read_rtstruct(structures, like=source.folder, labels={"spleen": 1})


def test_a_contour_of_another_program_covers_the_centers_inside_of_it(source: Any, structures: Path) -> None:
    polygon = np.array([[1.2, 1.1], [6.9, 2.3], [4.4, 6.6], [3.9, 3.1]])

    def redraw(dataset: Dataset) -> None:
        vertices = np.column_stack([polygon, np.full(4, 3.0), np.ones(4)]) @ (LPS @ source.affine).T
        contour = dataset.ROIContourSequence[0].ContourSequence[0]
        contour.ContourData = [f"{value:.3f}" for value in vertices[:, :3].ravel()]
        contour.NumberOfContourPoints = 4
        dataset.ROIContourSequence[0].ContourSequence = [contour]

    found, _ = read_rtstruct(edited(structures, redraw), like=source.folder, labels={"liver": 1})
    assert np.array_equal(found[:, :, 3] == 1, winding_fill([polygon], found.shape[:2]))
    assert found.sum() == found[:, :, 3].sum() > 0


def move(dataset: Dataset, step: NDArray[np.float64]) -> None:
    for contour in dataset.ROIContourSequence[0].ContourSequence:
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3) + step
        contour.ContourData = [f"{value:.8g}" for value in points.ravel()]


def along(source: Any, axis: int, voxels: float) -> NDArray[np.float64]:
    step: NDArray[np.float64] = (LPS @ source.affine)[:3, axis] * voxels
    return step


@pytest.mark.parametrize(
    ("axis", "voxels", "told"),
    [
        (2, 0.4, r"contours between or across the slices .* around slice index 1.40"),
        (2, 2.0, "slice index 5: the series has 5 slices"),
        (2, -3.0, "slice index -2:"),
        (0, 1e7, "far away"),
    ],
)
def test_contours_that_lie_in_no_slice_are_refused_with_their_position(
    source: Any, structures: Path, axis: int, voxels: float, told: str
) -> None:
    path = edited(structures, lambda dataset: move(dataset, along(source, axis, voxels)))
    with pytest.raises(GeometryError, match=told):
        read_rtstruct(path, like=source.folder)


def test_contours_slightly_off_their_slice_are_read(source: Any, structures: Path) -> None:
    path = edited(structures, lambda dataset: move(dataset, along(source, 2, 0.1)))
    found, _ = read_rtstruct(path, like=source.folder, labels={"liver": 2})
    assert np.array_equal(found == 2, random_mask(found.shape) == 2)


def test_what_reaches_beyond_the_image_is_clipped_with_a_warning(
    source: Any, structures: Path, caplog: pytest.LogCaptureFixture, assert_warns: Any
) -> None:
    path = edited(structures, lambda dataset: move(dataset, along(source, 0, 3)))
    found, _ = read_rtstruct(path, like=source.folder, labels={"liver": 1})
    assert np.array_equal(found[3:], random_mask(found.shape)[:-3] == 2)
    assert "edited.dcm: ROI 'liver' extends 3.0 voxels beyond the image" in caplog.text
    assert_warns(lambda: read_rtstruct(path, like=source.folder, labels={"liver": 1}), "contour-clipped")


def test_points_are_skipped_with_a_warning(
    source: Any, structures: Path, caplog: pytest.LogCaptureFixture, assert_warns: Any
) -> None:
    def add(dataset: Dataset) -> None:
        contour = Dataset()
        contour.ContourGeometricType, contour.NumberOfContourPoints = "POINT", 1
        contour.ContourData = [1, 2, 3]
        dataset.ROIContourSequence[0].ContourSequence.append(contour)

    path = edited(structures, add)
    found, _ = read_rtstruct(path, like=source.folder, labels=VALUES)
    assert np.array_equal(found, random_mask(found.shape))
    assert "1 contours of type POINT" in caplog.text
    assert_warns(lambda: read_rtstruct(path, like=source.folder, labels=VALUES), "contour-skipped")


def test_overlapping_regions_are_refused_unless_an_order_is_given(source: Any, structures: Path) -> None:
    def repeat(dataset: Dataset) -> None:
        dataset.ROIContourSequence[1].ContourSequence = dataset.ROIContourSequence[0].ContourSequence

    path = edited(structures, repeat)
    count = int((random_mask(source.values.shape) == 2).sum())
    with pytest.raises(CaseError, match=f"'liver' and 'kidney_left' in {count} voxels"):
        read_rtstruct(path, like=source.folder)
    found, _ = read_rtstruct(path, like=source.folder, labels={4: 1, 2: 2}, on_overlap="later")
    assert (found == 2).sum() == count
    assert not (found == 1).any()


def other_frame(dataset: Dataset) -> None:
    dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.3.99"


def two_points(dataset: Dataset) -> None:
    dataset.ROIContourSequence[0].ContourSequence[0].ContourData = [1, 2, 3, 4, 5, 6]


def odd_number(dataset: Dataset) -> None:
    contour = dataset.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = list(contour.ContourData)[:-1]


def unknown_type(dataset: Dataset) -> None:
    dataset.ROIContourSequence[0].ContourSequence[0].ContourGeometricType = "SPLINE"


def draw_twice(dataset: Dataset) -> None:
    dataset.ROIContourSequence[1].ReferencedROINumber = dataset.ROIContourSequence[0].ReferencedROINumber


def be_a_plan(dataset: Dataset) -> None:
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.5"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_frame, r"'liver' .* has frame of reference 1\.2\.3\.99"),
        (two_points, "an invalid contour of 6 coordinates"),
        (odd_number, "coordinates: expected x, y and z"),
        (unknown_type, "type 'SPLINE'"),
        (draw_twice, "several items with the ReferencedROINumber"),
        (be_a_plan, "expected a structure set"),
    ],
)
def test_objects_that_cannot_be_right_are_refused_with_the_reason(
    source: Any, structures: Path, change: Any, told: str
) -> None:
    with pytest.raises(CaseError, match=told):
        read_rtstruct(edited(structures, change), like=source.folder)


def test_a_file_that_is_no_dicom_or_missing_is_a_case_error(source: Any, tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="does not exist"):
        read_rtstruct(tmp_path / "none.dcm", like=source.folder)
    for index, content in enumerate((b"", b"text" * 100)):
        path = tmp_path / f"{index}.dcm"
        path.write_bytes(content)
        with pytest.raises(CaseError):
            read_rtstruct(path, like=source.folder)


def use_undefined_lengths(dataset: Dataset) -> None:
    for element in dataset:
        if element.VR == "SQ":
            element.is_undefined_length = True
            for item in element.value:
                item.is_undefined_length_sequence_item = True
                use_undefined_lengths(item)


@pytest.mark.parametrize("change", [lambda dataset: None, use_undefined_lengths])
def test_a_file_that_is_cut_short_never_gives_another_mask(
    write_series: Callable[..., Any], tmp_path: Path, change: Any
) -> None:
    source = write_series(tmp_path / "ct", shape=(5, 4, 2))
    mask = np.zeros(source.values.shape, int)
    mask[1:3, 1:3] = 1
    mask[3, 1:3, 1] = 2
    path = edited(write_rtstruct(mask, tmp_path / "rs.dcm", source.folder, labels={1: "a", 2: "b"}), change)
    whole, series = path.read_bytes(), open_series(source.folder)
    assert np.array_equal(read_rtstruct(path, like=series)[0], mask)
    refused = 0
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            assert np.array_equal(read_rtstruct(path, like=series)[0], mask)
        except CaseError:
            refused += 1
    assert refused * 7 > 0.8 * len(whole)


@pytest.mark.data
@pytest.mark.skipif(not ABDOMEN.is_dir(), reason=f"needs the real data sets in {DATA}")
def test_organs_of_a_real_ct_come_back_exactly(abdomen: Any, tmp_path: Path) -> None:
    source, values = abdomen
    series = open_series(source.folder)
    names = {1: "spleen", 2: "kidney_right", 3: "kidney_left", 5: "liver", 7: "pancreas"}
    mask = np.where(np.isin(values, list(names)), values, 0)
    assert (mask == 5).sum() == 366_708
    path = write_rtstruct(mask, tmp_path / "rs.dcm", series, labels=names)
    back, _ = read_rtstruct(path, like=series, labels={name: value for value, name in names.items()})
    assert np.array_equal(back, mask)
