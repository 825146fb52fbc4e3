"""Sources of DICOM files: folders, DICOMDIRs, and zip archives, which are read without unpacking them."""

from __future__ import annotations

import logging
import os
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.uid import ImplicitVRLittleEndian

from medseg.errors import CaseError, in_a_line, visible
from medseg.io.dicom.detect import DIRECTORY_FILE, is_dicom, is_dicom_start

__all__ = ["Source", "file_source", "find_sources", "quiet", "streams"]

# Far above any study (a whole-body CT has some 5,000 images of 0.5 MB), far below the capacity of a machine.
_MAX_MEMBERS = 100_000
_MAX_MEMBER_BYTES = 1 << 32
_MAX_ARCHIVE_BYTES = 1 << 36
# Pixels compress 2 to 10 times; only a large member with a higher compression ratio than this is suspicious.
_MAX_PACKING = 200
_PACKING_FROM = 1 << 24
_NESTED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_START_BYTES = 4096


@dataclass(frozen=True)
class Source:
    """One DICOM file.

    Attributes:
        path: Path of the file, or of the archive that contains it.
        member: Name in the archive; empty for a regular file.
        size: Uncompressed size in bytes.
        changed: Modification time of the file or archive in nanoseconds.
    """

    path: Path
    member: str
    size: int
    changed: int

    @property
    def full_path(self) -> Path:
        """Path of the file; a member of an archive is below the archive."""
        return self.path / self.member if self.member else self.path

    @property
    def folder(self) -> Path:
        """Folder of the file, also within an archive."""
        return self.full_path.parent

    def __str__(self) -> str:
        return str(self.full_path)


def streams(sources: Iterable[Source]) -> Iterator[tuple[Source, BinaryIO]]:
    """Yield each source with an open stream; consecutive members of an archive share one open archive.

    Raises:
        CaseError: An archive is damaged. A damaged member raises when its content is read.
    """
    for path, group in groupby(sources, key=lambda source: source.path):
        members = list(group)
        if not members[0].member:
            with path.open("rb") as file:
                yield members[0], file
            continue
        with _archive(path) as archive:
            for source in members:
                with archive.open(source.member) as packed:
                    yield source, cast("BinaryIO", packed)


def find_sources(path: Path) -> list[Source]:
    """List the DICOM files at a path.

    Args:
        path: Folder, which is searched recursively without hidden folders and links to folders; a single DICOM file; a
            DICOMDIR; or a zip archive of DICOM files.

    Raises:
        CaseError: The path does not exist or is not DICOM; an archive has too many or too large members, a suspicious
            compression ratio, encrypted members or nested archives; or a DICOMDIR lists files that are missing or
            outside its folder.
    """
    if path.is_dir():
        return [file_source(found) for found in _walk(path) if is_dicom(found)]
    if not path.is_file():
        raise CaseError(f"{path} does not exist, or is not a regular file: check the path.")
    if zipfile.is_zipfile(path) and not is_dicom(path):
        return _members(path)
    if not is_dicom(path):
        raise CaseError(f"{path} is not a DICOM file: it has neither the prefix 'DICM' nor a SOP class.")
    return _listed(path) if path.name.upper() == DIRECTORY_FILE else [file_source(path)]


