"""What DICOM segmentations and structure sets share: source series, UIDs, patient, labels, and storage.

UIDs are derived from content (a UUID of SHA-256 below the root 2.25), so the same mask on the same series is the same
object, however often it is written, and an archive that gets it twice keeps one. Only the dates of creation differ.

What belongs to the patient and the study goes from the source series into the object, as DICOM demands, and nowhere
else: not into messages, and not through libraries that log what they are given.
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
_NOT_READ = ("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
_UNDEFINED_LENGTH = 0xFFFFFFFF
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Modules Patient, Clinical Trial Subject and Study, General Study and Patient Study; these may be empty, not missing.
_EMPTY_IF_MISSING = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID "
    "AccessionNumber"
)
_IF_THERE = (
    "IssuerOfPatientID EthnicGroup PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence "
    "QualityControlSubject PatientAge PatientSize PatientWeight StudyDescription ClinicalTrialSponsorName "
    "ClinicalTrialProtocolID ClinicalTrialProtocolName ClinicalTrialSiteID ClinicalTrialSiteName "
    "ClinicalTrialSubjectID ClinicalTrialSubjectReadingID ClinicalTrialTimePointID TimezoneOffsetFromUTC"
)


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """The series that a segmentation is made from.

    Attributes:
        series: its images and their places.
        uid: Series Instance UID; this and the next two are derived from the UIDs of the images where these do not tell
            them, as after some anonymization.
        study_uid: Study Instance UID.
        frame_of_reference: Frame of Reference UID.
        header: the elements of its first image, without the pixels.
    """

    series: Series
    uid: str
    study_uid: str
    frame_of_reference: str
    header: Dataset

    @property
    def grid(self) -> Grid:
        """Where its voxels lie; the array axes are columns, rows, slices."""
        return self.series.grid

    def references(self) -> list[tuple[str, str, int | None]]:
        """Return kind of image, its UID, and for a multi-frame image the number of the frame, slice by slice."""
        several = len(self.series.files) < len(self.series.slices)
        return [
            (item.header.sop_class, item.header.sop_uid, item.plane.frame + 1 if several else None)
            for item in self.series.slices
        ]


def open_source(like: SeriesLike) -> SourceSeries:
    """Read what a segmentation has to know about its source: a folder, file or archive, or an opened series.

    Raises:
        CaseError: it cannot be read, or has no UIDs to refer to.
        GeometryError: its place in space is undefined.
    """
    from medseg.io.dicom import open_series

    series = open_series(like) if isinstance(like, str | os.PathLike) else like
    first = series.files[0]
    if not series.has_geometry:
        raise GeometryError(f"{first} does not say where it lies in space: expected a position and axes.")
    images = [item.header.sop_uid for item in series.slices]
    if not all(images):
        raise CaseError(
            f"{first} belongs to a series of which images have no SOPInstanceUID: nothing can refer to them."
        )
    with reading(first):
        header: Dataset = next(series.headers())
        header.decode()
    told = {"series": series.uid, "study": series.study_uid, "frame of reference": series.frame_of_reference}
    missing = [name for name, uid in told.items() if not uid]
    if missing:
        text = f"no UID of the {' and '.join(missing)}; derived from the SOPInstanceUIDs of the images"
        warn(logger, "uid-derived", text, first)
    uid, study_uid, frame = (uid or derived_uid(name, *sorted(images)) for name, uid in told.items())
    return SourceSeries(series, uid, study_uid, frame, header)


def derived_uid(*parts: object) -> str:
    """Return the UID that belongs to some content, always the same for the same."""
    text = "\n".join(str(part) for part in parts)
    return f"2.25.{uuid.uuid5(_NAMESPACE, hashlib.sha256(text.encode()).hexdigest()).int}"


def digest(array: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's type, shape and values, in hexadecimal, whatever its layout in memory."""
    found = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    for part in array:
        found.update(np.ascontiguousarray(part).data)
    return found.hexdigest()


def check_mask(mask: NDArray[Any], labels: Mapping[int, Any], source: SourceSeries) -> NDArray[np.uint16]:
    """Return a label map as whole numbers, after checking that it lies on the source and each value has a label.

    Raises:
        GeometryError: its shape is not that of the source.
        RequestError: no labels are given, or one for 0 or above 65535.
        CaseError: the mask holds other values than the labels.
    """
    if not labels or any(not isinstance(value, int) or not 0 < value < 2**16 for value in labels):
        raise RequestError(f"Labels are given for {sorted(labels)}: expected one or more values from 1 to 65535.")
    if mask.shape != source.grid.shape:
        raise GeometryError(
            f"The mask has the shape {mask.shape}, but series {source.uid} has {source.grid.describe()}: they "
            "must lie voxel on voxel."
        )
    found = np.unique(mask)
    unknown = [value for value in found.tolist() if value != 0 and value not in labels]
    if unknown:
        shown = ", ".join(f"{value:g}" for value in unknown[:10])
        raise CaseError(f"The mask holds {shown}, for which no label is given: expected 0 or one of {sorted(labels)}.")
    return mask.astype(np.uint16, copy=False)


