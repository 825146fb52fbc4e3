"""RT-STRUCT: label maps as the contours of a DICOM structure set, and back.

Contours run along the borders of voxels: what they enclose is as large as the voxels of the label, and reading them
back gives the same voxels. Every ring is a CLOSED_PLANAR contour of its slice. A hole is a contour of its own within
another one; who fills all contours of a slice by the even-odd rule (XOR), as is common, gets the holes. Structure sets
of others are read by the same rule: a voxel belongs to a region if its center lies inside an odd number of the region's
contours in its slice. A keyhole contour, which joins a hole to the outside by a slit, comes out right as well.

Equal masks on equal series give equal bytes, apart from the dates of creation.
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
# How far from a slice a contour may lie, in slices: coordinates are often rounded to a tenth of a millimeter.
_OFF_SLICE = 0.2
# How far, in voxels, a contour may reach beyond the outer border of the image without a word.
_BEYOND = 0.1
# Pixels: no contour of an image lies further away from it.
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
        mask: a label map `(x, y, z)` on the voxel grid of the series: columns, rows, slices.
        path: the file.
        like: the source series: its folder, file or archive, or the series opened.
        labels: the value of each label and what it is (see `segment_term`). The value becomes the number of the region;
            a label without voxels becomes a region without contours.
        algorithm: what made the segmentation, for instance the name of a bundle.
        version: its version.
        created: when; by default now.

    Returns:
        The path, absolute.

    Raises:
        RequestError: the labels are wrongly given.
        GeometryError: the mask does not lie on the series.
        CaseError: the mask holds values without a label, or the series cannot be read.
        OutputError: the file cannot be written.
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
        path: the file.
        like: the series: its folder, file or archive, or the series opened.
        labels: name (in any case) or number of a region -> value; other regions are left out. Of several names of one
            value, one must be there. By default every region with its number.
        optional: those of `labels` that may be missing.
        on_overlap: "refuse" regions that overlap, or let the one "later" in `labels` win.

    Returns:
        The label map `(x, y, z)` and its grid. Points and open contours are left out, with a note in the log.

    Raises:
        CaseError: the file is missing, damaged or no RT-STRUCT; a region of `labels` is not in it; or regions overlap.
        GeometryError: a region lies in another frame of reference, between the slices, or outside of the series.
    """
    file = absolute(path)
    source = open_source(like)
    canvas = LabelPainter(source.grid.shape, on_overlap)
    with reading(file):
        dataset = read_object(file, {RTSTRUCT_CLASS}, "a structure set")
        regions = by_number(dataset.StructureSetROISequence, "ROINumber", file)
        names = {number: str(item.get("ROIName", ""))[:64] for number, item in regions.items()}
        drawn = by_number(dataset.ROIContourSequence, "ReferencedROINumber", file)
        for number, value in choose_labels(names, labels, file, what="region", optional=optional):
            what = f"Region '{names[number]}' of {file}"
            if number in drawn and drawn[number].get("ContourSequence"):
                check_same_frame(str(regions[number].get("ReferencedFrameOfReferenceUID", "")), source, what)
                _paint(canvas, source.grid, drawn[number], value, names[number], file)
    return canvas.finish(file), source.grid


def _structure_set(source: SourceSeries, uid: str, created: datetime, made_by: str) -> Dataset:
    dataset = Dataset()
    # Explicit VR could not hold a contour of more than some 2,000 points.
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
    """Return the references to every image of the source."""
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
    """Return the contours of a label in planes `(z, x, y)`, slice by slice."""
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
    # Ten digits, 16 characters at most; as bytes, because pydicom would make an object of every number.
    text = "\\".join(f"{number:.10g}" for number in (points + 0.0).ravel().tolist()).encode()
    text += b" " * (len(text) % 2)
    contour[_CONTOUR_DATA] = RawDataElement(
        pydicom.tag.Tag(_CONTOUR_DATA), "DS", len(text), text, 0, is_implicit_VR=True, is_little_endian=True
    )
    return contour


def _paint(canvas: LabelPainter, grid: Grid, drawn: Dataset, value: int, name: str, file: Path) -> None:
    rings = sorted(_placed_rings(drawn, grid, name, file), key=lambda item: item[0])
    size = grid.shape[0], grid.shape[1]
    beyond = 0.0
    for index, group in groupby(rings, key=lambda item: item[0]):
        slice_rings = [ring for _, ring in group]
        for ring in slice_rings:
            beyond = max(beyond, float((-0.5 - ring).max()), float((ring - size + 0.5).max()))
        canvas.paint(canvas.labels[:, :, index], fill_rings(slice_rings, size), value, name)
    if beyond > _BEYOND:
        text = f"region '{name}' reaches {beyond:.1f} voxels beyond the image and is clipped"
        warn(logger, "contour-clipped", text, file)


def _placed_rings(drawn: Dataset, grid: Grid, name: str, file: Path) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Give the slice and the pixel coordinates of each contour, after checking that all lie in slices."""
    what = f"Region '{name}' of {file}"
    others: dict[str, int] = {}
    between: list[float] = []
    for contour in drawn.ContourSequence:
        kind = str(contour.ContourGeometricType)
        if kind in _NO_AREAS:
            others[kind] = others.get(kind, 0) + 1
            continue
        if kind not in _AREAS:
            raise CaseError(
                f"{what} has a contour of the type {kind[:16]!r}: expected {', '.join(_AREAS + _NO_AREAS)}."
            )
        voxels = voxel_points(grid.affine, _points(contour, what))
        if np.abs(voxels).max() > _FAR:
            raise GeometryError(f"{what} has a contour that lies far away from the series: its coordinates are wrong.")
        index = round(float(voxels[:, 2].mean()))
        if np.abs(voxels[:, 2] - index).max() > _OFF_SLICE:
            between.append(float(voxels[:, 2].mean()))
        elif not 0 <= index < grid.shape[2]:
            raise GeometryError(
                f"{what} has a contour at slice {index}, counted from 0: the series has {grid.shape[2]}. Give the "
                "series that it was drawn on."
            )
        else:
            yield index, voxels[:, :2]
    if between:
        shown = ", ".join(f"{position:.2f}" for position in sorted(between)[:_SHOWN])
        raise GeometryError(
            f"{what} has {len(between)} contours that lie between the slices of the series, or across them, around "
            f"slice {shown} (counted from 0). Give the series that it was drawn on."
        )
    for kind, count in others.items():
        text = f"{count} contours of type {kind} of region '{name}' enclose no area and are skipped"
        warn(logger, "contour-skipped", text, file)


def _points(contour: Dataset, what: str) -> NDArray[np.float64]:
    """Return the points `(N, 3)` of a contour in mm; from the text itself, which is much faster."""
    stored = contour.get_item(_CONTOUR_DATA)
    if isinstance(stored, RawDataElement):
        numbers = np.array((stored.value or b"").decode("ascii").strip(" \0").split("\\"), dtype=np.float64)
    else:
        numbers = np.array(contour.ContourData, dtype=np.float64)
    if numbers.size < 9 or numbers.size % 3 or not np.isfinite(numbers).all():
        raise CaseError(f"{what} has a contour of {numbers.size} coordinates: expected x, y and z of 3 points or more.")
    return numbers.reshape(-1, 3)