def file_source(path: Path) -> Source:
    """Return the source of a regular file."""
    about = path.stat()
    return Source(path, "", about.st_size, about.st_mtime_ns)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and logs of the parser, which disclose values of the file; medseg checks what it uses."""
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _walk(folder: Path) -> Iterator[Path]:
    for where, subfolders, names in os.walk(folder, onerror=_refuse_unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
        yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))


def _refuse_unreadable(error: OSError) -> NoReturn:
    # Its images may be slices of the same volume.
    raise CaseError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.") from error


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (CaseError, MemoryError):
        raise
    except Exception as error:  # each compression method and damaged directories raise different types
        reason = visible(in_a_line(error))
        raise CaseError(
            f"{path} is a damaged archive, or uses an unsupported compression method ({reason})."
        ) from error


def _members(path: Path) -> list[Source]:
    with _archive(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir() and not _hidden(info.filename)]
        _check_archive(infos, path)
        changed = path.stat().st_mtime_ns
        found = [info for info in infos if _is_member(archive, info, path)]
    return [Source(path, info.filename, info.file_size, changed) for info in found]


def _hidden(name: str) -> bool:
    return any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in name.split("/"))


def _check_archive(infos: Sequence[zipfile.ZipInfo], path: Path) -> None:
    if len(infos) > _MAX_MEMBERS:
        raise CaseError(
            f"{path} has too many files: {len(infos):,}, the limit of an archive is {_MAX_MEMBERS:,}. Unpack it."
        )
    total = sum(info.file_size for info in infos)
    if total > _MAX_ARCHIVE_BYTES:
        raise CaseError(
            f"{path} is too large: it unpacks to {total:,} bytes, the limit is {_MAX_ARCHIVE_BYTES:,}. Unpack it."
        )
    if len({info.filename for info in infos}) < len(infos):
        raise CaseError(f"{path} has several files with the same name: create the archive again.")
    for info in infos:
        _check_member(info, path)


def _check_member(info: zipfile.ZipInfo, path: Path) -> None:
    where = f"{path} contains '{info.filename}'"
    if info.flag_bits & 1:
        raise CaseError(f"{where}, which is encrypted: unpack it first.")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise CaseError(f"{where}, which is a link: archive the files themselves.")
    if info.filename.lower().endswith(_NESTED):
        raise CaseError(f"{where}, a nested archive: unpack it first.")
    packing = info.file_size / max(1, info.compress_size)
    if info.file_size > _MAX_MEMBER_BYTES or (info.file_size > _PACKING_FROM and packing > _MAX_PACKING):
        raise CaseError(
            f"{where} of {info.file_size:,} bytes with a compression ratio of {packing:.0f}: the limits are "
            f"{_MAX_MEMBER_BYTES:,} bytes, and a ratio of {_MAX_PACKING} above {_PACKING_FROM:,} bytes. Unpack it "
            "if you trust it."
        )


def _is_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> bool:
    with archive.open(info) as member:
        start = member.read(_START_BYTES)
    if start.startswith(b"PK\x03\x04"):
        raise CaseError(f"{path} contains '{info.filename}', a nested archive: unpack it first.")
    return is_dicom_start(start)


def _listed(directory: Path) -> list[Source]:
    """Return the files that a DICOMDIR references.

    Its records are read in file order; the offsets between them, which may form loops, are not followed.
    """
    paths: dict[Path, None] = {}
    for record in _records(directory):
        named = record.get("ReferencedFileID")
        if named:
            parts = [named] if isinstance(named, str) else [str(part) for part in named]
            paths[_below(directory, parts)] = None
    if not paths:
        raise CaseError(f"{directory} lists no files: give the folder of the images instead.")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise CaseError(
            f"{directory} lists {len(paths):,} files, of which {len(missing):,} are missing, such as "
            f"'{missing[0].relative_to(directory.parent)}': copy the whole medium."
        )
    return [file_source(path) for path in paths if is_dicom(path)]


def _records(directory: Path) -> Sequence[Any]:
    try:
        with quiet(), directory.open("rb") as file:
            meta = read_file_meta_info(directory)
            # After the preamble of 128 bytes, the prefix, and the element with the length of the meta information.
            file.seek(128 + 4 + 12 + int(meta.FileMetaInformationGroupLength))
            implicit = (
                meta.get("TransferSyntaxUID") == ImplicitVRLittleEndian
            )  # although the standard requires explicit VR
            content = read_dataset(file, is_implicit_VR=implicit, is_little_endian=True)
            return list(content.get("DirectoryRecordSequence") or [])
    except OSError:
        raise
    except Exception as error:  # parsing a damaged file raises many types
        raise CaseError(f"{directory} is damaged ({type(error).__name__}): copy the whole medium again.") from error


def _below(directory: Path, parts: Sequence[str]) -> Path:
    """Return the path of a listed file below the folder of the DICOMDIR; names on media may differ in case."""
    path = directory.parent
    for part in parts:
        if part in ("", ".", "..") or "/" in part or "\\" in part or "\0" in part:
            raise CaseError(
                f"{directory} lists the file {'/'.join(parts)!r}, which is outside its folder and not read."
            )
        path = path / part if (path / part).exists() else _any_case(path, part)
    if not path.resolve().is_relative_to(directory.parent.resolve()):
        raise CaseError(
            f"{directory} lists the file {'/'.join(parts)!r}, a link to outside its folder, which is not read."
        )
    return path


def _any_case(folder: Path, name: str) -> Path:
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.name.lower() == name.lower():
                return entry
    return folder / name
