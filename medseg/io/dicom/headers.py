"""Headers of DICOM files: geometry and pixel format, without the pixels.

Nothing that identifies a patient is kept; messages contain only numbers, modalities and UIDs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Final, cast

from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from medseg.errors import CaseError
from medseg.io.dicom.sources import Source, quiet, streams

__all__ = ["Header", "Plane", "read_headers"]

# Attributes that distinguish images at the same position, in order of preference.
_DISCRIMINATORS: Final = (
    *("StackID", "TemporalPositionIdentifier", "TemporalPositionIndex", "EchoNumbers", "EchoTime", "EffectiveEchoTime"),
    *("InversionTime", "DiffusionBValue", "DiffusionGradientOrientation", "TriggerTime"),
    *("NominalCardiacTriggerDelayTime", "ImageType", "FrameType", "AcquisitionNumber", "FrameAcquisitionNumber"),
    *("ConvolutionKernel", "AcquisitionTime", "AcquisitionDateTime", "ContentTime"),
)
# Functional groups in which enhanced objects store, shared or per frame, attributes of classic objects.
_GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "ImagePositionPatient": ("PlanePositionSequence",),
    "ImageOrientationPatient": ("PlaneOrientationSequence",),
    "PixelSpacing": ("PixelMeasuresSequence",),
    "SliceThickness": ("PixelMeasuresSequence",),
    "SpacingBetweenSlices": ("PixelMeasuresSequence",),
    "RescaleSlope": ("PixelValueTransformationSequence",),
    "RescaleIntercept": ("PixelValueTransformationSequence",),
    "StackID": ("FrameContentSequence",),
    "TemporalPositionIndex": ("FrameContentSequence",),
    "FrameAcquisitionNumber": ("FrameContentSequence",),
    "EffectiveEchoTime": ("MREchoSequence",),
    "DiffusionBValue": ("MRDiffusionSequence",),
    "NominalCardiacTriggerDelayTime": ("CardiacSynchronizationSequence",),
    "FrameType": ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"),
}
_TOP: Final = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("SeriesNumber", "SeriesDescription", "InstanceNumber", "ImageType", "Rows", "Columns", "SamplesPerPixel"),
    *("PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("RescaleSlope", "RescaleIntercept"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
_TAGS: Final[tuple[BaseTag | int, ...]] = tuple(Tag(keyword) for keyword in dict.fromkeys((*_TOP, *_DISCRIMINATORS)))
_PIXEL_DATA: Final = 0x7FE00010
_UNDEFINED_LENGTH: Final = 0xFFFFFFFF
_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
# Implicit and explicit little endian, big endian, deflated; all others have compressed frames.
_NATIVE: Final = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", _DEFLATED)
_MAX_INFLATED: Final = 1 << 30
# No lossless compression of a large image has a higher ratio than this; the header must be wrong.
_MAX_PACKING: Final = 10_000
_PACKING_FROM: Final = 1 << 26
# Objects without intensities, although some have rows and columns, by SOP class or prefix of it.
_NO_IMAGES: Final[Mapping[str, str]] = {
    "1.2.840.10008.1.3.10": "a DICOMDIR, which lists other files",
    "1.2.840.10008.5.1.4.1.1.66.4": "a Segmentation object",
    "1.2.840.10008.5.1.4.1.1.66.7": "a Label Map Segmentation object",
    "1.2.840.10008.5.1.4.1.1.66": "an object of raw data, a registration or surfaces",
    "1.2.840.10008.5.1.4.1.1.481.2": "an RT Dose object",
    "1.2.840.10008.5.1.4.1.1.481.3": "an RT Structure Set object",
    "1.2.840.10008.5.1.4.1.1.481.5": "an RT Plan object",
    "1.2.840.10008.5.1.4.1.1.88": "a Structured Report",
    "1.2.840.10008.5.1.4.1.1.11": "a Presentation State",
    "1.2.840.10008.5.1.4.1.1.104": "an encapsulated document",
    "1.2.840.10008.5.1.4.1.1.30": "a Parametric Map object",
    "1.2.840.10008.5.1.4.1.1.4.2": "MR spectroscopy",
    "1.2.840.10008.5.1.4.1.1.9": "a waveform",
    "1.2.840.10008.5.1.4.1.1.77.1.6": "a whole-slide image, which needs a bundle for 2D color images",
}
_MODALITIES: Final = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "FID", "RWV")


@dataclass(frozen=True)
class Plane:
    """One frame of an image.

    Attributes:
        frame: Index of the frame in the file, from 0.
        position: Center of the first pixel, LPS+ mm (ImagePositionPatient); None if missing.
        orientation: Unit vectors along a row and along a column, LPS+, six numbers (ImageOrientationPatient); None if
            missing.
        spacing: Distance between rows and between columns in mm (PixelSpacing); None if missing.
        thickness: SpacingBetweenSlices, else SliceThickness, in mm; None without either.
        slope: Scale factor of the stored values.
        inter: Offset added after scaling.
        discriminators: Name and value of the attributes that may distinguish it from images at the same position.
    """

    frame: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float | None
    slope: float
    inter: float
    discriminators: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Header:
    """Header of one DICOM file.

    Attributes:
        source: Source of the file.
        series_uid: SeriesInstanceUID; missing texts are empty.
        study_uid: StudyInstanceUID.
        sop_class: SOPClassUID.
        sop_uid: SOPInstanceUID.
        frame_of_reference: FrameOfReferenceUID.
        modality: Modality, such as "CT".
        number: SeriesNumber.
        instance: InstanceNumber; None if missing.
        description: SeriesDescription, which may identify a person and must not appear in messages.
        syntax: TransferSyntaxUID.
        image_type: ImageType, in upper case.
        localizer: Whether it is a localizer (scout) image, by its ImageType.
        rows: Number of rows.
        columns: Number of columns.
        samples: SamplesPerPixel.
        photometric: PhotometricInterpretation, such as "MONOCHROME2".
        bits_allocated: BitsAllocated.
        bits_stored: BitsStored.
        high_bit: HighBit.
        signed: Whether stored values are two's complement (PixelRepresentation).
        planes: Frames, in the order of the file.
        other: Kind of object if it is not an image, such as "an RT Dose object"; empty for an image.
        damage: Fault of the file as a phrase; empty for a valid file.
    """

    source: Source
    series_uid: str = ""
    study_uid: str = ""
    sop_class: str = ""
    sop_uid: str = ""
    frame_of_reference: str = ""
    modality: str = ""
    number: str = ""
    instance: int | None = None
    description: str = ""
    syntax: str = ""
    image_type: tuple[str, ...] = ()
    localizer: bool = False
    rows: int = 0
    columns: int = 0
    samples: int = 1
    photometric: str = ""
    bits_allocated: int = 0
    bits_stored: int = 0
    high_bit: int = 0
    signed: bool = False
    planes: tuple[Plane, ...] = ()
    other: str = ""
    damage: str = ""


class _DamageError(Exception):
    """An invalid header; the message describes the fault."""


# Listing, reading and writing all need the headers of a folder; a key changes when its file does.
_known: dict[Source, Header] = {}
_MAX_KNOWN: Final = 10_000


def read_headers(sources: Iterable[Source]) -> list[Header]:
    """Read the headers of files, in order; damage is recorded in each header, not raised."""
    sources = list(sources)
    if len(_known) + len(sources) > _MAX_KNOWN:
        _known.clear()
    found = {source: _known[source] for source in sources if source in _known}
    for source, stream in streams(source for source in sources if source not in found):
        found[source] = _known[source] = _read(source, stream)
    return [found[source] for source in sources]


def _read(source: Source, stream: BinaryIO) -> Header:
    header = Header(source)
    try:
        with quiet():
            content, length = _content(stream, source)
            header = _described(header, content)
            if header.other:
                return header
            header = _sized(header, content)
            _check_length(header, content, length, source)
            return replace(header, planes=_planes(content))
    except (_DamageError, CaseError) as error:
        return replace(header, damage=str(error))
    except Exception as error:  # parsing a damaged file raises many types, whose messages may quote the file
        return replace(header, damage=f"its header cannot be parsed ({type(error).__name__})")


def _content(stream: BinaryIO, source: Source) -> tuple[Dataset, int]:
    """Parse up to the pixel data; return the required elements and the size of the pixel data, 0 without any.

    For compressed frames the size is the rest of the file.
    """
    length = start = 0

    def at_pixels(tag: int, _representation: str | None, claimed: int) -> bool:
        nonlocal length, start
        if tag == _PIXEL_DATA:
            length, start = claimed, stream.tell()
        return tag >= _PIXEL_DATA

    bounded = cast("BinaryIO", _Bounded(stream))
    content = read_partial(bounded, stop_when=at_pixels, force=True, specific_tags=list(_TAGS))
    if length and _syntax(content) != _DEFLATED:
        rest = max(0, source.size - start)
        length = rest if length == _UNDEFINED_LENGTH else min(length, rest)
    return content, length


class _Bounded:
    """A stream that refuses to be read to its end if that inflates to more than 1 GiB, as the parser would do."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read(self, size: int = -1) -> bytes:
        found = self._stream.read(size)
        if size < 0:
            _refuse_large_deflate(found)
        return found


