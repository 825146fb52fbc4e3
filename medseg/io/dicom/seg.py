"""DICOM SEG: writing label maps and probabilities as segmentations of a source series, and reading them.

Writing uses highdicom (extra `dicom`). Segments are numbered 1, 2, ... in ascending order of the label values; an empty
segment is described but has no frames, and an empty object has one empty frame, since at least one is required. Equal
masks on equal series give equal bytes, apart from the creation dates.

Reading needs only pydicom. Frames are assigned by their positions, never by their order, to the voxel grid of a series,
to a given grid, or to the smallest grid that contains them; missing frames are empty. A fractional segment is
thresholded at half of its maximum.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medseg.errors import CaseError, GeometryError, RequestError
from medseg.extras import require
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
    open_source,
    read_object,
    reading,
    write_object,
)
from medseg.io.dicom.seg_frames import Frame, Pixels, find_region, read_frames, span_grid
from medseg.io.dicom.terms import OWN_SCHEME, Coded, SegmentTerm, TermLike, default_color, lab_color, segment_term
from medseg.io.geometry import MAX_VOXELS, Grid, check_size
from medseg.io.names import StrPath, absolute
from medseg.version import __version__

__all__ = ["SEG_CLASSES", "read_seg", "write_seg"]

_SEG = "1.2.840.10008.5.1.4.1.1.66.4"
# Readable SOP classes: Segmentation, and Label Map Segmentation.
SEG_CLASSES = (_SEG, "1.2.840.10008.5.1.4.1.1.66.7")
_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
_MAX_FRACTION = 255


def write_seg(
    mask: NDArray[Any],
    path: StrPath,
    like: SeriesLike,
    *,
    labels: Mapping[int, TermLike],
    fractional: bool = False,
    algorithm: str = "medseg",
    version: str = __version__,
    created: datetime | None = None,
) -> Path:
    """Write a segmentation of a DICOM series as DICOM SEG.

    Args:
        mask: Label map `(x, y, z)` on the voxel grid of the series (columns, rows, slices), or with `fractional`
            probabilities `(C, x, y, z)` from 0 to 1.
        path: File to write.
        like: Source series: its folder, file or archive, or an opened series.
        labels: Label value (with `fractional`, channel) -> term (see `segment_term`).
        fractional: Whether to write probabilities, in steps of 1/255.
        algorithm: Name of the algorithm, for instance of a bundle.
        version: Version of the algorithm.
        created: Creation time; by default now.

    Returns:
        Absolute path of the file.

    Raises:
        RequestError: The package highdicom is not installed, or the labels are invalid.
        GeometryError: The mask does not match the geometry of the series.
        CaseError: The mask has values without a label, or the series cannot be read.
        OutputError: The file cannot be written.
    """
    _highdicom()
    source = open_source(like)
    terms = {value: segment_term(labels[value]) for value in sorted(labels)}
    pixels = _fractions(mask, terms, source) if fractional else _numbers(mask, terms, source)
    uid = derived_uid("seg", source.uid, *source.references(), *terms.items(), algorithm, version, digest(pixels))
    dataset = _segmentation(pixels, source, terms, uid, (algorithm, version))
    _complete(dataset, source, uid, created or datetime.now())
    target = absolute(path)
    with replacing(target) as temporary:
        write_object(dataset, temporary)
    return target


def read_seg(
    path: StrPath,
    *,
    like: SeriesLike | Grid | None = None,
    labels: LabelKeys | None = None,
    optional: Collection[str] = (),
    on_overlap: OnOverlap = "refuse",
    max_voxels: int = MAX_VOXELS,
) -> tuple[NDArray[np.int32], Grid]:
    """Read a DICOM SEG as a label map.

    Args:
        path: File to read.
        like: Series that was segmented, or target grid; by default the smallest grid that contains the frames.
        labels: Segment label (case-insensitive) or number -> label value; other segments are ignored. Of several labels
            with one value, one must be present. By default every segment with its number as the value.
        optional: Labels in `labels` that may be missing.
        on_overlap: Rule for overlapping segments: "refuse" them, or the "later" one in `labels` wins.
        max_voxels: Largest number of values that a header may claim.

    Returns:
        Label map `(x, y, z)` and its grid.

    Raises:
        CaseError: The file is missing, damaged or not a SEG; a segment of `labels` is missing; or segments overlap.
        GeometryError: The frames have another frame of reference, are off the grid, or form no regular grid.
    """
    file = absolute(path)
    source = None if like is None or isinstance(like, Grid) else open_source(like)
    with reading(file):
        dataset = _read(file, max_voxels)
        if source is not None:
            check_same_frame(str(dataset.get("FrameOfReferenceUID", "")), source, str(file))
        segments = by_number(dataset.SegmentSequence, "SegmentNumber", file)
        names = {number: str(item.get("SegmentLabel", ""))[:64] for number, item in segments.items()}
        values = choose_labels(names, labels, file, what="segment", optional=optional)
        frames = read_frames(dataset, file)
        grid = source.grid if source else like if isinstance(like, Grid) else span_grid(frames, dataset, file)
        check_size(grid.shape, file, max_voxels)
        painter = LabelPainter(grid.shape, on_overlap)
        _paint(painter, grid, frames, Pixels(dataset, names, file), values, file)
    return painter.finish(file), grid


def _highdicom() -> Any:
    require("highdicom.seg", "Writing DICOM SEG")
    return require("highdicom", "Writing DICOM SEG")


def _numbers(mask: NDArray[Any], terms: Mapping[int, SegmentTerm], source: SourceSeries) -> NDArray[np.uint16]:
    """Return the segment number of each voxel, `(z, y, x)`."""
    checked = check_mask(mask, terms, source)
    numbers = np.zeros(max(terms) + 1, dtype=np.uint16)
    numbers[list(terms)] = np.arange(1, len(terms) + 1)
    return np.ascontiguousarray(numbers[checked.transpose(2, 1, 0)])


def _fractions(mask: NDArray[Any], terms: Mapping[int, SegmentTerm], source: SourceSeries) -> NDArray[np.float32]:
    """Return the probabilities `(z, y, x, segment)`, rounded to the stored precision."""
    channels = list(terms)
    if not channels or mask.ndim != 4 or not 0 <= channels[0] <= channels[-1] < len(mask):
        raise RequestError(
            f"Invalid channels {channels} of labels for probabilities of shape {mask.shape}: expected (C, x, y, z)."
        )
    if mask.shape[1:] != source.grid.shape:
        raise GeometryError(
            f"Geometry mismatch: the probabilities have shape {mask.shape[1:]}, but series {source.uid} has "
            f"{source.grid.describe()}."
        )
    pixels = mask[channels].transpose(3, 2, 1, 0).astype(np.float32)
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise CaseError(f"Invalid probabilities from {pixels.min():g} to {pixels.max():g}: expected 0 to 1.")
    rounded: NDArray[np.float32] = np.rint(pixels * np.float32(_MAX_FRACTION)) / np.float32(_MAX_FRACTION)
    return rounded


def _segmentation(
    pixels: NDArray[Any],
    source: SourceSeries,
    terms: Mapping[int, SegmentTerm],
    uid: str,
    made_by: tuple[str, str],
) -> Dataset:
    """Return the object made by highdicom, without patient data, since highdicom logs its input."""
    hd = _highdicom()
    images = _source_images(source)
    if pixels.shape[1] * pixels.shape[2] < 8:
        raise CaseError(
            f"Series {source.uid} has images of fewer than 8 pixels, which highdicom cannot write correctly."
        )
    empty = not pixels.any()
    if empty:
        # Otherwise highdicom writes every frame of every segment.
        pixels = np.zeros_like(pixels)
        pixels[(0,) * pixels.ndim] = 1
    try:
        dataset: Dataset = hd.seg.Segmentation(
            source_images=images,
            pixel_array=pixels,
            segmentation_type="FRACTIONAL" if pixels.ndim == 4 else "BINARY",
            segment_descriptions=[_description(hd, *item, made_by) for item in enumerate(terms.items(), start=1)],
            series_instance_uid=derived_uid("series", uid),
            series_number=300,
            sop_instance_uid=uid,
            instance_number=1,
            manufacturer="medseg",
            manufacturer_model_name="medseg",
            software_versions=__version__,
            device_serial_number="0",
            max_fractional_value=_MAX_FRACTION,
            content_label="SEGMENTATION",
            content_description=made_by[0][:64],
            series_description=f"Segmentation by {made_by[0]}"[:64],
            transfer_syntax_uid=_EXPLICIT_LITTLE_ENDIAN,
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CaseError(f"Series {source.uid} is not a valid source of a DICOM SEG: {error}.") from error
    _close_index(dataset)
    if empty:
        dataset.PixelData = bytes(len(dataset.PixelData))
    return dataset


def _close_index(dataset: Dataset) -> None:
    """Close the frame database that highdicom keeps in an object without a method to close it."""
    for value in vars(dataset).values():
        if isinstance(value, sqlite3.Connection):
            value.close()


def _description(hd: Any, number: int, label: tuple[int, SegmentTerm], made_by: tuple[str, str]) -> Dataset:
    from pydicom.sr.codedict import codes

    value, term = label
    name, version = made_by
    family = codes.DCM.ArtificialIntelligence
    item: Dataset = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=term.name,
        segmented_property_category=_concept(hd, term.category),
        segmented_property_type=_concept(hd, term.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(name=name[:64], version=version, family=family),
        anatomic_regions=[_concept(hd, term.region)] if term.region else None,
        display_color=hd.color.CIELabColor(*lab_color(term.color or default_color(value))),
    )
    if term.side:
        item.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [_concept(hd, term.side)]
    return item


def _concept(hd: Any, code: Coded) -> Any:
    return hd.sr.CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)


def _source_images(source: SourceSeries) -> list[Dataset]:
    """Return the source images for highdicom, with geometry and UIDs only, slice by slice."""
    slices = source.series.slices
    references = source.references()
    if references[0][2] is None:
        images = [_source_image(source, sop_class, sop_uid) for sop_class, sop_uid, _ in references]
        for image, item in zip(images, slices, strict=True):
            image.ImagePositionPatient = list(item.plane.position or ())
            # That of the first slice: highdicom refuses differences by rounding.
            image.ImageOrientationPatient = list(slices[0].plane.orientation or ())
            _set_measures(image, source)
        return images
    image, (shared, measures, orientation) = _source_image(source, *references[0][:2]), _datasets(3)
    _set_measures(measures, source)
    orientation.ImageOrientationPatient = list(slices[0].plane.orientation or ())
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    image.SharedFunctionalGroupsSequence = [shared]
    image.NumberOfFrames = len(slices)
    image.PerFrameFunctionalGroupsSequence = _datasets(len(slices))
    for item, group in zip(slices, image.PerFrameFunctionalGroupsSequence, strict=True):
        group.PlanePositionSequence = _datasets(1)
        group.PlanePositionSequence[0].ImagePositionPatient = list(item.plane.position or ())
    return [image]


def _source_image(source: SourceSeries, sop_class: str, sop_uid: str) -> Dataset:
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = sop_class, sop_uid
    image.StudyInstanceUID, image.SeriesInstanceUID = source.study_uid, source.uid
    image.FrameOfReferenceUID = source.frame_of_reference
    image.Modality = source.series.modality or "OT"
    image.Columns, image.Rows = source.grid.shape[:2]
    for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if source.header.get(keyword):
            image[keyword] = source.header[keyword]
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(image, keyword, "")
    image.StudyDate = image.StudyTime = None
    return image


def _set_measures(item: Dataset, source: SourceSeries) -> None:
    between = round(source.grid.spacing[2], 6)
    item.PixelSpacing = list(source.series.slices[0].plane.spacing or ())
    item.SliceThickness = source.header.get("SliceThickness") or between
    item.SpacingBetweenSlices = between


def _datasets(count: int) -> list[Dataset]:
    return [Dataset() for _ in range(count)]


def _complete(dataset: Dataset, source: SourceSeries, uid: str, created: datetime) -> None:
    """Add the patient, and replace the random UIDs and dates of highdicom by reproducible ones."""
    add_patient_and_study(dataset, source)
    add_instance(dataset, _SEG, uid, created)
    dataset.ContentDate, dataset.ContentTime = dataset.InstanceCreationDate, dataset.InstanceCreationTime
    for item in dataset.ContributingEquipmentSequence:
        item.ContributionDateTime = f"{created:%Y%m%d%H%M%S}"
    _reference_frames(dataset, source.references())
    dimensions = derived_uid("dimensions", uid)
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    kinds = [item.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator for item in dataset.SegmentSequence]
    if OWN_SCHEME in kinds:
        dataset.CodingSchemeIdentificationSequence = _datasets(1)
        dataset.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator = OWN_SCHEME
        dataset.CodingSchemeIdentificationSequence[0].CodingSchemeName = "medseg: names of labels without a code"


def _reference_frames(dataset: Dataset, references: Sequence[tuple[str, str, int | None]]) -> None:
    """Set the references to frames of a multi-frame source; highdicom numbers the sorted slices instead."""
    # Frames of one slice share one item.
    items = {
        id(item): item
        for group in dataset.PerFrameFunctionalGroupsSequence
        for item in group.DerivationImageSequence[0].SourceImageSequence
        if "ReferencedFrameNumber" in item
    }
    for item in items.values():
        _, item.ReferencedSOPInstanceUID, item.ReferencedFrameNumber = references[int(item.ReferencedFrameNumber) - 1]
    if items:
        files = dict.fromkeys((sop_class, uid) for sop_class, uid, _ in references)
        instances = _datasets(len(files))
        for instance, file in zip(instances, files, strict=True):
            instance.ReferencedSOPClassUID, instance.ReferencedSOPInstanceUID = file
        dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence = instances


def _read(file: Path, max_voxels: int) -> Dataset:
    dataset = read_object(file, SEG_CLASSES, "a segmentation")
    frames = int(dataset.NumberOfFrames)
    described = len(dataset.get("PerFrameFunctionalGroupsSequence", []))
    if frames != described:
        raise CaseError(
            f"{file} is damaged: NumberOfFrames is {frames:,}, but it has {described:,} per-frame functional groups."
        )
    check_size((int(dataset.Columns), int(dataset.Rows), frames), file, max_voxels)
    return dataset


def _paint(
    painter: LabelPainter,
    grid: Grid,
    frames: Sequence[Frame],
    pixels: Pixels,
    values: Sequence[tuple[int, int]],
    file: Path,
) -> None:
    names = pixels.names
    regions = [find_region(painter.labels, grid, frame, file) for frame in frames]
    for frame in frames:
        found = pixels.numbers(frame.index) if frame.segment is None else {frame.segment}
        if not found <= set(names):
            raise CaseError(f"{file} is damaged: its frames have undescribed segments {sorted(found - set(names))}.")
    for number, value in values:
        for frame, region in zip(frames, regions, strict=True):
            if frame.segment in (None, number):
                painter.paint(region, pixels.inside(frame.index, number), value, names[number])
