"""Common parts of DICOM SEG and RT-STRUCT: source series, UIDs, patient and study, labels, storage.

UIDs are derived from content (a UUID of SHA-256 below the root 2.25), so the same mask on the same series is the same
object each time it is written, and an archive stores it once. Only the creation dates differ.

Patient and study attributes are copied from the source series to the object, as DICOM requires, and nowhere else: not
to messages, and not to libraries that log their input.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info, read_partial

from medseg.errors import CaseError, GeometryError, MedsegError, RequestError
from medseg.io.geometry import Grid
from medseg.notices import warn

if TYPE_CHECKING:
    from medseg.io.dicom import Series

__all__ = [
    "LabelKeys",
    "LabelPainter",
    "OnOverlap",
    "SourceSeries",
    "add_instance",
    "add_patient_and_study",
    "by_number",
    "check_mask",
    "check_same_frame",
    "choose_labels",
    "derived_uid",
    "digest",
    "lps_points",
    "open_source",
    "read_object",
    "reading",
    "voxel_points",
    "write_object",
]

logger = logging.getLogger(__name__)

SeriesLike: TypeAlias = "str | os.PathLike[str] | Series"
LabelKeys: TypeAlias = Mapping[str, int] | Mapping[int, int] | Mapping[str | int, int]
OnOverlap: TypeAlias = Literal["refuse", "later"]

_NAMESPACE = uuid.UUID("6f0d1a4e-3b0f-5d52-9a55-0f6f0a5c7c1e")
_UNSUPPORTED_SYNTAXES = ("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
_UNDEFINED_LENGTH = 0xFFFFFFFF
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Modules Patient, Clinical Trial Subject and Study, General Study, Patient Study: type 2 attributes, then the others.
_EMPTY_IF_MISSING = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID "
    "AccessionNumber"
)
_COPIED_IF_PRESENT = (
    "IssuerOfPatientID EthnicGroup PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence "
    "QualityControlSubject PatientAge PatientSize PatientWeight StudyDescription ClinicalTrialSponsorName "
    "ClinicalTrialProtocolID ClinicalTrialProtocolName ClinicalTrialSiteID ClinicalTrialSiteName "
    "ClinicalTrialSubjectID ClinicalTrialSubjectReadingID ClinicalTrialTimePointID TimezoneOffsetFromUTC"
)


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """The source series of a segmentation.

    Attributes:
        series: Images and geometry.
        uid: SeriesInstanceUID; this and the next two are derived from the UIDs of the images if missing, as after some
            de-identification.
        study_uid: StudyInstanceUID.
        frame_of_reference: FrameOfReferenceUID.
        header: Elements of the first image, without pixel data.
    """

    series: Series
    uid: str
    study_uid: str
    frame_of_reference: str
    header: Dataset

    @property
    def grid(self) -> Grid:
        """Voxel grid; the array axes are columns, rows, slices."""
        return self.series.grid

    def references(self) -> list[tuple[str, str, int | None]]:
        """Return SOP class UID, SOP instance UID and, for a multi-frame image, frame number of each slice."""
        several = len(self.series.files) < len(self.series.slices)
        return [
            (item.header.sop_class, item.header.sop_uid, item.plane.frame + 1 if several else None)
            for item in self.series.slices
        ]


def open_source(like: SeriesLike) -> SourceSeries:
    """Read the source series of a segmentation: a folder, file or archive, or an opened series.

    Raises:
        CaseError: The series cannot be read, or has no SOPInstanceUIDs to reference.
        GeometryError: The series has no valid geometry.
    """
    from medseg.io.dicom import open_series

    series = open_series(like) if isinstance(like, str | os.PathLike) else like
    first = series.files[0]
    if not series.has_geometry:
        raise GeometryError(
            f"{first} has no valid geometry: expected ImagePositionPatient and ImageOrientationPatient."
        )
    images = [item.header.sop_uid for item in series.slices]
    if not all(images):
        raise CaseError(
            f"{first} belongs to a series with images without SOPInstanceUID: a segmentation cannot reference them."
        )
    with reading(first):
        header: Dataset = next(series.headers())
        header.decode()
    uids = {"series": series.uid, "study": series.study_uid, "frame of reference": series.frame_of_reference}
    missing = [name for name, uid in uids.items() if not uid]
    if missing:
        text = f"no {' and '.join(missing)} UID; derived from the SOPInstanceUIDs of the images"
        warn(logger, "uid-derived", text, first)
    uid, study_uid, frame = (uid or derived_uid(name, *sorted(images)) for name, uid in uids.items())
    return SourceSeries(series, uid, study_uid, frame, header)


def derived_uid(*parts: object) -> str:
    """Return a UID derived from content; equal content gives equal UIDs."""
    text = "\n".join(str(part) for part in parts)
    return f"2.25.{uuid.uuid5(_NAMESPACE, hashlib.sha256(text.encode()).hexdigest()).int}"


def digest(array: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's type, shape and values, in hexadecimal, independent of its memory layout."""
    found = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    for part in array:
        found.update(np.ascontiguousarray(part).data)
    return found.hexdigest()


