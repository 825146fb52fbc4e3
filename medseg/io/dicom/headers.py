"""Headers of DICOM files: what an image needs to be placed and decoded, without its pixels.

Nothing that names a patient is kept, and what goes into messages are numbers, modalities and UIDs alone.
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

# What tells apart images at one place, in the order in which it is tried.
_DISCRIMINATORS: Final = (
    *("StackID", "TemporalPositionIdentifier", "TemporalPositionIndex", "EchoNumbers", "EchoTime", "EffectiveEchoTime"),
    *("InversionTime", "DiffusionBValue", "DiffusionGradientOrientation", "TriggerTime"),
    *("NominalCardiacTriggerDelayTime", "ImageType", "FrameType", "AcquisitionNumber", "FrameAcquisitionNumber"),
    *("ConvolutionKernel", "AcquisitionTime", "AcquisitionDateTime", "ContentTime"),
)
# Where enhanced objects keep, for all frames or for each, what classic ones keep at the top.
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
# Implicit and explicit little endian, big endian, deflated; all others keep compressed frames.
_NATIVE: Final = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", _DEFLATED)
_MAX_INFLATED: Final = 1 << 30
# No lossless coding packs a large real image tighter than this; only a header that lies does.
_MAX_PACKING: Final = 10_000
_PACKING_FROM: Final = 1 << 26
# Objects that have rows and columns but hold no intensities, by SOP class; "." at the end stands for all below it.
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
    "1.2.840.10008.5.1.4.1.1.77.1.6": "a whole-slide image, which only bundles for color pictures take",
}
_MODALITIES: Final = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "FID", "RWV")


@dataclass(frozen=True)
class Plane:
    """One frame of an image.

    Attributes:
        frame: its number in the file, from 0.
        position: center of the first pixel, LPS+ mm; None if the file does not say.
        orientation: unit vectors along a row and along a column, LPS+, six numbers; None if the file does not say.
        spacing: mm between rows, and between columns.
        thickness: SpacingBetweenSlices, else SliceThickness, in mm; None without either.
        slope: factor from stored values to values.
        inter: what is added after the factor.
        marks: name and value of what may tell it from other images at the same place.
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
    """One DICOM file.

    Attributes:
        source: where it lies.
        series_uid: SeriesInstanceUID; texts are empty where the file does not say.
        study_uid: StudyInstanceUID.
        sop_class: SOPClassUID.
        sop_uid: SOPInstanceUID.
        frame_of_reference: FrameOfReferenceUID.
        modality: such as "CT".
        number: SeriesNumber.
        instance: InstanceNumber; None where the file does not say.
        description: SeriesDescription, which may name a person: not for messages.
        syntax: TransferSyntaxUID.
        image_type: ImageType, in upper case.
        localizer: it is a scout image, by its ImageType.
        rows: pixels along a column.
        columns: pixels along a row.
        samples: values per pixel.
        photometric: such as "MONOCHROME2".
        bits_allocated: bits per value in the file.
        bits_stored: bits of those that are in use.
        high_bit: the highest of them.
        signed: stored values are two's complement.
        planes: its frames, in the order of the file.
        other: what it is instead of an image, such as "an RT Dose object"; empty for an image.
        damage: what is wrong with it, as half a sentence; empty if nothing is.
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
    """A header that breaks a rule; the text says which."""


# Folders are listed, read and written for in turn, each time from the headers; a key changes when its file does.
_known: dict[Source, Header] = {}
_MAX_KNOWN: Final = 10_000


def read_headers(sources: Iterable[Source]) -> list[Header]:
    """Read the headers of files, in their order; damage is noted in each, not raised."""
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
    except Exception as error:  # parsing a damaged file raises many types, whose texts may quote the file
        return replace(header, damage=f"its header cannot be parsed ({type(error).__name__})")


def _content(stream: BinaryIO, source: Source) -> tuple[Dataset, int]:
    """Parse up to the pixels; return the elements in use and the pixels' length in bytes, 0 without any.

    Of pixels in compressed frames the length is what follows in the file.
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
    """A stream whose rest is read at once only if it inflates to less than a gigabyte: so a parser inflates it."""

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
        raise _DamageError(f"it is deflated and unpacks to more than {_MAX_INFLATED:,} bytes")