def _refuse_large_deflate(packed: bytes) -> None:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    while packed and not inflater.eof and size <= _MAX_INFLATED:
        size += len(inflater.decompress(packed, 1 << 20))
        packed = inflater.unconsumed_tail
    if size > _MAX_INFLATED:
        raise _DamageError(f"its deflated content unpacks to more than {_MAX_INFLATED:,} bytes")


def _syntax(content: Dataset) -> str:
    meta = getattr(content, "file_meta", None)
    return str((meta.get("TransferSyntaxUID") if meta is not None else None) or "")


def _described(header: Header, content: Dataset) -> Header:
    """Add the attributes of the series, and the kind of object."""
    sop_class, modality = _text(content, "SOPClassUID"), _text(content, "Modality")
    meta = getattr(content, "file_meta", None) or Dataset()
    image_type = tuple(part.strip() for part in _text(content, "ImageType").upper().split("\\"))
    header = replace(
        header,
        series_uid=_text(content, "SeriesInstanceUID"),
        study_uid=_text(content, "StudyInstanceUID"),
        sop_class=sop_class or _text(meta, "MediaStorageSOPClassUID"),
        sop_uid=_text(content, "SOPInstanceUID") or _text(meta, "MediaStorageSOPInstanceUID"),
        frame_of_reference=_text(content, "FrameOfReferenceUID"),
        modality=modality,
        number=_text(content, "SeriesNumber"),
        description=_text(content, "SeriesDescription"),
        syntax=_syntax(content),
        image_type=image_type,
        localizer=any("LOCALIZER" in part for part in image_type),
    )
    return replace(header, other=_other(header, has_rows="Rows" in content))


