"""A bundle as one file: packing with the same bytes every time, unpacking files of unknown origin.

`pack` writes a zip that leaves nothing to chance: sorted entries, fixed times and modes, stored rather than compressed
(the result of compression depends on the library's version), no gaps. It begins with `SHA256SUMS`, which
`sha256sum --check` reads too. `unpack` lets `zipfile` read an archive, takes only the kinds of entries that `pack`
writes, and packs what came out once more: only an archive of exactly these bytes is accepted. So the usual ways to
attack with a zip need no defense of their own: nothing is compressed, hidden between entries, or told in two ways.
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
# Names that Windows takes for devices, with any suffix.
_DEVICES: Final = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_MODE: Final = (stat.S_IFREG | 0o644) << 16


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote.

    Attributes:
        path: the archive.
        sha256: of the archive.
        files: names in the archive, below the bundle's folder.
        left_out: names of files and folders that are no part of a bundle, and why.
    """

    path: Path
    sha256: str
    files: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]


def pack(bundle: Bundle, target: Path) -> Packed:
    """Write a bundle into a zip archive; the same files give the same bytes, on any machine.

    Args:
        bundle: declarative, with configs; weights that do not fit its metadata are refused.
        target: the archive, written whole or not at all. An archive that is there is replaced.

    Raises:
        RequestError: `target` is no `.zip`, or cannot be written.
        BundleError: the bundle is one that `unpack` would refuse, is too large, or changed meanwhile.
    """
    if target.suffix.lower() != ".zip":
        raise RequestError(f"'{target}' must end in .zip: a packed bundle is a zip archive")
    if not _PART.fullmatch(bundle.name):
        raise BundleError(f"'{bundle.name}' cannot be packed: name the folder with ASCII letters, digits, _, - and .")
    files, left_out = _collect(bundle.root)
    _check_content(bundle)
    sums = {name: sha256_file(bundle.root / name) for name in files}
    check_folder(target.absolute().parent)
    with replacing(target) as temporary:
        _write_archive(bundle, sums, temporary)
    return Packed(target, sha256_file(target), tuple(files), tuple(left_out))


