"""Writing files whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_folder", "replace_text", "replacing", "sha256_file"]


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