def _other(header: Header, *, has_rows: bool) -> str:
    parts = header.sop_class.split(".")
    for end in range(len(parts), 6, -1):
        found = _NO_IMAGES.get(".".join(parts[:end]))
        if found:
            return found
    if header.modality in _MODALITIES:
        return f"an object of modality {header.modality}"
    # Without a SOP class it may be a truncated image, which must not be ignored.
    name = UID(header.sop_class).name if header.sop_class else "Image"
    return "" if has_rows or "Image" in name else name


def _sized(header: Header, content: Dataset) -> Header:
    """Add the attributes of the pixels."""
    if "MOSAIC" in header.image_type:
        raise _DamageError(
            "it is a mosaic of slices in one image, whose geometry is only in private elements (dcm2niix converts it)"
        )
    allocated = _whole(content, "BitsAllocated")
    stored = _whole(content, "BitsStored", allocated)
    header = replace(
        header,
        instance=_whole(content, "InstanceNumber") if _text(content, "InstanceNumber") else None,
        rows=_whole(content, "Rows"),
        columns=_whole(content, "Columns"),
        samples=_whole(content, "SamplesPerPixel", 1),
        photometric=_text(content, "PhotometricInterpretation").upper(),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=_whole(content, "HighBit", stored - 1),
        signed=_whole(content, "PixelRepresentation", 0) == 1,
    )
    if min(header.rows, header.columns) < 1 or header.samples not in (1, 3):
        raise _DamageError(
            f"it has invalid dimensions: {header.rows} rows, {header.columns} columns, {header.samples} samples per "
            "pixel"
        )
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or not stored - 1 <= header.high_bit < allocated:
        raise _DamageError(
            f"it has an invalid pixel format: BitsAllocated {allocated} (expected 8, 16 or 32), BitsStored {stored}, "
            f"HighBit {header.high_bit}"
        )
    return header