def unpack(archive: Path, folder: Path | None = None) -> Bundle:
    """Unpack a bundle that `pack` wrote. Nothing about the archive is believed; nothing in it is run.

    Names, kinds, sizes, hashes and contents are checked. The folder appears whole, or not at all.

    Args:
        archive: the zip archive.
        folder: new folder for the bundle; its packed name, in the current folder, if not given.

    Raises:
        RequestError: no such archive.
        OutputError: the folder exists, or cannot be written.
        BundleError: the archive is not one that `pack` writes, or was changed.
        UntrustedBundleError: the bundle in it is a program.
    """
    if not archive.is_file():
        raise RequestError(f"no archive at '{archive}': give a file that `medseg bundle pack` wrote")
    with _opened(archive) as opened:
        entries = _entries(opened, archive)
        name = entries[0].filename.split("/")[0]
        target = (Path(name) if folder is None else folder).absolute()
        if target.exists() or target.is_symlink():
            raise OutputError(f"'{target}' exists: give --output NEW_FOLDER")
        check_folder(target.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as temporary:
            unpacked = Bundle(Path(temporary, name))
            sums = _extract(opened, entries[1:], unpacked.root, archive)
            _check_same(unpacked, sums, archive)
            _check_content(unpacked)
            try:
                unpacked.root.rename(target)
            except OSError as error:
                raise OutputError(f"cannot write '{target}': {error.strerror}") from error
    return Bundle(target)


def find_all(bundle: Bundle) -> list[tuple[str, Finding]]:
    """List what a bundle would run, and every file of it that could run or is not what it says, with its config's name.

    Nothing is imported, evaluated or unpickled. Configs are looked at as MONAI merges them; running a job checks
    exactly what it merges once more.

    Raises:
        BundleError: a config cannot be read.
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
    """Return the files that belong to the bundle, sorted, and what does not with the reason."""
    names, left_out, size = [], [], 0
    for name, path in _walk(root):
        if path.is_symlink() and name.rstrip("/") in _FOLDERS:
            raise BundleError(f"'{path}' is a link; put the folder itself there")
        if reason := _foreign(name, path):
            left_out.append((name, reason))
            continue
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"'{path}' is a link or no ordinary file; put the file itself there, or remove it")
        size += path.stat().st_size
        if path.stat().st_size > MAX_FILE_BYTES or size > MAX_BYTES:
            raise BundleError(f"'{path}' makes the bundle too large: {MAX_FILE_BYTES} bytes a file, {MAX_BYTES} in all")
        names.append(name)
    if len(names) >= MAX_FILES:
        raise BundleError(f"'{root}' holds {len(names)} files; a packed bundle holds fewer than {MAX_FILES}")
    return names, left_out


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a bundle with their names, sorted; folders that hold nothing of it once, as `name/`."""
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        for name in list(folders):
            inside = (here / name).relative_to(root)
            strange = inside.parts[0] not in _FOLDERS or name.startswith((".", "__"))
            if strange or (here / name).is_symlink():
                folders.remove(name)
                found.append((f"{inside.as_posix()}/", here / name))
        found += [((here / name).relative_to(root).as_posix(), here / name) for name in files]
    return iter(sorted(found))


def _foreign(name: str, path: Path) -> str:
    """Say why a file or folder is no part of a packed bundle; empty if it is."""
    parts = name.rstrip("/").split("/")
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if parts[-1].startswith("__pycache__") or path.suffix in (".pyc", ".pyo"):
        return "a cache"
    if parts[0] == "runs":
        return "results of runs"
    if name == SUMS:
        return "made anew"
    if path.suffix.lower() in _EXPORTS:
        return "an export; `medseg export` makes it again"
    if not all(_PART.fullmatch(part) for part in parts) or len(name) > _MAX_NAME:
        return "its name is not plain: ASCII letters, digits, space and ._+-"
    return "" if _BELONGS.fullmatch(name) else "no part of a bundle"


def _info(name: str, size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3
    info.external_attr = _MODE
    info.compress_type = zipfile.ZIP_STORED
    info.file_size = size
    return info


def _write_archive(bundle: Bundle, sums: Mapping[str, str], target: Path) -> None:
    """Write the files of a bundle, by name with their SHA-256, into an archive."""
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
                raise BundleError(f"'{path}' changed while it was packed; try again when nothing runs")


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy a stream; return the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


# Unpacking


class _SmallReads(io.FileIO):
    """A file that nobody reads at once into memory, however long a directory the archive claims to have."""

    def read(self, size: int | None = -1) -> bytes:
        """Read as a file does; refuse to give more than a chunk."""
        found = super().read(_CHUNK + 1 if size is None or size < 0 else min(size, _CHUNK + 1)) or b""
        if len(found) > _CHUNK:
            raise zipfile.BadZipFile(f"a directory of more than {_CHUNK} bytes")
        return found


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if path.stat().st_size > MAX_BYTES:
        raise _refusal(path, f"it has {path.stat().st_size} bytes, at most {MAX_BYTES} are taken")
    with _SmallReads(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, struct.error) as error:
            raise _refusal(path, f"its directory cannot be read ({error})") from error
        with archive:
            yield archive


def _entries(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """Return the entries of an archive, of which each is of the kind that `pack` writes."""
    entries = archive.infolist()
    if not 1 <= len(entries) <= MAX_FILES:
        raise _refusal(path, f"its directory lists {len(entries)} entries; 1 to {MAX_FILES} are")
    for info in entries:
        if problem := _entry_problem(info):
            raise _refusal(path, f"the entry {ascii(info.orig_filename)[:_MAX_NAME]} {problem}")
    size, room = sum(info.file_size for info in entries), path.stat().st_size
    if size > room:
        raise _refusal(path, f"its entries have {size} bytes and it has {room}: they overlap")
    _check_names(entries, path)
    return entries


def _entry_problem(info: zipfile.ZipInfo) -> str:
    """Say what about an entry is not as `pack` writes it; empty if nothing is."""
    if problem := _name_problem(info.orig_filename):
        return problem
    if info.flag_bits & 0x1:
        return "is encrypted"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a link"
    if kind != stat.S_IFREG:
        return "is no ordinary file"
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits:
        return "is compressed or otherwise changed; packed bundles hold their files as they are"
    if info.file_size != info.compress_size or info.file_size > MAX_FILE_BYTES or info.extra or info.comment:
        return f"has {info.file_size} bytes by one entry and {info.compress_size} by another, or notes about itself"
    below = info.orig_filename.partition("/")[2]
    return "" if below == SUMS or not _foreign(below, Path(below)) else "is no part of a bundle"


def _name_problem(name: str) -> str:
    """Say what about a name could lead out of the folder, or be read differently elsewhere."""
    parts = name.split("/")
    if not name.isprintable():
        return "has control characters in its name"
    if "\\" in name or ":" in name:
        return "has a backslash or a drive letter in its name"
    if name.startswith(("/", "~")):
        return "has an absolute path"
    if ".." in parts:
        return "has a path that leads out of the bundle"
    if any(_DEVICES.fullmatch(part) for part in parts):
        return "has the name of a device"
    if len(parts) < 2 or len(name) > _MAX_NAME or not all(_PART.fullmatch(part) for part in parts):
        return "has a name that is not plain, or lies outside the bundle's folder"
    return ""


def _check_names(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Check that there is one bundle with its sums first, and that no two names can become one file."""
    top = entries[0].filename.split("/")[0]
    if entries[0].filename != f"{top}/{SUMS}":
        raise _refusal(path, f"its first entry is not NAME/{SUMS}")
    known: dict[str, tuple[str, bool]] = {}
    for info in entries:
        parts = info.filename.split("/")
        if parts[0] != top:
            raise _refusal(path, f"it holds '{info.filename}' beside the folder '{top}'")
        for depth in range(1, len(parts) + 1):
            name, is_file = "/".join(parts[:depth]), depth == len(parts)
            before = known.get(name.casefold())
            if before is not None and (is_file or before != (name, False)):
                raise _refusal(path, f"'{name}' and '{before[0]}' would be one file, at least on some computers")
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
        raise OutputError(f"cannot write '{root}': {error.strerror or error}") from error
    return sums


def _check_same(bundle: Bundle, sums: Mapping[str, str], path: Path) -> None:
    """Check that the archive has the bytes that packing its files gives, and so no others."""
    again = bundle.root.with_suffix(".zip")
    _write_archive(bundle, sums, again)
    if not filecmp.cmp(again, path, shallow=False):
        raise _refusal(path, f"packing its files gives other bytes: it, or {SUMS} in it, was changed")
    again.unlink()


def _refusal(path: Path, problem: str) -> BundleError:
    return BundleError(
        f"'{path}' was not unpacked: {problem}. Only archives that `medseg bundle pack` wrote are taken, unchanged; "
        "unpack others by other means, and look at them with `medseg bundle inspect`"
    )


# What is inside


def _check_content(bundle: Bundle) -> None:
    """Refuse a bundle without configs, or with anything that may not be in a declarative one."""
    if not (bundle.config_path("inference").is_file() and bundle.config_path("metadata").is_file()):
        raise BundleError(f"bundle '{bundle.name}' has no configs/inference.json or no configs/metadata.json")
    foreign = tuple(name for name, path in _walk(bundle.root) if _foreign(name, path))
    bad = [
        item for config, item in find_all(bundle) if not item.allowed and (config or not _is_among(item.where, foreign))
    ]
    if bad:
        lines = [f"  {item}" for item in bad[:5]] + ([f"  ... and {len(bad) - 5} more"] if bad[5:] else [])
        raise UntrustedBundleError(
            "\n".join([f"bundle '{bundle.name}' is more than data, and is neither packed nor unpacked:", *lines])
        )


def _is_among(name: str, foreign: tuple[str, ...]) -> bool:
    """Whether a file is one of those that are left out, or lies in one of the folders that are."""
    return any(name == other.rstrip("/") or (other.endswith("/") and name.startswith(other)) for other in foreign)


def _find_weights(root: Path, metadata: dict[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with the weight files: not the ones that the metadata names, or more than tensors."""
    listed = metadata.get("weights", {})
    if not isinstance(listed, dict):
        yield Finding("configs/metadata.json: weights", "value", repr(listed), False, "must list files")
        listed = {}
    for name, entry in listed.items():
        path = root / name
        wanted = entry.get("sha256") if isinstance(entry, dict) else None
        if not isinstance(wanted, str) or not all(_PART.fullmatch(part) for part in name.split("/")):
            yield Finding("configs/metadata.json: weights", "value", name, False, "must be a file and its sha256")
        elif path.is_file() and sha256_file(path) != wanted.lower():
            yield Finding(name, "weights", sha256_file(path), False, "not the SHA-256 that the metadata lists")
    for path in sorted(root.glob("models/*.pt")):
        if path.is_file() and path.resolve().is_relative_to(root.resolve()):
            yield from find_pickled(path, path.relative_to(root).as_posix())
