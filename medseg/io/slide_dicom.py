"""DICOM slides: which files one consists of, and whether their frames are where their tables say.

OpenSlide reads them, through a library that believes the tables of frames: a wrong one ends the process. So the tables
are compared with the frames before OpenSlide sees a file.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO, Final

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from medseg.errors import CaseError

__all__ = ["check_dicom_slide", "find_dicom_slide"]

_SLIDE_CLASS: Final = "1.2.840.10008.5.1.4.1.1.77.1.6"
_HEADER_TAGS: Final = ["SOPClassUID", "SeriesInstanceUID"]
_PIXEL_DATA: Final = (0x7FE0, 0x0010)
_ITEM: Final = (0xFFFE, 0xE000)
_END: Final = (0xFFFE, 0xE0DD)
_UNDEFINED: Final = 0xFFFFFFFF


def find_dicom_slide(folder: Path) -> Path:
    """Return one file of the one slide in a folder; OpenSlide finds the others of its series itself.

    Raises:
        CaseError: there is no slide, or more than one.
    """
    slides = _slides(folder)
    if len(slides) != 1:
        found = f"{len(slides)} DICOM slides" if slides else "no DICOM slide"
        raise CaseError(f"{folder} holds {found}: expected one. Give a file of the slide instead of the folder.")
    return next(iter(slides.values()))[0]


def check_dicom_slide(file: Path) -> None:
    """Check the files of the slide that `file` belongs to, which are those of its series in its folder.

    Raises:
        CaseError: a file's frames are not where it says, or not all there.
    """
    for files in _slides(file.parent).values():
        if file in files:
            for part in files:
                _check_frames(part)


def _slides(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each slide in a folder, by the number of its series."""
    series = defaultdict(list)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
        except InvalidDicomError:
            continue
        if header.get("SOPClassUID") == _SLIDE_CLASS:
            series[str(header.get("SeriesInstanceUID"))].append(path)
    return dict(series)


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
