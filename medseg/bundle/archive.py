"""Bundles as zip archives: reproducible packing, and safe unpacking of archives of unknown origin.

`pack` writes a reproducible zip: sorted entries, fixed times and modes, no gaps, and uncompressed files (compressed
bytes depend on the library's version). The first entry is `SHA256SUMS`, for `sha256sum --check`. `unpack`
reads an archive with `zipfile`, accepts only the kinds of entries that `pack` writes, packs the extracted files again
and accepts the archive only if its bytes are the same. This excludes the usual attacks by zip files: nothing is
compressed, hidden between entries, or stated twice with different values.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import os
import re
import stat
import struct
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle, merged
from medseg.bundle.trust import Finding, find_files, find_programs
from medseg.bundle.weight_files import find_pickled
from medseg.errors import BundleError, OutputError, RequestError, UntrustedBundleError
from medseg.files import check_folder, load_json, replacing, sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Packed", "find_all", "pack", "unpack"]

SUMS: Final = "SHA256SUMS"
MAX_FILES: Final = 1000
MAX_FILE_BYTES: Final = 2_000_000_000
MAX_BYTES: Final = 4_000_000_000
_MAX_NAME: Final = 200
_CHUNK: Final = 2**20

_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+-]*(?<![ .])")
_BELONGS: Final = re.compile(
    r"LICENSE|NOTICE|README\.md|\w+\.json|large_files\.yml"
    r"|configs/[^/]+\.json|models/[^/]+\.(?:pt|md|txt)|docs/(?:[^/]+/)*[^/]+\.(?:md|txt|png|jpe?g)"
)
_FOLDERS: Final = ("configs", "docs", "models")
_EXPORTS: Final = (".ts", ".pt2", ".onnx", ".xml", ".bin", ".engine", ".plan")
# Device names of Windows, with any suffix.
_DEVICES: Final = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_MODE: Final = (stat.S_IFREG | 0o644) << 16


@dataclass(frozen=True)
class Packed:
    """A packed bundle.

    Attributes:
        path: Path of the archive.
        sha256: SHA-256 of the archive.
        files: Names of the files in the archive, relative to the bundle's folder.
        left_out: Names of skipped files and folders, each with the reason.
    """

    path: Path
    sha256: str
    files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]


def pack(bundle: Bundle, target: Path) -> Packed:
    """Pack a bundle into a zip archive; the same files give the same bytes on any machine.

    Args:
        bundle: Declarative bundle with configs, whose weights match the SHA-256 in its metadata.
        target: Path of the archive, which is written atomically and replaced if it exists.

    Raises:
        RequestError: A `target` without the suffix `.zip`.
        OutputError: A `target` that is not writable.
        BundleError: A bundle that `unpack` would refuse, is too large, or changed while it was packed.
        UntrustedBundleError: A bundle that contains executable code.
    """
    if target.suffix.lower() != ".zip":
        raise RequestError(f"Packed bundles are zip archives: '{target}' must end in .zip.")
    if not _PART.fullmatch(bundle.name):
        raise BundleError(
            f"Invalid bundle name '{bundle.name}' for packing. Rename the folder with ASCII letters, digits, _, - and ."
        )
    files, left_out = _collect(bundle.root)
    _check_content(bundle)
    sums = {name: sha256_file(bundle.root / name) for name in files}
    check_folder(target.absolute().parent)
    with replacing(target) as temporary:
        _write_archive(bundle, sums, temporary)
    return Packed(target, sha256_file(target), tuple(files), tuple(left_out))


def unpack(archive: Path, folder: Path | None = None) -> Bundle:
    """Unpack a bundle that `pack` wrote. The archive is not trusted, and nothing in it is executed.

    Names, kinds, sizes, hashes and contents are checked before the folder appears under its name.

    Args:
        archive: Path of the zip archive.
        folder: New folder for the bundle; by default its packed name, in the current folder.

    Raises:
        RequestError: No such archive.
        OutputError: A folder that exists or is not writable.
        BundleError: An archive that `pack` did not write, or that was modified.
        UntrustedBundleError: A bundle that contains executable code.
    """
    if not archive.is_file():
        raise RequestError(f"No such archive: '{archive}'. Pass a file that `medseg bundle pack` wrote.")
    with _opened(archive) as opened:
        entries = _entries(opened, archive)
        name = entries[0].filename.split("/")[0]
        target = (Path(name) if folder is None else folder).absolute()
        if target.exists() or target.is_symlink():
            raise OutputError(f"'{target}' already exists. Pass --output NEW_FOLDER.")
        check_folder(target.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as temporary:
            unpacked = Bundle(Path(temporary, name))
            sums = _extract(opened, entries[1:], unpacked.root, archive)
            _check_same(unpacked, sums, archive)
            _check_content(unpacked)
            try:
                unpacked.root.rename(target)
            except OSError as error:
                raise OutputError(f"Cannot write '{target}': {error.strerror}.") from error
    return Bundle(target)


def find_all(bundle: Bundle) -> list[tuple[str, Finding]]:
    """List everything a bundle would execute, and files that are executable or mismatched, with the names of configs.

    Nothing is imported, evaluated or unpickled. Configs are checked as MONAI merges them; a job checks its own merged
    configs again before it runs.

    Raises:
        BundleError: An unreadable config.
    """
    configs = {path.name: load_json(path) for path in sorted(bundle.root.glob("configs/*.json"))}
    metadata = configs.pop("metadata.json", {})
    whole = {**merged(configs), "_meta_": metadata}
    found = [("metadata.json", item) for item in find_programs(metadata, whole, metadata=True)]
    found += [(name, item) for name, part in configs.items() for item in find_programs(part, {**whole, **part})]
    files = [*find_files(bundle.root), *_find_weights(bundle.root, metadata)]
    return found + [("", item) for item in files]


# Packing


def _collect(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the sorted files of the bundle, and the skipped files and folders with the reasons."""
    names, left_out, size = [], [], 0
    for name, path in _walk(root):
        if path.is_symlink() and name.rstrip("/") in _FOLDERS:
            raise BundleError(f"'{path}' is a link. Replace it with the folder itself.")
        if reason := _foreign(name, path):
            left_out.append((name, reason))
            continue
        if path.is_symlink() or not path.is_file():
            raise BundleError(
                f"'{path}' is a link or not a regular file. Replace it with the file itself, or remove it."
            )
        size += path.stat().st_size
        if path.stat().st_size > MAX_FILE_BYTES or size > MAX_BYTES:
            raise BundleError(
                f"Bundle too large at '{path}': the limits are {MAX_FILE_BYTES:,} bytes per file and {MAX_BYTES:,} in "
                "total."
            )
        names.append(name)
    if len(names) >= MAX_FILES:
        raise BundleError(f"Too many files: '{root}' has {len(names)}, but a packed bundle has fewer than {MAX_FILES}.")
    return names, left_out


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a bundle with their names, sorted; a folder that is not part of it once, as `name/`."""
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        for name in list(folders):
            inside = (here / name).relative_to(root)
            foreign = inside.parts[0] not in _FOLDERS or name.startswith((".", "__"))
            if foreign or (here / name).is_symlink():
                folders.remove(name)
                found.append((f"{inside.as_posix()}/", here / name))
        found += [((here / name).relative_to(root).as_posix(), here / name) for name in files]
    return iter(sorted(found))


def _foreign(name: str, path: Path) -> str:
    """Return why a file or folder is not part of a packed bundle; empty if it is."""
    parts = name.rstrip("/").split("/")
    if any(part.startswith(".") for part in parts):
        return "hidden file"
    if parts[-1].startswith("__pycache__") or path.suffix in (".pyc", ".pyo"):
        return "cache"
    if parts[0] == "runs":
        return "results of runs"
    if name == SUMS:
        return "written again"
    if path.suffix.lower() in _EXPORTS:
        return "exported model, which `medseg export` can write again"
    if not all(_PART.fullmatch(part) for part in parts) or len(name) > _MAX_NAME:
        return "invalid name; allowed are ASCII letters, digits, space and ._+-"
    return "" if _BELONGS.fullmatch(name) else "not part of a bundle"


def _info(name: str, size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3
    info.external_attr = _MODE
    info.compress_type = zipfile.ZIP_STORED
    info.file_size = size
    return info


def _write_archive(bundle: Bundle, sums: Mapping[str, str], target: Path) -> None:
    """Write the files of a bundle into an archive; `sums` has their SHA-256 by name."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(_info(f"{bundle.name}/{SUMS}", len(text)), text)
        for name, digest in sums.items():
            path = bundle.root / name
            with (
                path.open("rb") as source,
                archive.open(_info(f"{bundle.name}/{name}", path.stat().st_size), "w") as out,
            ):
                copied = _copy(source, out)
            if copied != digest:
                raise BundleError(f"'{path}' changed while it was packed. Pack again when no job is running.")


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy a stream and return the SHA-256 of its content."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


