"""Every exception that medseg raises on purpose.

::

    MedsegError                       "error"      exit code 1
    ├── RequestError                  "request"    an invalid request (exit code 2)
    │   ├── BundleError               "bundle"     a bundle is missing, incomplete or malformed
    │   │   └── UntrustedBundleError  "untrusted"  it contains executable code and is not trusted
    │   ├── WeightsError              "weights"    a weight file is missing, altered or of another network
    │   └── OutputError               "output"     a result cannot be written to its destination
    ├── CaseError                     "case"       one input cannot be used; other cases may go on (exit code 1)
    │   └── GeometryError             "geometry"   an image has no valid geometry, or one that contradicts another
    └── SizeError                     "size"       an array does not fit a network (exit code 2, also a ValueError)

Each error carries `code` (in quotes above; a raise site may give a finer one, see `CODES`), `path` and `data`, so that
programs need not read its message. The message says what was found, what was expected and what to do. MONAI wraps what
goes wrong within a transform or a part of a config: `own_error` finds our error in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

__all__ = [
    "CODES",
    "BundleError",
    "CaseError",
    "GeometryError",
    "MedsegError",
    "OutputError",
    "RequestError",
    "SizeError",
    "UntrustedBundleError",
    "WeightsError",
    "by",
    "error_from_json",
    "in_a_line",
    "links",
    "out_of_memory",
    "own_error",
    "shortened",
    "visible",
]


Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

# The finer codes that an error may carry in place of its class's own.
CODES: Final[Mapping[str, str]] = {
    "channels": "The number of values per voxel is another than the one expected.",
    "missing-package": "An optional package is not installed, or does not load.",
    "damaged": "A file is damaged or cut short.",
    "format": "A file has a format that is not read here.",
    "memory": "The work does not fit into the memory that is there, or allowed.",
    "missing": "A file or folder does not exist.",
    "no-resolution": "A slide does not say how large its pixels are.",
    "no-split": "A data set does not say which cases are for training and which for validation.",
    "nonfinite": "An image holds NaN or infinite values.",
}

# What PyTorch's allocator for the CPU says; it raises a plain RuntimeError.
_NO_MEMORY: Final = ("not enough memory", "can't allocate memory")


class MedsegError(Exception):
    """Base of all medseg errors.

    Args:
        message: What is wrong, what was found, what was expected and what to do.
        code: Short name of the fault that programs can decide by, such as "nonfinite"; that of the class by default.
        path: File or folder that the error is about.
        **data: Further facts as JSON values, such as `found` and `expected`.

    Attributes:
        exit_code: What the command line returns for the error.
    """

    code: str = "error"
    exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str = "", *, code: str = "", path: str | os.PathLike[str] | None = None, **data: Json
    ) -> None:
        super().__init__(message)
        if code:
            self.code = code
        self.path = None if path is None else Path(path)
        self.data = data

    def to_json(self) -> dict[str, Json]:
        """Return the error as JSON values; `error_from_json` makes it anew, in another process too."""
        return {
            "type": type(self).__name__,
            "code": self.code,
            "message": str(self),
            "path": None if self.path is None else str(self.path),
            "data": self.data,
        }


class RequestError(MedsegError):
    """A request is invalid: an option, a setting or a path of the command or call."""

    code = "request"
    exit_code = 2


class BundleError(RequestError):
    """A bundle is missing, incomplete or malformed."""

    code = "bundle"


class UntrustedBundleError(BundleError):
    """A bundle contains executable code and is not trusted."""

    code = "untrusted"


class WeightsError(RequestError):
    """A weight file is missing, altered, or belongs to another network."""

    code = "weights"


class OutputError(RequestError):
    """A result cannot be written to its destination."""

    code = "output"


class CaseError(MedsegError):
    """One input cannot be used; the other cases of a run may go on."""

    code = "case"


class GeometryError(CaseError):
    """An image has no valid geometry, or one that contradicts another."""

    code = "geometry"


class SizeError(MedsegError, ValueError):
    """The size of an array does not fit the network."""

    code = "size"
    exit_code = 2


def error_from_json(content: Mapping[str, Any]) -> MedsegError:
    """Return the error that `MedsegError.to_json` described; of an unknown class, a plain `MedsegError`."""
    kind = globals().get(str(content["type"]))
    known = kind if isinstance(kind, type) and issubclass(kind, MedsegError) else MedsegError
    return known(content["message"], code=content["code"], path=content["path"], **content["data"])


def by(size: Sequence[int]) -> str:
    """Return a size as messages show it: `(48, 64, 48)` is 48x64x48."""
    return "x".join(map(str, size))


def in_a_line(error: BaseException) -> str:
    """Return the kind and the first line of an error that is not ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(":. ")


def links(error: BaseException) -> Iterator[BaseException]:
    """Give an error, the one that it was raised from or during, and so on to the first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def own_error(error: BaseException) -> MedsegError | None:
    """Return the error of ours that `error` is or wraps; None if there is none."""
    return next((link for link in links(error) if isinstance(link, MedsegError)), None)


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or one that it wraps, says that memory ran out: ours, Python's or PyTorch's."""
    return any(_is_memory(link) for link in links(error))


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MedsegError):
        return error.code == "memory"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def shortened(text: object, folder: str | os.PathLike[str]) -> str:
    """Return a message or an error's text with paths below a folder written relative to it."""
    root = os.fspath(folder)
    return str(text).replace(f"{root}{os.sep}", "").replace(root, Path(root).name)


def visible(text: str) -> str:
    r"""Return a text from a file with its control characters and hidden ones written out: `\x1b` for Escape."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in "\n\t" else ascii(sign)[1:-1] for sign in text)
