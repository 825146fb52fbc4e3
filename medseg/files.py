"""Files: atomic writing, checksums, and strict JSON without duplicate keys or non-finite numbers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import BundleError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_folder", "load_json", "replace_text", "replacing", "sha256_file", "stamp"]

MAX_CONFIG_BYTES: Final = 16 * 2**20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it to `path` on success and remove it on failure.

    The temporary name keeps the suffixes of `path`, because writers infer the format from them.

    Raises:
        OutputError: The folder is not writable.
    """
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def replace_text(path: Path, text: str) -> Path:
    r"""Write `text` to `path` atomically, as UTF-8; return the path.

    Bytes of file names that are not valid UTF-8 are written as `\udce9`, which JSON reads back.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """Create a folder if it is missing, and check that it is writable.

    Raises:
        OutputError: The folder cannot be created or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to '{folder}': {error.strerror}; choose a folder where you may write"
        ) from error


def load_json(path: Path) -> dict[str, Any]:
    """Read a config file, rejecting JSON that parsers interpret differently.

    Args:
        path: JSON file with an object, in UTF-8, of at most `MAX_CONFIG_BYTES`.

    Raises:
        BundleError: The file cannot be read, is too large or too deeply nested, is not JSON, or has a
            duplicate key or a non-finite number.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise BundleError(f"{path} is not a config: expected a file of at most {MAX_CONFIG_BYTES} bytes")
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise BundleError(f"{path} is nested too deeply for a config") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read the config {path}: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} has a {type(content).__name__} at its top level; expected a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"duplicate key {json.dumps(key)}")
        content[key] = value
    return content


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def stamp(source: str) -> str:
    """Return a checksum that identifies an input by its path and the sizes and modification times of its files.

    No content is read. A copied, moved or modified input has a different checksum; the detached data file of a
    header is not considered.

    Args:
        source: File, or folder with the files directly in it; may end in `::` and a series number.
    """
    location = Path(source)
    if not location.exists() and "::" in source:
        location = Path(source.rpartition("::")[0])
    files = sorted(path for path in location.iterdir() if path.is_file()) if location.is_dir() else [location]
    digest = hashlib.sha256(os.fsencode(os.path.abspath(source)))  # noqa: PTH100  (links keep their own path)
    for file in files:
        with suppress(OSError):
            state = file.stat()
            digest.update(b"\0" + os.fsencode(file.name) + f"\0{state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
