"""DICOM slides: which files one consists of, and whether their frames are where their tables say.

OpenSlide reads them, through a library that believes the tables of frames: a wrong one ends the process. So the tables
are compared with the frames before OpenSlide sees a file.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID

from medseg.errors import CaseError
from medseg.io.dicom.detect import is_dicom
from medseg.io.dicom.headers import Header, read_headers
from medseg.io.dicom.sources import file_source

__all__ = ["check_dicom_slide", "find_dicom_slide", "is_dicom_slide", "slide_part"]

_SLIDE_CLASS: Final = "1.2.840.10008.5.1.4.1.1.77.1.6"
# What files of a slide show beside the slide itself, by the third value of their ImageType.
_PARTS: Final[Mapping[str, str]] = {
    "VOLUME": "",
    "LABEL": "the label of a slide",
    "OVERVIEW": "an overview of a slide",
    "LOCALIZER": "an overview of a slide",
    "THUMBNAIL": "a thumbnail of a slide",
}
_PIXEL_DATA: Final = (0x7FE0, 0x0010)
_ITEM: Final = (0xFFFE, 0xE000)
_END: Final = (0xFFFE, 0xE0DD)
_UNDEFINED: Final = 0xFFFFFFFF


def find_dicom_slide(folder: Path) -> Path:
    """Return one file of the one slide in a folder; OpenSlide finds the others of its series itself.

    Raises:
        CaseError: there is no slide, or more than one.
    """
    slides = defaultdict(list)
    for header in _headers(path for path in sorted(folder.iterdir()) if is_dicom(path)):
        if slide_part(header) == "":
            slides[header.series_uid].append(header.source.path)
    if len(slides) != 1:
        found = f"{len(slides)} DICOM slides" if slides else "no DICOM slide"
        raise CaseError(f"{folder} holds {found}: expected one. Give a file of the slide instead of the folder.")
    return next(iter(slides.values()))[0]


def check_dicom_slide(file: Path) -> None:
    """Check the files of the slide that `file` belongs to, which are those of its series in its folder.

    Raises:
        CaseError: the file is none of a slide, or shows its label, an overview or a thumbnail; or the frames of a file
            of its series are not where it says, or not all there.
    """
    (own,) = _headers([file])
    part = slide_part(own)
    if part is None:
        kind = UID(own.sop_class).name if own.sop_class else "unknown"
        raise CaseError(f"{file} is DICOM of the class {kind}: expected VL Whole Slide Microscopy Image Storage.")
    if part:
        raise CaseError(f"{file} is {part}: give a file of the slide itself, or its folder.")
    for header in _headers(path for path in sorted(file.parent.iterdir()) if is_dicom(path)):
        if slide_part(header) is not None and header.series_uid == own.series_uid:
            _check_frames(header.source.path)


def is_dicom_slide(file: Path) -> bool:
    """Tell whether a file is DICOM and a slide itself, not its label, an overview or a thumbnail."""
    return is_dicom(file) and slide_part(_headers([file])[0]) == ""


def slide_part(header: Header) -> str | None:
    """Say what a file shows: empty for a slide itself, else half a sentence; None if it does not belong to a slide."""
    if header.sop_class != _SLIDE_CLASS:
        return None
    flavor = header.image_type[2] if len(header.image_type) > 2 else "VOLUME"
    return _PARTS.get(flavor, f"a part of a slide of the kind {flavor[:16]!r}")


def _headers(files: Iterable[Path]) -> list[Header]:
    return read_headers(file_source(path) for path in files)


def _check_frames(path: Path) -> None:
    with path.open("rb") as stream:
        header = pydicom.dcmread(stream, stop_before_pixels=True)
        count = int(header.NumberOfFrames)
        length = _open_pixel_data(stream, header, path)
        if length != _UNDEFINED:
            due = count * int(header.Rows) * int(header.Columns) * int(header.SamplesPerPixel)
            there = path.stat().st_size - stream.tell()
            if min(length, there) < due:
                raise CaseError(f"{path} has {min(length, there):,} bytes of pixels: expected {due:,}. Copy it again.")
            return
        table = _short_table(stream, path) or _long_table(header, path)
        items = _items(stream, path)
    if not table and len(items) != count:
        raise CaseError(f"{path} has {count} frames in {len(items)} parts without a table: they cannot be told apart.")
    if table and (len(table) != count or table != sorted(items & set(table))):
        raise CaseError(f"{path} has a table of frames that does not fit its {count} frames: it is damaged.")


def _open_pixel_data(stream: BinaryIO, header: Dataset, path: Path) -> int:
    """Go to the value of the pixel data and return the length it claims."""
    syntax = header.file_meta.TransferSyntaxUID
    if not syntax.is_little_endian or syntax.is_deflated:
        raise CaseError(f"{path} is coded as {syntax.name}, in which slides are not read: convert it.")
    wide = not syntax.is_implicit_VR
    group, element, length = struct.unpack("<HH4xI" if wide else "<HHI", stream.read(12 if wide else 8))
    if (group, element) != _PIXEL_DATA:
        raise CaseError(f"{path} has no pixel data.")
    return int(length)


def _short_table(stream: BinaryIO, path: Path) -> list[int]:
    """Read the first item, which holds the place of every frame or nothing."""
    group, element, length = struct.unpack("<HHI", stream.read(8))
    if (group, element) != _ITEM or length % 4:
        raise CaseError(f"{path} has compressed pixel data without a table of frames: it is damaged.")
    return list(struct.unpack(f"<{length // 4}I", stream.read(length)))


def _long_table(header: Dataset, path: Path) -> list[int]:
    """Return the places of an extended offset table, if there is one."""
    places, lengths = (header.get(name, b"") for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"))
    if len(places) % 8 or len(lengths) != len(places):
        raise CaseError(f"{path} has an extended table of frames of {len(places)} and {len(lengths)} bytes.")
    return list(struct.unpack(f"<{len(places) // 8}Q", places))


def _items(stream: BinaryIO, path: Path) -> set[int]:
    """Walk through the parts of compressed pixel data and return where they begin, from the first one on."""
    begin = stream.tell()
    places: set[int] = set()
    size = path.stat().st_size
    while True:
        place = stream.tell()
        head = stream.read(8)
        if len(head) < 8:
            raise CaseError(f"{path} ends in the middle of its frames: copy it again.")
        group, element, length = struct.unpack("<HHI", head)
        if (group, element) == _END:
            return places
        if (group, element) != _ITEM or place + 8 + length > size:
            raise CaseError(f"{path} has a damaged frame at byte {place:,}: copy it again.")
        places.add(place - begin)
        stream.seek(length, 1)