def _syntax(content: Dataset) -> str:
    meta = getattr(content, "file_meta", None)
    return str((meta.get("TransferSyntaxUID") if meta is not None else None) or "")


def _described(header: Header, content: Dataset) -> Header:
    """Add what is told of the series, and whether this is an image at all."""
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
    # Without a class it may be an image that is cut short, which must not be passed over.
    name = UID(header.sop_class).name if header.sop_class else "Image"
    return "" if has_rows or "Image" in name else name


def _sized(header: Header, content: Dataset) -> Header:
    """Add what is told of the pixels."""
    if "MOSAIC" in header.image_type:
        raise _DamageError(
            "it is a mosaic, slices side by side in one image, whose places only private elements tell (dcm2niix "
            "unpacks it)"
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
        raise _DamageError(f"it has {header.rows} rows, {header.columns} columns and {header.samples} values per pixel")
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or not stored - 1 <= header.high_bit < allocated:
        raise _DamageError(
            f"its values have {allocated} bits, of which {stored} are in use up to bit {header.high_bit}: expected 8, "
            "16 or 32"
        )
    return header


def _check_length(header: Header, content: Dataset, length: int, source: Source) -> None:
    """Compare what a header claims with the bytes that there are, before any memory is taken."""
    frames = _whole(content, "NumberOfFrames", 1)
    if frames < 1:
        raise _DamageError(f"it has {frames} frames")
    claimed = frames * header.rows * header.columns * header.samples * header.bits_allocated // 8
    if header.photometric == "YBR_FULL_422":
        claimed = claimed * 2 // 3
    shape = f"{frames} x {header.rows} x {header.columns} pixels"
    if not length:
        raise _DamageError(f"it has no pixels, or is cut short before them: expected {shape}")
    if header.syntax not in _NATIVE:
        # Each frame has a head of 8 bytes.
        if frames * 8 > length or (claimed > _PACKING_FROM and claimed > length * _MAX_PACKING):
            raise _DamageError(f"it claims {shape} in {length:,} bytes of compressed pixels")
    elif length < claimed:
        raise _DamageError(
            f"its pixels are cut short: {shape} need {claimed:,} bytes, {claimed - length:,} more than there are"
        )


def _planes(content: Dataset) -> tuple[Plane, ...]:
    frames = _whole(content, "NumberOfFrames", 1)
    groups = list(content.get("PerFrameFunctionalGroupsSequence") or [])
    if not groups and frames == 1:
        return (_plane(0, content.get),)
    if not groups:
        raise _DamageError(f"it has {frames} frames and does not say where they lie (no functional groups)")
    if len(groups) != frames:
        raise _DamageError(f"it has {frames} frames, but describes {len(groups)}")
    shared = list(content.get("SharedFunctionalGroupsSequence") or [])
    return tuple(_plane(frame, _getter(group, shared, content)) for frame, group in enumerate(groups))


def _getter(group: Dataset, shared: list[Dataset], content: Dataset) -> Callable[[str], Any]:
    """Return a look-up of one frame: its own groups, then those that all share, then, of what has no group, the top."""

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
    discriminators = ((mark, str(get(mark))) for mark in _DISCRIMINATORS if get(mark) not in (None, ""))
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
        raise _DamageError(f"{keyword} is {text[:20]!r}: expected a whole number") from error


def _numbers(get: Callable[[str], Any], keyword: str, count: int) -> tuple[float, ...] | None:
    """Return finite numbers, or None where there are none."""
    try:
        value = get(keyword)
        parts = list(value) if isinstance(value, MultiValue | list) else [value]
        values = tuple(float(part) for part in parts if part not in (None, ""))
    except (ValueError, TypeError, OverflowError) as error:
        raise _DamageError(f"{keyword} holds something else than numbers") from error
    if not values:
        return None
    if len(values) != count or not all(math.isfinite(number) for number in values):
        shown = ", ".join(f"{number:g}" for number in values[:6])
        raise _DamageError(f"{keyword} is [{shown}]: expected {count} finite number{'s' if count > 1 else ''}")
    return values