def check_mask(mask: NDArray[Any], labels: Mapping[int, Any], source: SourceSeries) -> NDArray[np.uint16]:
    """Return a label map as uint16, after checking that it matches the source and every value has a label.

    Raises:
        GeometryError: The shapes of mask and source differ.
        RequestError: No labels are given, or one for 0 or above 65535.
        CaseError: The mask has values without a label.
    """
    if not labels or any(not isinstance(value, int) or not 0 < value < 2**16 for value in labels):
        raise RequestError(f"Invalid label values {sorted(labels)}: expected one or more values from 1 to 65535.")
    if mask.shape != source.grid.shape:
        raise GeometryError(
            f"Geometry mismatch: the mask has shape {mask.shape}, but series {source.uid} has {source.grid.describe()}."
        )
    found = np.unique(mask)
    unknown = [value for value in found.tolist() if value != 0 and value not in labels]
    if unknown:
        shown = ", ".join(f"{value:g}" for value in unknown[:10])
        raise CaseError(f"The mask has values without a label: {shown}; expected 0 or one of {sorted(labels)}.")
    return mask.astype(np.uint16, copy=False)


def add_patient_and_study(target: Dataset, source: SourceSeries) -> None:
    """Copy the patient and study attributes; text is stored as UTF-8, so that all label names can be encoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would show values
        for keyword in f"{_EMPTY_IF_MISSING} {_COPIED_IF_PRESENT}".split():
            if keyword in source.header:
                target[keyword] = source.header[keyword]
            elif keyword in _EMPTY_IF_MISSING.split():
                setattr(target, keyword, "")
    target.StudyInstanceUID = source.study_uid
    target.SpecificCharacterSet = "ISO_IR 192"


def add_instance(target: Dataset, sop_class: str, uid: str, created: datetime) -> None:
    """Set the attributes for identification, equipment and creation time; each object is a separate series."""
    from medseg.version import __version__

    target.SOPClassUID, target.SOPInstanceUID = sop_class, uid
    target.SeriesInstanceUID = derived_uid("series", uid)
    target.InstanceCreationDate, target.InstanceCreationTime = f"{created:%Y%m%d}", f"{created:%H%M%S}"
    target.Manufacturer, target.ManufacturerModelName = "medseg", "medseg"
    target.SoftwareVersions, target.DeviceSerialNumber = __version__, "0"


def write_object(dataset: Dataset, path: Path) -> None:
    """Write an object as a DICOM file with preamble and meta information."""
    modern = int(pydicom.__version__.split(".")[0]) >= 3
    options: dict[str, Any] = {"enforce_file_format": True} if modern else {"write_like_original": False}
    if not modern:
        dataset.is_little_endian = True
        dataset.is_implicit_VR = dataset.file_meta.TransferSyntaxUID.is_implicit_VR
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would show values
        pydicom.dcmwrite(path, dataset, **options)


def read_object(file: Path, kinds: Collection[str], what: str) -> Dataset:
    """Read a DICOM object; must be called within `reading`.

    Args:
        file: File to read.
        kinds: Expected SOP class UIDs.
        what: Name of the expected objects, for messages.

    Raises:
        CaseError: The file is missing, has another SOP class or an unsupported transfer syntax: big endian, or
            deflated, whose unpacked size is unbounded.
    """
    if not file.is_file():
        raise CaseError(f"{file} does not exist, or is not a regular file: check the path.")
    meta = read_file_meta_info(file)
    if str(meta.get("TransferSyntaxUID", "")) in _UNSUPPORTED_SYNTAXES:
        raise CaseError(
            f"{file} has an unsupported transfer syntax (deflated or big endian): convert it, for instance with "
            "dcmconv +te."
        )
    dataset = _read_whole(file)
    kind = str(dataset.get("SOPClassUID", ""))
    if kind not in kinds:
        raise CaseError(f"{file} has the SOP class {kind or 'none'}: expected {what}, {min(kinds)}.")
    return dataset


@contextlib.contextmanager
def reading(source: object) -> Iterator[None]:
    """Convert all exceptions of pydicom on a damaged file to CaseErrors, without values of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would show values
            yield
    except MedsegError:
        raise
    except MemoryError as error:
        raise CaseError(f"{source} does not fit into memory: free memory, or use a machine with more.") from error
    except Exception as error:  # readers raise many types on damaged files, with values in their text
        raise CaseError(f"{source} {_damage(error)}: copy or export it again.") from error


