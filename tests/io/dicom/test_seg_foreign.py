"""SEG objects as other programs write them: without what the standard requires but their place on the grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medseg.errors import GeometryError
from medseg.io.dicom.seg import read_seg, write_seg
from tests.io.dicom.conftest import LABELS, edited, random_mask

VALUES = dict(enumerate(LABELS, start=1))


def _without(*names: str) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        for name in names:
            delattr(dataset, name)

    return change


def _segments_without(*names: str) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        for item in dataset.SegmentSequence:
            _without(*names)(item)

    return change


def _frames_without(name: str) -> Callable[[Dataset], None]:
    def change(dataset: Dataset) -> None:
        for frame in dataset.PerFrameFunctionalGroupsSequence:
            delattr(frame, name)

    return change


def _thickness_unknown(dataset: Dataset) -> None:
    _without("SliceThickness", "SpacingBetweenSlices")(
        dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    )


def _rounded_positions(dataset: Dataset) -> None:
    for index, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        place = frame.PlanePositionSequence[0]
        place.ImagePositionPatient = [value + (-1) ** index * 0.02 for value in place.ImagePositionPatient]


def _a_byte_per_voxel(dataset: Dataset) -> None:
    count = int(dataset.NumberOfFrames) * dataset.Rows * dataset.Columns
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")[:count]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = bits.tobytes() + b"\0" * (count % 2)


FOREIGN: dict[str, Callable[[Dataset], None]] = {
    "no dimension index": _without("DimensionIndexSequence", "DimensionOrganizationSequence"),
    "no frame content": _frames_without("FrameContentSequence"),
    "no source images": _frames_without("DerivationImageSequence"),
    "no referenced series": _without("ReferencedSeriesSequence"),
    "no thickness": _thickness_unknown,
    "rounded positions": _rounded_positions,
    "a byte per voxel": _a_byte_per_voxel,
    "no algorithm": _segments_without("SegmentAlgorithmType"),
    "no codes": _segments_without("SegmentedPropertyTypeCodeSequence", "SegmentedPropertyCategoryCodeSequence"),
    "no segment label": _segments_without("SegmentLabel"),
    "no study": _without("StudyInstanceUID"),
    "no pixel description": _without("SamplesPerPixel", "PixelRepresentation", "PhotometricInterpretation"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_other_programs_leave_out_does_not_keep_a_mask_from_its_series(
    name: str, write_series: Callable[..., Any], tmp_path: Path
) -> None:
    source = write_series(tmp_path / "ct", shape=(8, 6, 6))
    mask = random_mask(source.values.shape)
    path = write_seg(mask, tmp_path / "seg.dcm", source.folder, labels=LABELS)
    found, _ = read_seg(edited(path, FOREIGN[name]), like=source.folder, labels=VALUES)
    assert np.array_equal(found, mask)


def test_an_object_without_a_frame_of_reference_is_read_alone_only(
    write_series: Callable[..., Any], tmp_path: Path
) -> None:
    source = write_series(tmp_path / "ct", shape=(8, 6, 6))
    mask = random_mask(source.values.shape)
    path = edited(write_seg(mask, tmp_path / "seg.dcm", source.folder, labels=LABELS), _without("FrameOfReferenceUID"))
    assert np.array_equal(np.bincount(read_seg(path, labels=VALUES)[0].ravel())[1:], np.bincount(mask.ravel())[1:])
    with pytest.raises(GeometryError, match="frame of reference"):
        read_seg(path, like=source.folder)
