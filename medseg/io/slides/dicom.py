"""DICOM slides: finding their files, and checking their offset tables.

OpenSlide reads them through a library that trusts the offset tables: a wrong one crashes the process. Therefore the
tables are compared with the frames before OpenSlide opens a file.
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
# Content of the files of a slide, by the third value of their ImageType; empty for the slide itself.
_PARTS: Final[Mapping[str, str]] = {
    "VOLUME": "",
    "LABEL": "the label image of a slide",
    "OVERVIEW": "the overview image of a slide",
    "LOCALIZER": "the overview image of a slide",
    "THUMBNAIL": "the thumbnail of a slide",
}
_PIXEL_DATA: Final = (0x7FE0, 0x0010)
_ITEM: Final = (0xFFFE, 0xE000)
_END: Final = (0xFFFE, 0xE0DD)
_UNDEFINED: Final = 0xFFFFFFFF


def find_dicom_slide(folder: Path) -> Path:
    """Return a file of the only slide in a folder; OpenSlide finds the other files of its series.

    Raises:
        CaseError: The folder has no slide, or more than one.
    """
    slides = defaultdict(list)
    for header in _headers(path for path in sorted(folder.iterdir()) if is_dicom(path)):
        if slide_part(header) == "":
            slides[header.series_uid].append(header.source.path)
    if len(slides) != 1:
        found = f"{len(slides)} DICOM slides" if slides else "no DICOM slide"
        raise CaseError(f"{folder} has {found}: expected one. Give a file of the slide instead of the folder.")
    return next(iter(slides.values()))[0]


def check_dicom_slide(file: Path) -> None:
    """Check the files of the slide that `file` belongs to: those of its series in its folder.

    Raises:
        CaseError: The file is not part of a slide, or is its label, overview or thumbnail image; or frames of a file of
            its series are missing or not where the offset table says.
    """
    (own,) = _headers([file])
    part = slide_part(own)
    if part is None:
        kind = UID(own.sop_class).name if own.sop_class else "unknown"
        raise CaseError(f"{file} has the SOP class {kind}: expected VL Whole Slide Microscopy Image Storage.")
    if part:
        raise CaseError(f"{file} is {part}: give a file of the slide itself, or its folder.")
    for header in _headers(path for path in sorted(file.parent.iterdir()) if is_dicom(path)):
        if slide_part(header) is not None and header.series_uid == own.series_uid:
            _check_frames(header.source.path)


def is_dicom_slide(file: Path) -> bool:
    """Return whether a file is a DICOM slide itself, not its label, overview or thumbnail image."""
    return is_dicom(file) and slide_part(_headers([file])[0]) == ""


def slide_part(header: Header) -> str | None:
    """Describe the content of a file: empty for a slide itself, else a phrase; None if it is not part of a slide."""
    if header.sop_class != _SLIDE_CLASS:
        return None
    flavor = header.image_type[2] if len(header.image_type) > 2 else "VOLUME"
    return _PARTS.get(flavor, f"a part of a slide with the image flavor {flavor[:16]!r}")


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
                raise CaseError(
                    f"{path} is truncated: {min(length, there):,} bytes of pixel data, expected {due:,}. Copy it again."
                )
            return
        table = _basic_offset_table(stream, path) or _extended_offset_table(header, path)
        items = _fragment_offsets(stream, path)
    if not table and len(items) != count:
        raise CaseError(
            f"{path} has no offset table for {count} frames in {len(items)} fragments: the frames cannot be separated."
        )
    if table and (len(table) != count or table != sorted(items & set(table))):
        raise CaseError(f"{path} is damaged: its offset table does not match its {count} frames.")


def _open_pixel_data(stream: BinaryIO, header: Dataset, path: Path) -> int:
    """Seek to the value of the pixel data and return its length."""
    syntax = header.file_meta.TransferSyntaxUID
    if not syntax.is_little_endian or syntax.is_deflated:
        raise CaseError(f"{path} has the transfer syntax {syntax.name}, which is not supported for slides: convert it.")
    wide = not syntax.is_implicit_VR
    group, element, length = struct.unpack("<HH4xI" if wide else "<HHI", stream.read(12 if wide else 8))
    if (group, element) != _PIXEL_DATA:
        raise CaseError(f"{path} has no pixel data.")
    return int(length)


def _basic_offset_table(stream: BinaryIO, path: Path) -> list[int]:
    """Read the basic offset table, which may be empty."""
    group, element, length = struct.unpack("<HHI", stream.read(8))
    if (group, element) != _ITEM or length % 4:
        raise CaseError(f"{path} is damaged: its compressed pixel data has no basic offset table.")
    return list(struct.unpack(f"<{length // 4}I", stream.read(length)))


def _extended_offset_table(header: Dataset, path: Path) -> list[int]:
    """Return the extended offset table, or an empty list without one."""
    offsets, lengths = (header.get(name, b"") for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"))
    if len(offsets) % 8 or len(lengths) != len(offsets):
        raise CaseError(
            f"{path} is damaged: its extended offset table has {len(offsets)} bytes, its lengths {len(lengths)}."
        )
    return list(struct.unpack(f"<{len(offsets) // 8}Q", offsets))


def _fragment_offsets(stream: BinaryIO, path: Path) -> set[int]:
    """Return the offsets of the fragments of compressed pixel data, relative to the first one."""
    begin = stream.tell()
    offsets: set[int] = set()
    size = path.stat().st_size
    while True:
        position = stream.tell()
        head = stream.read(8)
        if len(head) < 8:
            raise CaseError(f"{path} is truncated: it ends within its frames. Copy it again.")
        group, element, length = struct.unpack("<HHI", head)
        if (group, element) == _END:
            return offsets
        if (group, element) != _ITEM or position + 8 + length > size:
            raise CaseError(f"{path} is damaged: invalid fragment at byte {position:,}. Copy it again.")
        offsets.add(position - begin)
        stream.seek(length, 1)
