"""Every exception that medseg raises on purpose.

::

    MedsegError                       "error"      exit code 1
    ├── RequestError                  "request"    an invalid request (exit code 2)
    │   ├── BundleError               "bundle"     a bundle is missing, incomplete or malformed
    │   │   └── UntrustedBundleError  "untrusted"  it contains executable code and is not trusted
    │   ├── WeightsError              "weights"    a weight file is missing, altered or of another network
    │   └── OutputError               "output"     a result cannot be written to its destination
    ├── CaseError                     "case"       one input cannot be used; other cases continue (exit code 1)
    │   └── GeometryError             "geometry"   an image has no valid geometry, or one that contradicts another
    └── SizeError                     "size"       an array does not fit a network (exit code 2, also a ValueError)

Each error carries `code` (in quotes above; a raise site may give a finer one, see `CODES`), `path` and `data`, so that
programs need not parse its message. The message says what was found, what was expected and what to do. MONAI wraps
exceptions of transforms and of config components: `own_error` unwraps the medseg error.
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

# The finer codes that an error may carry in place of the code of its class.
CODES: Final[Mapping[str, str]] = {
    "channels": "The number of channels (values per voxel) is not the expected one.",
    "damaged": "A file is damaged or truncated.",
    "format": "A file has a format that medseg does not read.",
    "memory": "The work needs more memory than is available or allowed.",
    "missing": "A file or folder does not exist.",
    "missing-package": "An optional package is not installed or cannot be imported.",
    "no-resolution": "A slide has no pixel size (resolution).",
    "no-split": "A data set has no split into training and validation cases.",
    "nonfinite": "An image has non-finite values (NaN or Inf).",
}

# Messages of PyTorch's CPU allocator, which raises a plain RuntimeError.
_NO_MEMORY: Final = ("not enough memory", "can't allocate memory")


class MedsegError(Exception):
    """Base of all medseg errors.

    Args:
        message: What is wrong, what was found, what was expected and what to do.
        code: Machine-readable name of the fault, such as "nonfinite"; by default the code of the class.
        path: File or folder at fault.
        **data: Further facts as JSON values, such as `found` and `expected`.

    Attributes:
        exit_code: Exit code of the command line for the error.
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
        """Return the error as JSON values, from which `error_from_json` restores it, also in another process."""
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
    """One input cannot be used; the other cases of a run continue."""

    code = "case"


class GeometryError(CaseError):
    """An image has no valid geometry, or one that contradicts another."""

    code = "geometry"


class SizeError(MedsegError, ValueError):
    """The size of an array does not fit the network."""

    code = "size"
    exit_code = 2


def error_from_json(content: Mapping[str, Any]) -> MedsegError:
    """Return the error that `MedsegError.to_json` described; a plain `MedsegError` if its class is unknown."""
    kind = globals().get(str(content["type"]))
    known = kind if isinstance(kind, type) and issubclass(kind, MedsegError) else MedsegError
    return known(content["message"], code=content["code"], path=content["path"], **content["data"])


def by(size: Sequence[int]) -> str:
    """Format a size for messages: `(48, 64, 48)` becomes 48x64x48."""
    return "x".join(map(str, size))


def in_a_line(error: BaseException) -> str:
    """Return the type and the first line of a foreign exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(":. ")


def links(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its chain of causes and contexts, outermost first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def own_error(error: BaseException) -> MedsegError | None:
    """Return the medseg error that `error` is or wraps; None if there is none."""
    return next((link for link in links(error) if isinstance(link, MedsegError)), None)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception or one that it wraps is an out-of-memory error of medseg, Python or PyTorch."""
    return any(_is_memory(link) for link in links(error))


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MedsegError):
        return error.code == "memory"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def shortened(text: object, folder: str | os.PathLike[str]) -> str:
    """Return a text or an error's message with the paths below `folder` made relative to it."""
    root = os.fspath(folder)
    return str(text).replace(f"{root}{os.sep}", "").replace(root, Path(root).name)


def visible(text: str) -> str:
    r"""Return a text read from a file with its non-printable characters escaped, such as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in "\n\t" else ascii(sign)[1:-1] for sign in text)