def by_number(items: Iterable[Dataset], keyword: str, source: object) -> dict[int, Dataset]:
    """Return items by the number in their attribute `keyword`.

    Raises:
        CaseError: Several items have the same number.
    """
    numbered: dict[int, Dataset] = {}
    for item in items:
        number = int(getattr(item, keyword))
        if number in numbered:
            raise CaseError(f"{source} has several items with the {keyword} {number}: expected one. Export it again.")
        numbered[number] = item
    return numbered


def check_same_frame(found: str, source: SourceSeries, what: str) -> None:
    """Refuse an object whose frame of reference is not that of its series.

    Raises:
        GeometryError: The UIDs differ. A series without a frame of reference matches only objects written by medseg.
    """
    if found != source.frame_of_reference:
        own = source.series.frame_of_reference or "none"
        raise GeometryError(
            f"Geometry mismatch: {what} has frame of reference {found or 'none'}, series {source.uid} has {own}: their "
            "coordinates are unrelated. Give the series that it was drawn on."
        )


def choose_labels(
    names: Mapping[int, str], labels: LabelKeys | None, source: object, *, what: str, optional: Collection[str] = ()
) -> list[tuple[int, int]]:
    """Map the numbered segments or ROIs of a file to label values.

    Args:
        names: Number -> name of the segments or ROIs in the file.
        labels: Name (case-insensitive) or number -> label value, in the order of painting; None selects all, each with
            its number as the value. A number may be given as text if no name is equal to it; of several names with one
            value, one must be present.
        source: File, for messages.
        what: Name of the items in messages, such as "segment".
        optional: Names in `labels` that may be missing.

    Returns:
        Pairs of number and label value.

    Raises:
        CaseError: A name or number is missing from the file, or `labels` is empty.
        RequestError: A value is not in 1 to 2**31 - 1.
    """
    if labels is None:
        return [(number, number) for number in names if number > 0]
    listed = ", ".join(f"{number} '{name}'" for number, name in names.items()) or "none"
    if not labels:
        raise CaseError(
            f"{source}: no label values are given for its {what}s: {listed}. Map their names to values; in a data set, "
            "under 'labels' in dataset.json."
        )
    chosen: dict[int, int] = {}
    for key, value in labels.items():
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise RequestError(f"Invalid label value {value!r} for {what} {key!r}: expected 1 to {2**31 - 1}.")
        chosen.update(dict.fromkeys(_numbers(key, names), value))
    for key, value in labels.items():
        if value not in chosen.values() and key not in optional:
            raise CaseError(f"{source} has no {what} {key!r}: it has {listed}.")
    return list(chosen.items())