def add_patient_and_study(target: Dataset, source: SourceSeries) -> None:
    """Copy what belongs to the patient and the study; text is stored as UTF-8, so any label name fits beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would show values
        for keyword in f"{_EMPTY_IF_MISSING} {_IF_THERE}".split():
            if keyword in source.header:
                target[keyword] = source.header[keyword]
            elif keyword in _EMPTY_IF_MISSING.split():
                setattr(target, keyword, "")
    target.StudyInstanceUID = source.study_uid
    target.SpecificCharacterSet = "ISO_IR 192"


def add_instance(target: Dataset, sop_class: str, uid: str, created: datetime) -> None:
    """Set what identifies an object, and says who made it and when; each object is a series of its own."""
    from medseg.version import __version__

    target.SOPClassUID, target.SOPInstanceUID = sop_class, uid
    target.SeriesInstanceUID = derived_uid("series", uid)
    target.InstanceCreationDate, target.InstanceCreationTime = f"{created:%Y%m%d}", f"{created:%H%M%S}"
    target.Manufacturer, target.ManufacturerModelName = "medseg", "medseg"
    target.SoftwareVersions, target.DeviceSerialNumber = __version__, "0"


def write_object(dataset: Dataset, path: Path) -> None:
    """Write an object to a path, as a DICOM file with preamble and meta information."""
    modern = int(pydicom.__version__.split(".")[0]) >= 3
    options: dict[str, Any] = {"enforce_file_format": True} if modern else {"write_like_original": False}
    if not modern:
        dataset.is_little_endian = True
        dataset.is_implicit_VR = dataset.file_meta.TransferSyntaxUID.is_implicit_VR
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would show values
        pydicom.dcmwrite(path, dataset, **options)


def read_object(file: Path, kinds: Collection[str], what: str) -> Dataset:
    """Read a DICOM object; to be called within `reading`.

    Args:
        file: the file.
        kinds: the SOP classes that are expected.
        what: what they are called.

    Raises:
        CaseError: the file is missing, of another kind, or stored in a way that is not read: big-endian, or deflated,
            which could unpack to any size.
    """
    if not file.is_file():
        raise CaseError(f"{file} does not exist, or is no file: check the path.")
    meta = read_file_meta_info(file)
    if str(meta.get("TransferSyntaxUID", "")) in _NOT_READ:
        raise CaseError(f"{file} is stored deflated or big-endian: convert it, for instance by dcmconv +te.")
    dataset = _read_whole(file)
    kind = str(dataset.get("SOPClassUID", ""))
    if kind not in kinds:
        raise CaseError(f"{file} is a DICOM object of the kind {kind or 'none'}: expected {what}, {min(kinds)}.")
    return dataset


@contextlib.contextmanager
def reading(source: object) -> Iterator[None]:
    """Turn whatever pydicom raises on a damaged file into a CaseError, without values of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would show values
            yield
    except MedsegError:
        raise
    except MemoryError as error:
        raise CaseError(f"{source} does not fit into memory.") from error
    except Exception as error:  # readers raise many types on damaged files, with values in their text
        raise CaseError(f"{source} {_damage(error)}: copy or export it again.") from error


def by_number(items: Iterable[Dataset], keyword: str, source: object) -> dict[int, Dataset]:
    """Return items by the number that each has under a keyword.

    Raises:
        CaseError: several have one number, so that nothing says which of them counts.
    """
    numbered: dict[int, Dataset] = {}
    for item in items:
        number = int(getattr(item, keyword))
        if number in numbered:
            raise CaseError(f"{source} has several items with the {keyword} {number}: expected one. Export it again.")
        numbered[number] = item
    return numbered


def check_same_frame(found: str, source: SourceSeries, what: str) -> None:
    """Refuse an object that is placed in another frame of reference than the series it is read for.

    Raises:
        GeometryError: the UIDs differ. A series without a frame of reference matches only objects of ours.
    """
    if found != source.frame_of_reference:
        own = source.series.frame_of_reference or "none"
        raise GeometryError(
            f"{what} lies in frame of reference {found or 'none'}, series {source.uid} in {own}: their "
            "coordinates have nothing to do with each other. Give the series that it was drawn on."
        )


