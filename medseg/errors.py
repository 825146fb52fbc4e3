"""Every exception that medseg raises on purpose.

::

    MedsegError
    ├── RequestError          the command or the call asks for something that cannot be (exit code 2)
    │   ├── BundleError           a bundle is missing, incomplete or wrongly written
    │   │   └── UntrustedBundleError  its configs could run code that nobody vouched for
    │   ├── WeightsError          a weight file is missing, altered or of another network
    │   └── OutputError           a result cannot be written where it should go
    ├── CaseError             one input cannot be used; other cases may go on (exit code 1)
    │   └── GeometryError         its place in space is undefined or contradictory
    └── SizeError             an array does not fit a network (also a ValueError)

Each message says what was found, what was expected and what to do; `by` writes the sizes in it, `in_a_line` the
errors of others, `visible` what could disturb a terminal. MONAI wraps what goes wrong within a transform or a part of a
config: `own_error` finds the error of ours in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = [
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
    "in_a_line",
    "links",
    "own_error",
    "visible",
]


class MedsegError(Exception):
    """Base of all medseg errors; `exit_code` is what the command line returns for it."""

    exit_code = 1


class RequestError(MedsegError):
    """The command or call asks for something that cannot be."""

    exit_code = 2


class BundleError(RequestError):
    """A bundle is missing, incomplete or wrongly written."""


class UntrustedBundleError(BundleError):
    """A bundle's configs could run code that nobody vouched for."""


class WeightsError(RequestError):
    """A weight file is missing, altered, or belongs to another network."""


class OutputError(RequestError):
    """A result cannot be written where it should go."""


class CaseError(MedsegError):
    """One input cannot be used; the other cases of a run may go on."""


class GeometryError(CaseError):
    """The place of an image in space is undefined or contradictory."""


class SizeError(MedsegError, ValueError):
    """An array's size does not fit the network it was given to."""

    exit_code = 2


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


def visible(text: str) -> str:
    r"""Return a text from a file with its control characters and hidden ones written out: `\x1b` for Escape."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in "\n\t" else ascii(sign)[1:-1] for sign in text)
