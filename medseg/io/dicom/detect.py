"""Recognition of DICOM files by their first bytes, and paths with a series; imports the standard library only."""

from __future__ import annotations

import re
from pathlib import Path

from medseg.io.names import StrPath, absolute, file_kind

__all__ = [
    "DIRECTORY_FILE",
    "SERIES_MARK",
    "image_kind",
    "is_dicom",
    "is_dicom_start",
    "named_file",
    "split_series",
]

DIRECTORY_FILE = "DICOMDIR"
# Separates the path of a folder or archive from the series in it.
SERIES_MARK = "::"

_START_BYTES = 4096
# Files without preamble and prefix: elements in ascending order from group 2 or 8 on, with a standard SOP class.
_BARE_START = (b"\x02\x00", b"\x08\x00")
_SOP_CLASS = re.compile(rb"\x08\x00\x16\x00(?:UI..|..\x00\x00)1\.2\.840\.10008\.", re.DOTALL)


def is_dicom_start(start: bytes) -> bool:
    """Return whether a file that starts with these bytes (4 KiB are enough) is DICOM."""
    return start[128:132] == b"DICM" or (start[:2] in _BARE_START and _SOP_CLASS.search(start) is not None)


def is_dicom(path: Path) -> bool:
    """Return whether a regular file is DICOM, by the prefix "DICM" or else a SOP class; its name is ignored."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return is_dicom_start(file.read(_START_BYTES))


def split_series(path: StrPath) -> tuple[Path, str]:
    """Split `folder::series` into the absolute path of the folder, file or archive, and the series (may be empty).

    An existing path is never split.
    """
    whole = absolute(path)
    head, separator, series = str(whole).rpartition(SERIES_MARK)
    if not separator or whole.exists():
        return whole, ""
    return Path(head), series


def image_kind(path: StrPath) -> str | None:
    """Return the format, a key of `medseg.io.formats.FORMATS`, of a path with or without a DICOM series.

    Unlike `file_kind` this accesses the file system: folders, zip archives and files with DICOM content are "dicom".
    """
    source, series = split_series(path)
    kind = file_kind(source)
    if kind is not None and not source.is_dir():
        return kind
    known = series or source.is_dir() or source.suffix.lower() == ".zip" or is_dicom(source)
    return "dicom" if known else None


def named_file(path: Path) -> Path:
    """Return the file name that an image is named after: DICOM files and folders as if they ended in `.dcm`.

    In `folder::series`, characters that are not portable in file names become `_`.
    """
    source, series = split_series(path)
    if series:
        name = re.sub(r"[^\w.-]+", "_", f"{source.name}_{series}")
        return source.parent / f"{name}.dcm"
    known = file_kind(path) is not None and not path.is_dir()
    return path if known else path.with_name(f"{path.name}.dcm")
