"""Files: writing them whole or not at all, checksums, and JSON that has one meaning only."""

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
    """Give a temporary path beside `path`; move it there when the block ends well, remove it when it does not.

    The temporary name keeps the suffixes of `path`, because writers choose the format by them.

    Raises:
        OutputError: the folder cannot be written to.
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

    What UTF-8 lacks, the bytes of a file name that is in another coding, becomes `\udce9`, which JSON reads back.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """Make a folder if it is missing, and make sure that files can be written there.

    Raises:
        OutputError: they cannot.
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
    """Read a config file so that no two readers can see different things in it.

    Args:
        path: a JSON file that holds an object, in UTF-8, of at most `MAX_CONFIG_BYTES`.

    Raises:
        BundleError: the file cannot be read, is too large or too deeply nested, is not JSON, repeats a key, or holds
            a number that is not finite.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise BundleError(f"{path} is not a file of at most {MAX_CONFIG_BYTES} bytes, which a config must be")
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise BundleError(f"{path} is nested too deeply for a config") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read the config {path}: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds a {type(content).__name__}; a config is a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {json.dumps(key)} stands there twice")
        content[key] = value
    return content


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def stamp(source: str) -> str:
    """Return a checksum that identifies an input: of its path, and the sizes and times of its files.

    No content is read. After a copy, a move or a change an input counts as another one; a detached file of voxels
    beside a header is not considered.

    Args:
        source: File, or folder with the files directly in it; `::` and the number of a series may follow.
    """
    place = Path(source)
    if not place.exists() and "::" in source:
        place = Path(source.rpartition("::")[0])
    files = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]
    digest = hashlib.sha256(os.fsencode(os.path.abspath(source)))  # noqa: PTH100  (links are places of their own)
    for file in files:
        with suppress(OSError):
            state = file.stat()
            digest.update(b"\0" + os.fsencode(file.name) + f"\0{state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