def choose_labels(
    names: Mapping[int, str], labels: LabelKeys | None, source: object, *, what: str, optional: Collection[str] = ()
) -> list[tuple[int, int]]:
    """Choose which numbered things become which values.

    Args:
        names: number -> name of what the file holds.
        labels: name (in any case) or number -> value, in the order of painting; None takes all, each with its number.
            A name that no thing has may be its number as text; of several names of one value, one must be there.
        source: the file, for messages.
        what: what the things are called, such as "segment".
        optional: names of `labels` that may be missing.

    Returns:
        Pairs of number and value.

    Raises:
        CaseError: a name or number is not in the file, or `labels` are empty.
        RequestError: a value is not in 1 to 2**31 - 1.
    """
    if labels is None:
        return [(number, number) for number in names if number > 0]
    listed = ", ".join(f"{number} '{name}'" for number, name in names.items()) or "none"
    if not labels:
        raise CaseError(
            f"{source}: nothing says which value each {what} is to become. It has {listed}. Name those that count; in "
            "a data set under 'labels' of its dataset.json."
        )
    chosen: dict[int, int] = {}
    for key, value in labels.items():
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise RequestError(f"{what.capitalize()} {key!r} is to become {value!r}: expected 1 to {2**31 - 1}.")
        chosen.update(dict.fromkeys(_numbers(key, names), value))
    for key, value in labels.items():
        if value not in chosen.values() and key not in optional:
            raise CaseError(f"{source} has no {what} {key!r}: it has {listed}.")
    return list(chosen.items())


class LabelPainter:
    """A label map that is painted region by region, and knows where different labels met.

    Args:
        shape: voxels along each axis.
        on_overlap: "refuse" (see `finish`) or "later", where the label painted later wins.
    """

    def __init__(self, shape: Sequence[int], on_overlap: OnOverlap) -> None:
        if on_overlap not in ("refuse", "later"):
            raise RequestError(f"on_overlap is {on_overlap!r}: expected 'refuse' or 'later'.")
        self.labels: NDArray[np.int32] = np.zeros(tuple(shape), dtype=np.int32)
        self._refuse = on_overlap == "refuse"
        self._names: dict[int, str] = {}
        self._met: dict[tuple[str, str], int] = {}

    def paint(self, region: NDArray[np.int32], inside: NDArray[np.bool_], value: int, name: str) -> None:
        """Set `value` in a region (a view of `labels`) where `inside`, of the same shape, is true."""
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
            CaseError: different labels overlap, and that was to be refused.
        """
        if self._met:
            pairs = "; ".join(f"'{a}' and '{b}' in {count:,} voxels" for (a, b), count in self._met.items())
            raise CaseError(
                f"{source} has labels that overlap, which one label map cannot hold: {pairs}. Choose labels that do "
                "not overlap, or give their order and on_overlap='later'."
            )
        return self.labels


def lps_points(affine: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return voxel indices `(N, 3)` as mm of DICOM's axes (left, posterior, superior)."""
    matrix = _LPS @ affine
    placed: NDArray[np.float64] = points @ matrix[:3, :3].T + matrix[:3, 3]
    return placed


def voxel_points(affine: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return mm of DICOM's axes `(N, 3)` as voxel indices, the inverse of `lps_points`."""
    matrix = np.linalg.inv(_LPS @ affine)
    placed: NDArray[np.float64] = points @ matrix[:3, :3].T + matrix[:3, 3]
    return placed


def _numbers(key: str | int, names: Mapping[int, str]) -> list[int]:
    """Return the numbers of the things that a key means: by name, and only if no name is equal, by number."""
    text = str(key).strip().casefold()
    named = [number for number, name in names.items() if isinstance(key, str) and name.strip().casefold() == text]
    return named or [number for number in names if str(number) == text]


def _read_whole(file: Path) -> Dataset:
    """Parse a file; pydicom alone takes what there is of one that is cut short, and memory for what it claims."""
    size = file.stat().st_size

    def refuse_beyond_end(tag: int, _representation: str | None, length: int) -> bool:
        missing = stream.tell() + length - size if length != _UNDEFINED_LENGTH else 0
        if missing > 0:
            raise CaseError(f"{file} is cut short: {missing:,} bytes of element {tag:08X} are missing. Copy it again.")
        return False

    with file.open("rb") as stream:
        return read_partial(stream, stop_when=refuse_beyond_end)


def _damage(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    missing = getattr(error, "name", None) if isinstance(error, AttributeError) else None
    return f"is damaged or no complete DICOM object ({f'no {missing}' if missing else type(error).__name__})"