# Unpacking


class _SmallReads(io.FileIO):
    """A file that is read in small chunks only, to limit memory whatever directory size an archive states."""

    def read(self, size: int | None = -1) -> bytes:
        """Read up to one chunk; refuse larger reads."""
        found = super().read(_CHUNK + 1 if size is None or size < 0 else min(size, _CHUNK + 1)) or b""
        if len(found) > _CHUNK:
            raise zipfile.BadZipFile(f"its directory exceeds {_CHUNK} bytes")
        return found


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if path.stat().st_size > MAX_BYTES:
        raise _refusal(path, f"it has {path.stat().st_size:,} bytes, but the limit is {MAX_BYTES:,}")
    with _SmallReads(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, struct.error) as error:
            raise _refusal(path, f"its directory is unreadable ({error})") from error
        with archive:
            yield archive


def _entries(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """Return the entries of an archive, after a check that `pack` writes such entries."""
    entries = archive.infolist()
    if not 1 <= len(entries) <= MAX_FILES:
        raise _refusal(path, f"its directory lists {len(entries)} entries; expected 1 to {MAX_FILES}")
    for info in entries:
        if problem := _entry_problem(info):
            raise _refusal(path, f"the entry {ascii(info.orig_filename)[:_MAX_NAME]} {problem}")
    size, room = sum(info.file_size for info in entries), path.stat().st_size
    if size > room:
        raise _refusal(path, f"its entries overlap: they have {size} bytes in total, but the archive only {room}")
    _check_names(entries, path)
    return entries


def _entry_problem(info: zipfile.ZipInfo) -> str:
    """Return how an entry differs from those that `pack` writes; empty if it does not."""
    if problem := _name_problem(info.orig_filename):
        return problem
    if info.flag_bits & 0x1:
        return "is encrypted"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a link"
    if kind != stat.S_IFREG:
        return "is not a regular file"
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits:
        return "is compressed or has flags set; packed bundles store their files uncompressed"
    if info.file_size != info.compress_size or info.file_size > MAX_FILE_BYTES or info.extra or info.comment:
        return f"has inconsistent sizes ({info.file_size} and {info.compress_size} bytes), extra fields or a comment"
    below = info.orig_filename.partition("/")[2]
    return "" if below == SUMS or not _foreign(below, Path(below)) else "is not part of a bundle"


def _name_problem(name: str) -> str:
    """Return why a name is unsafe: it could leave the folder, or differ between systems; empty if it is safe."""
    parts = name.split("/")
    if not name.isprintable():
        return "has control characters in its name"
    if "\\" in name or ":" in name:
        return "has a backslash or a drive letter in its name"
    if name.startswith(("/", "~")):
        return "has an absolute path"
    if ".." in parts:
        return "has a path outside the bundle"
    if any(_DEVICES.fullmatch(part) for part in parts):
        return "has a device name of Windows"
    if len(parts) < 2 or len(name) > _MAX_NAME or not all(_PART.fullmatch(part) for part in parts):
        return "has an invalid name, or is outside the bundle's folder"
    return ""


def _check_names(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Check that the archive has one bundle, with its checksums first, and no names that could collide."""
    top = entries[0].filename.split("/")[0]
    if entries[0].filename != f"{top}/{SUMS}":
        raise _refusal(path, f"its first entry is not NAME/{SUMS}")
    known: dict[str, tuple[str, bool]] = {}
    for info in entries:
        parts = info.filename.split("/")
        if parts[0] != top:
            raise _refusal(path, f"it contains '{info.filename}' outside the folder '{top}'")
        for depth in range(1, len(parts) + 1):
            name, is_file = "/".join(parts[:depth]), depth == len(parts)
            before = known.get(name.casefold())
            if before is not None and (is_file or before != (name, False)):
                raise _refusal(path, f"'{name}' and '{before[0]}' would be one file on some systems")
            known[name.casefold()] = (name, is_file)


def _extract(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], root: Path, path: Path) -> dict[str, str]:
    """Write the entries below `root`; return their SHA-256 by name."""
    sums: dict[str, str] = {}
    try:
        for info in entries:
            name = info.filename.partition("/")[2]
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("xb") as out:
                sums[name] = _copy(source, out)
    except (zipfile.BadZipFile, EOFError, struct.error) as error:
        raise _refusal(path, f"it is damaged ({error})") from error
    except OSError as error:
        raise OutputError(f"Cannot write '{root}': {error.strerror or error}.") from error
    return sums


def _check_same(bundle: Bundle, sums: Mapping[str, str], path: Path) -> None:
    """Check that packing the extracted files gives exactly the bytes of the archive."""
    again = bundle.root.with_suffix(".zip")
    _write_archive(bundle, sums, again)
    if not filecmp.cmp(again, path, shallow=False):
        raise _refusal(
            path, f"its bytes differ from those of packing its files: the archive or its {SUMS} was modified"
        )
    again.unlink()


def _refusal(path: Path, problem: str) -> BundleError:
    return BundleError(
        f"Cannot unpack '{path}': {problem}. Only unmodified archives of `medseg bundle pack` are accepted; unpack "
        "others with another program and check the folder with `medseg bundle inspect`."
    )


# Content


def _check_content(bundle: Bundle) -> None:
    """Refuse a bundle without configs, or with anything that is not allowed in a declarative one."""
    if not (bundle.config_path("inference").is_file() and bundle.config_path("metadata").is_file()):
        raise BundleError(f"Incomplete bundle '{bundle.name}': no configs/inference.json or no configs/metadata.json.")
    foreign = tuple(name for name, path in _walk(bundle.root) if _foreign(name, path))
    bad = [
        item for config, item in find_all(bundle) if not item.allowed and (config or not _is_among(item.where, foreign))
    ]
    if bad:
        lines = [f"  {item}" for item in bad[:5]] + ([f"  ... and {len(bad) - 5} more"] if bad[5:] else [])
        raise UntrustedBundleError(
            "\n".join([f"Bundle '{bundle.name}' contains executable code or altered files, so it is refused:", *lines])
        )


def _is_among(name: str, foreign: tuple[str, ...]) -> bool:
    """Return whether a file is one of the skipped files or in one of the skipped folders."""
    return any(name == other.rstrip("/") or (other.endswith("/") and name.startswith(other)) for other in foreign)


def _find_weights(root: Path, metadata: dict[str, Any]) -> Iterator[Finding]:
    """Yield the faults of the weight files: a mismatch with the metadata, or content besides tensors."""
    listed = metadata.get("weights", {})
    if not isinstance(listed, dict):
        yield Finding("configs/metadata.json: weights", "value", repr(listed), False, "must be an object of files")
        listed = {}
    for name, entry in listed.items():
        path = root / name
        wanted = entry.get("sha256") if isinstance(entry, dict) else None
        if not isinstance(wanted, str) or not all(_PART.fullmatch(part) for part in name.split("/")):
            yield Finding("configs/metadata.json: weights", "value", name, False, "must be a file name with its sha256")
        elif path.is_file() and sha256_file(path) != wanted.lower():
            yield Finding(name, "weights", sha256_file(path), False, "does not match the SHA-256 in the metadata")
    for path in sorted(root.glob("models/*.pt")):
        if path.is_file() and path.resolve().is_relative_to(root.resolve()):
            yield from find_pickled(path, path.relative_to(root).as_posix())