def _check_length(header: Header, content: Dataset, length: int, source: Source) -> None:
    """Compare the size of the pixel data with the header, before memory is allocated."""
    frames = _whole(content, "NumberOfFrames", 1)
    if frames < 1:
        raise _DamageError(f"it has an invalid NumberOfFrames: {frames}")
    claimed = frames * header.rows * header.columns * header.samples * header.bits_allocated // 8
    if header.photometric == "YBR_FULL_422":
        claimed = claimed * 2 // 3
    shape = f"{frames} x {header.rows} x {header.columns} pixels"
    if not length:
        raise _DamageError(f"it has no pixel data, or is truncated: expected {shape}")
    if header.syntax not in _NATIVE:
        # Each frame has an item header of 8 bytes.
        if frames * 8 > length or (claimed > _PACKING_FROM and claimed > length * _MAX_PACKING):
            raise _DamageError(f"its pixel data is implausibly small: {shape} in {length:,} compressed bytes")
    elif length < claimed:
        raise _DamageError(
            f"its pixel data is truncated: {shape} need {claimed:,} bytes, {claimed - length:,} are missing"
        )


def _planes(content: Dataset) -> tuple[Plane, ...]:
    frames = _whole(content, "NumberOfFrames", 1)
    groups = list(content.get("PerFrameFunctionalGroupsSequence") or [])
    if not groups and frames == 1:
        return (_plane(0, content.get),)
    if not groups:
        raise _DamageError(f"it has {frames} frames without geometry (no per-frame functional groups)")
    if len(groups) != frames:
        raise _DamageError(f"it has {frames} frames, but {len(groups)} per-frame functional groups")
    shared = list(content.get("SharedFunctionalGroupsSequence") or [])
    return tuple(_plane(frame, _getter(group, shared, content)) for frame, group in enumerate(groups))


def _getter(group: Dataset, shared: list[Dataset], content: Dataset) -> Callable[[str], Any]:
    """Return a lookup for one frame: per-frame groups, then shared groups; top level for attributes without group."""

    def get(keyword: str) -> Any:
        for sequence in _GROUPS.get(keyword, ()):
            for item in (group, *shared):
                found = list(item.get(sequence) or [])
                if found and keyword in found[0]:
                    return found[0].get(keyword)
        return None if keyword in _GROUPS else content.get(keyword)

    return get


def _plane(frame: int, get: Callable[[str], Any]) -> Plane:
    position = _numbers(get, "ImagePositionPatient", 3)
    orientation = _numbers(get, "ImageOrientationPatient", 6)
    depths = (_numbers(get, keyword, 1) or (0.0,) for keyword in ("SpacingBetweenSlices", "SliceThickness"))
    slope, inter = _numbers(get, "RescaleSlope", 1), _numbers(get, "RescaleIntercept", 1)
    discriminators = ((name, str(get(name))) for name in _DISCRIMINATORS if get(name) not in (None, ""))
    return Plane(
        frame=frame,
        position=position,
        orientation=orientation,
        spacing=_numbers(get, "PixelSpacing", 2),
        thickness=next((abs(depth) for (depth, *_) in depths if depth), None),
        slope=slope[0] if slope else 1.0,
        inter=inter[0] if inter else 0.0,
        discriminators=tuple(discriminators),
    )


def _text(content: Dataset, keyword: str) -> str:
    value = content.get(keyword)
    if isinstance(value, MultiValue):
        return "\\".join(str(part) for part in value)
    return "" if value is None else str(value).strip()


def _whole(content: Dataset, keyword: str, default: int | None = None) -> int:
    text = _text(content, keyword)
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise _DamageError(f"{keyword} is {text[:20]!r}: expected an integer") from error


def _numbers(get: Callable[[str], Any], keyword: str, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers, or None if the attribute is missing or empty."""
    try:
        value = get(keyword)
        parts = list(value) if isinstance(value, MultiValue | list) else [value]
        values = tuple(float(part) for part in parts if part not in (None, ""))
    except (ValueError, TypeError, OverflowError) as error:
        raise _DamageError(f"{keyword} is not numeric") from error
    if not values:
        return None
    if len(values) != count or not all(math.isfinite(number) for number in values):
        shown = ", ".join(f"{number:g}" for number in values[:6])
        raise _DamageError(f"{keyword} is [{shown}]: expected {count} finite number{'s' if count > 1 else ''}")
    return values
