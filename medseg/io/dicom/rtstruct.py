"""RT-STRUCT: writing label maps as contours of a DICOM structure set, and reading them.

Contours follow the borders of voxels: they enclose exactly the voxels of the label, and reading them restores the same
voxels. Every ring is a CLOSED_PLANAR contour of its slice. A hole is a separate contour inside another one; filling all
contours of a slice by the common even-odd rule (XOR) preserves the holes. Structure sets of other software are read by
the same rule: a voxel belongs to an ROI if its center is inside an odd number of the ROI's contours in its slice.
Keyhole contours, which connect a hole to the outside by a slit, are filled correctly as well.

Equal masks on equal series give equal bytes, apart from the creation dates.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ImplicitVRLittleEndian

from medseg.errors import CaseError, GeometryError
from medseg.files import replacing
from medseg.io.dicom.objects import (
    LabelKeys,
    LabelPainter,
    OnOverlap,
    SeriesLike,
    SourceSeries,
    add_instance,
    add_patient_and_study,
    by_number,
    check_mask,
    check_same_frame,
    choose_labels,
    derived_uid,
    digest,
    lps_points,
    open_source,
    read_object,
    reading,
    voxel_points,
    write_object,
)
from medseg.io.dicom.terms import SegmentTerm, TermLike, default_color, segment_term
from medseg.io.geometry import Grid
from medseg.io.names import StrPath, absolute
from medseg.io.polygons import fill_rings, trace_rings
from medseg.notices import warn
from medseg.version import __version__

__all__ = ["RTSTRUCT_CLASS", "read_rtstruct", "write_rtstruct"]

logger = logging.getLogger(__name__)

RTSTRUCT_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
_CONTOUR_DATA = 0x30060050
_AREAS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_NO_AREAS = ("POINT", "OPEN_PLANAR", "OPEN_NONPLANAR")
_KINDS = _AREAS + _NO_AREAS
# Largest distance of a contour from a slice, in slices: coordinates are often rounded to 0.1 mm.
_OFF_SLICE = 0.2
# Largest distance, in voxels, of a contour beyond the image border without a warning.
_BEYOND = 0.1
# Largest plausible coordinate of a contour, in pixels.
_FAR = 1e6
_SHOWN = 5


def write_rtstruct(
    mask: NDArray[Any],
    path: StrPath,
    like: SeriesLike,
    *,
    labels: Mapping[int, TermLike],
    algorithm: str = "medseg",
    version: str = __version__,
    created: datetime | None = None,
) -> Path:
    """Write a segmentation of a DICOM series as RT-STRUCT.

    Args:
        mask: Label map `(x, y, z)` on the voxel grid of the series: columns, rows, slices.
        path: File to write.
        like: Source series: its folder, file or archive, or an opened series.
        labels: Label value -> term (see `segment_term`). The value becomes the ROINumber; a label without voxels
            becomes an ROI without contours.
        algorithm: Name of the algorithm, for instance of a bundle.
        version: Version of the algorithm.
        created: Creation time; by default now.

    Returns:
        Absolute path of the file.

    Raises:
        RequestError: The labels are invalid.
        GeometryError: The mask does not match the geometry of the series.
        CaseError: The mask has values without a label, or the series cannot be read.
        OutputError: The file cannot be written.
    """
    source = open_source(like)
    terms = {value: segment_term(labels[value]) for value in sorted(labels)}
    checked = check_mask(mask, terms, source)
    content = (*source.references(), *terms.items(), algorithm, version, digest(checked))
    uid = derived_uid("rtstruct", source.uid, *content)
    dataset = _structure_set(source, uid, created or datetime.now(), f"{algorithm} {version}")
    dataset.StructureSetROISequence = [_region(*item, source, algorithm) for item in terms.items()]
    dataset.RTROIObservationsSequence = [_observation(value) for value in terms]
    planes = np.ascontiguousarray(checked.transpose(2, 0, 1))
    dataset.ROIContourSequence = [_contours(planes, *item, source) for item in terms.items()]
    target = absolute(path)
    with replacing(target) as temporary:
        write_object(dataset, temporary)
    return target


def read_rtstruct(
    path: StrPath,
    *,
    like: SeriesLike,
    labels: LabelKeys | None = None,
    optional: Collection[str] = (),
    on_overlap: OnOverlap = "refuse",
) -> tuple[NDArray[np.int32], Grid]:
    """Read an RT-STRUCT as a label map on the voxel grid of the series that it was drawn on.

    Args:
        path: File to read.
        like: Series that it was drawn on: its folder, file or archive, or an opened series.
        labels: ROI name (case-insensitive) or number -> label value; other ROIs are ignored. Of several names with one
            value, one must be present. By default every ROI with its number as the value.
        optional: Names in `labels` that may be missing.
        on_overlap: Rule for overlapping ROIs: "refuse" them, or the "later" one in `labels` wins.

    Returns:
        Label map `(x, y, z)` and its grid. Points and open contours are skipped with a warning.

    Raises:
        CaseError: The file is missing, damaged or not an RT-STRUCT; an ROI of `labels` is missing; or ROIs overlap.
        GeometryError: An ROI has another frame of reference, or is between the slices or outside the series.
    """
    file = absolute(path)
    source = open_source(like)
    painter = LabelPainter(source.grid.shape, on_overlap)
    with reading(file):
        dataset = read_object(file, {RTSTRUCT_CLASS}, "a structure set")
        regions = by_number(dataset.StructureSetROISequence, "ROINumber", file)
        names = {number: str(item.get("ROIName", ""))[:64] for number, item in regions.items()}
        drawn = by_number(dataset.ROIContourSequence, "ReferencedROINumber", file)
        for number, value in choose_labels(names, labels, file, what="ROI", optional=optional):
            what = f"ROI '{names[number]}' of {file}"
            if number in drawn and drawn[number].get("ContourSequence"):
                check_same_frame(str(regions[number].get("ReferencedFrameOfReferenceUID", "")), source, what)
                _paint(painter, source.grid, drawn[number], value, names[number], file)
    return painter.finish(file), source.grid


def _structure_set(source: SourceSeries, uid: str, created: datetime, made_by: str) -> Dataset:
    dataset = Dataset()
    # Explicit VR cannot store a contour of more than about 2,000 points.
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = UID(RTSTRUCT_CLASS)
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(uid)
    add_patient_and_study(dataset, source)
    add_instance(dataset, RTSTRUCT_CLASS, uid, created)
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "RTSTRUCT", 301, 1
    dataset.OperatorsName, dataset.ApprovalStatus = "", "UNAPPROVED"
    dataset.SeriesDescription = f"Segmentation by {made_by}"[:64]
    dataset.StructureSetLabel = "SEGMENTATION"
    dataset.StructureSetName = made_by[:64]
    dataset.StructureSetDate, dataset.StructureSetTime = dataset.InstanceCreationDate, dataset.InstanceCreationTime
    dataset.FrameOfReferenceUID = source.frame_of_reference
    dataset.PositionReferenceIndicator = ""
    dataset.ReferencedFrameOfReferenceSequence = [_frame_of_reference(source)]
    return dataset


def _frame_of_reference(source: SourceSeries) -> Dataset:
    """Return the references to all images of the source."""
    frame, study, series = Dataset(), Dataset(), Dataset()
    images = dict.fromkeys((sop_class, sop_uid, None) for sop_class, sop_uid, _ in source.references())
    series.SeriesInstanceUID = source.uid
    series.ContourImageSequence = [_image(*image) for image in images]
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_CLASS, source.study_uid
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = source.frame_of_reference
    frame.RTReferencedStudySequence = [study]
    return frame


def _image(sop_class: str, sop_uid: str, frame: int | None) -> Dataset:
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = sop_class, sop_uid
    if frame is not None:
        image.ReferencedFrameNumber = frame
    return image


def _region(value: int, term: SegmentTerm, source: SourceSeries, algorithm: str) -> Dataset:
    region = Dataset()
    region.ROINumber, region.ROIName = value, term.name
    region.ReferencedFrameOfReferenceUID = source.frame_of_reference
    region.ROIGenerationAlgorithm = "AUTOMATIC"
    region.ROIGenerationDescription = algorithm[:64]
    return region


def _observation(value: int) -> Dataset:
    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = value
    observation.RTROIInterpretedType = observation.ROIInterpreter = ""
    return observation


def _contours(planes: NDArray[np.uint16], value: int, term: SegmentTerm, source: SourceSeries) -> Dataset:
    """Return the contours of a label in the planes `(z, x, y)`, slice by slice."""
    drawn = Dataset()
    drawn.ReferencedROINumber = value
    drawn.ROIDisplayColor = list(term.color or default_color(value))
    references = source.references()
    rings = [(index, ring) for index, plane in enumerate(planes) for ring in trace_rings(plane == value)]
    if rings:
        drawn.ContourSequence = [_contour(ring, index, source.grid, references[index]) for index, ring in rings]
    return drawn


def _contour(ring: NDArray[np.float64], index: int, grid: Grid, reference: tuple[str, str, int | None]) -> Dataset:
    contour = Dataset()
    contour.ContourImageSequence = [_image(*reference)]
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.NumberOfContourPoints = len(ring)
    points = lps_points(grid.affine, np.column_stack([ring, np.full(len(ring), float(index))]))
    # Ten digits, at most 16 characters; as bytes, because pydicom would create an object for every number.
    text = "\\".join(f"{number:.10g}" for number in (points + 0.0).ravel().tolist()).encode()
    text += b" " * (len(text) % 2)
    contour[_CONTOUR_DATA] = RawDataElement(
        pydicom.tag.Tag(_CONTOUR_DATA), "DS", len(text), text, 0, is_implicit_VR=True, is_little_endian=True
    )
    return contour


def _paint(painter: LabelPainter, grid: Grid, drawn: Dataset, value: int, name: str, file: Path) -> None:
    rings = sorted(_slice_rings(drawn, grid, name, file), key=lambda item: item[0])
    size = grid.shape[0], grid.shape[1]
    beyond = 0.0
    for index, group in groupby(rings, key=lambda item: item[0]):
        slice_rings = [ring for _, ring in group]
        for ring in slice_rings:
            beyond = max(beyond, float((-0.5 - ring).max()), float((ring - size + 0.5).max()))
        painter.paint(painter.labels[:, :, index], fill_rings(slice_rings, size), value, name)
    if beyond > _BEYOND:
        text = f"ROI '{name}' extends {beyond:.1f} voxels beyond the image and is clipped"
        warn(logger, "contour-clipped", text, file)


def _slice_rings(drawn: Dataset, grid: Grid, name: str, file: Path) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield slice index and pixel coordinates of each contour, after checking that all are on slices."""
    what = f"ROI '{name}' of {file}"
    others: dict[str, int] = {}
    between: list[float] = []
    for contour in drawn.ContourSequence:
        kind = str(contour.ContourGeometricType)
        if kind in _NO_AREAS:
            others[kind] = others.get(kind, 0) + 1
            continue
        if kind not in _AREAS:
            raise CaseError(
                f"{what} has a contour of unknown type {kind[:16]!r}: expected {', '.join(_AREAS + _NO_AREAS)}."
            )
        voxels = voxel_points(grid.affine, _points(contour, what))
        if np.abs(voxels).max() > _FAR:
            raise GeometryError(f"{what} has a contour far away from the series: its coordinates are wrong.")
        index = round(float(voxels[:, 2].mean()))
        if np.abs(voxels[:, 2] - index).max() > _OFF_SLICE:
            between.append(float(voxels[:, 2].mean()))
        elif not 0 <= index < grid.shape[2]:
            raise GeometryError(
                f"{what} has a contour at slice index {index}: the series has {grid.shape[2]} slices. Give the series "
                "that it was drawn on."
            )
        else:
            yield index, voxels[:, :2]
    if between:
        shown = ", ".join(f"{position:.2f}" for position in sorted(between)[:_SHOWN])
        raise GeometryError(
            f"{what} has {len(between)} contours between or across the slices of the series, around slice index "
            f"{shown}. Give the series that it was drawn on."
        )
    for kind, count in others.items():
        text = f"{count} contours of type {kind} of ROI '{name}' enclose no area and are skipped"
        warn(logger, "contour-skipped", text, file)


def _points(contour: Dataset, what: str) -> NDArray[np.float64]:
    """Return the points `(N, 3)` of a contour in mm, parsed from the raw text, which is much faster."""
    stored = contour.get_item(_CONTOUR_DATA)
    if isinstance(stored, RawDataElement):
        numbers = np.array((stored.value or b"").decode("ascii").strip(" \0").split("\\"), dtype=np.float64)
    else:
        numbers = np.array(contour.ContourData, dtype=np.float64)
    if numbers.size < 9 or numbers.size % 3 or not np.isfinite(numbers).all():
        raise CaseError(
            f"{what} has an invalid contour of {numbers.size} coordinates: expected x, y and z of 3 or more points."
        )
    return numbers.reshape(-1, 3)