class LabelPainter:
    """A label map that is painted region by region and records overlaps of different labels.

    Args:
        shape: Number of voxels along each axis.
        on_overlap: Rule for overlapping labels: "refuse" them (see `finish`), or the "later" one wins.
    """

    def __init__(self, shape: Sequence[int], on_overlap: OnOverlap) -> None:
        if on_overlap not in ("refuse", "later"):
            raise RequestError(f"Invalid on_overlap {on_overlap!r}: expected 'refuse' or 'later'.")
        self.labels: NDArray[np.int32] = np.zeros(tuple(shape), dtype=np.int32)
        self._refuse = on_overlap == "refuse"
        self._names: dict[int, str] = {}
        self._met: dict[tuple[str, str], int] = {}

    def paint(self, region: NDArray[np.int32], inside: NDArray[np.bool_], value: int, name: str) -> None:
        """Set `value` in a region (a view of `labels`) where the mask `inside` of the same shape is true."""
        self._names.setdefault(value, name)
        if self._refuse:
            under = region[inside]
            others, counts = np.unique(under[(under != 0) & (under != value)], return_counts=True)
            for other, count in zip(others, counts, strict=True):
                pair = (self._names[int(other)], name)
                self._met[pair] = self._met.get(pair, 0) + int(count)
        region[inside] = value

    def finish(self, source: object) -> NDArray[np.int32]:
        """Return the label map.

        Raises:
            CaseError: Different labels overlap, and `on_overlap` is "refuse".
        """
        if self._met:
            pairs = "; ".join(f"'{a}' and '{b}' in {count:,} voxels" for (a, b), count in self._met.items())
            raise CaseError(
                f"{source} has overlapping labels, which a label map cannot store: {pairs}. Select labels that do not "
                "overlap, or give their order and on_overlap='later'."
            )
        return self.labels


def lps_points(affine: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert voxel indices `(N, 3)` to LPS+ mm, the coordinates of DICOM."""
    matrix = _LPS @ affine
    moved: NDArray[np.float64] = points @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def voxel_points(affine: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert LPS+ mm `(N, 3)` to voxel indices, the inverse of `lps_points`."""
    matrix = np.linalg.inv(_LPS @ affine)
    moved: NDArray[np.float64] = points @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def _numbers(key: str | int, names: Mapping[int, str]) -> list[int]:
    """Return the numbers that a key selects: by name, or, if no name is equal, by number."""
    text = str(key).strip().casefold()
    named = [number for number, name in names.items() if isinstance(key, str) and name.strip().casefold() == text]
    return named or [number for number in names if str(number) == text]


def _read_whole(file: Path) -> Dataset:
    """Parse a file and refuse truncated ones, of which pydicom would return what is there."""
    size = file.stat().st_size

    def refuse_beyond_end(tag: int, _representation: str | None, length: int) -> bool:
        missing = stream.tell() + length - size if length != _UNDEFINED_LENGTH else 0
        if missing > 0:
            raise CaseError(f"{file} is truncated: {missing:,} bytes of element {tag:08X} are missing. Copy it again.")
        return False

    with file.open("rb") as stream:
        return read_partial(stream, stop_when=refuse_beyond_end)


def _damage(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    missing = getattr(error, "name", None) if isinstance(error, AttributeError) else None
    return f"is damaged or not a complete DICOM object ({f'no {missing}' if missing else type(error).__name__})"
