"""Warnings: what was assumed, skipped, repaired or replaced, as records that reach the user.

Code that assumes or skips something calls `warn` with a stable code. The package's loggers (`medseg.*`) log the
warning, and the current case or run records it: `collect` gathers the warnings of its body, `medseg.manifest` writes
them to the file. In strict mode a warning is raised as an error instead, before any output of its case is written.

Warnings of another thread or process are collected there (`collect(deferred=True)`) and passed on by `forward`;
`carry` makes a function in a thread pool report to the case that called it. The package does not use Python's
`warnings.warn`, which knows no cases; a test ensures that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import PurePath
from types import MappingProxyType
from typing import Final, ParamSpec, TypeVar

from medseg.errors import CaseError, RequestError

__all__ = ["CODES", "CaseWarning", "carry", "collect", "forward", "read_warnings", "summarize", "warn"]

P = ParamSpec("P")
R = TypeVar("R")

# Every warning code and its meaning.
CODES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "backend-fallback": "A backend could not be used; another one runs the network.",
        "cache-damaged": "A prepared training case in the disk cache was damaged and is prepared again.",
        "cache-not-written": "A prepared training case could not be written to the disk cache.",
        "checkpoint-damaged": "A checkpoint is damaged and is not used.",
        "checkpoint-previous": "Training resumes from the checkpoint before the last one.",
        "context-exceeds-image": "A network's dilated convolutions reach beyond its deepest feature map.",
        "contour-clipped": "A contour of an RT-STRUCT reaches beyond the image and is clipped.",
        "contour-skipped": "A contour of an RT-STRUCT encloses no area and is skipped.",
        "exif-orientation-ignored": "An image has an EXIF rotation, which is not applied.",
        "fraction-thresholded": "A fractional DICOM SEG is thresholded at half of its maximum.",
        "gpu-fallback": "The GPU's memory is full; work runs in smaller parts or on the CPU.",
        "header-repaired": "A header field is invalid; the intended value is assumed.",
        "identity-affine": "An image has a suspicious identity affine.",
        "label-unnamed": "A label has no name; its number is used instead.",
        "levels-skipped": "Resolution levels of a slide are inconsistent and are not used.",
        "origin-assumed": "A header has no origin; 0 is assumed.",
        "overlay-skipped": "An overlay could not be drawn.",
        "positions-interpolated": "A table of position embeddings was interpolated to another size.",
        "resume-ignored": "The earlier run has another bundle, other settings or seeds; no case is resumed.",
        "sform-qform-conflict": "The sform and qform of a NIfTI file differ; the sform is used.",
        "spacing-assumed": "A header gives no voxel size along an axis; 1 mm is assumed.",
        "uid-derived": "DICOM images have no study, series or frame of reference UID; one is derived.",
        "unlabeled-skipped": "Images have no label and are skipped.",
        "values-rounded": "Integers beyond 2^24 are rounded to float32.",
    }
)
_SHOWN: Final = 3


@dataclass(frozen=True)
class CaseWarning:
    """One warning.

    Attributes:
        code: A key of `CODES`.
        text: What happened, as a phrase without the file name.
        file: Name of the file, without its folder; empty if no file is concerned.
        run: Whether it concerns the run as a whole, not one case.
        logger: Name of the logger that reports it.
    """

    code: str
    text: str
    file: str = ""
    run: bool = field(default=False, compare=False)
    logger: str = field(default="medseg", compare=False)

    def __str__(self) -> str:
        return f"{self.file}: {self.text}" if self.file else self.text

    def to_dict(self) -> dict[str, str]:
        """Return the fields that are written to files."""
        return {"code": self.code, "text": self.text, "file": self.file}


def read_warnings(entries: Iterable[Mapping[str, str]]) -> list[CaseWarning]:
    """Return the warnings read from a file, the inverse of `CaseWarning.to_dict`."""
    return [CaseWarning(entry["code"], entry["text"], entry["file"]) for entry in entries]


@dataclass
class _Scope:
    found: list[CaseWarning]
    case: str
    strict: bool
    deferred: bool
    outer: _Scope | None


_current: ContextVar[_Scope | None] = ContextVar("medseg_warnings", default=None)


def warn(logger: logging.Logger, code: str, text: str, path: object = "", *, run: bool = False) -> None:
    """Record and log that something was assumed, skipped, repaired or replaced.

    Args:
        logger: Logger of the calling module.
        code: A key of `CODES`.
        text: What happened, as a phrase without the file name and without anything that could identify a patient.
        path: The file concerned; only its name is kept.
        run: Whether it concerns the run as a whole, not the current case.

    Raises:
        CaseError: In strict mode, for a warning of a case.
        RequestError: In strict mode, for a warning of the run.
    """
    _report(CaseWarning(code, text, PurePath(str(path)).name, run, logger.name))


@contextmanager
def collect(
    case: str = "",
    *,
    strict: bool | None = None,
    deferred: bool = False,
    earlier: list[CaseWarning] | None = None,
) -> Iterator[list[CaseWarning]]:
    """Gather the warnings of the body, without duplicates.

    Args:
        case: Name of the current case; empty for a run.
        strict: Whether warnings are raised as errors; by default inherited from the enclosing block.
        deferred: Keep the warnings for `forward`: neither log nor raise them, nor report them to the enclosing block.
        earlier: List that the warnings are appended to, and that is yielded; by default a new one.
    """
    outer = None if deferred else _current.get()
    inherited = outer is not None and outer.strict
    scope = _Scope([] if earlier is None else earlier, case, inherited if strict is None else strict, deferred, outer)
    token = _current.set(scope)
    try:
        yield scope.found
    finally:
        _current.reset(token)


def forward(warnings: Iterable[CaseWarning]) -> None:
    """Report warnings that were collected in another thread or process to the current case or run.

    Raises:
        CaseError, RequestError: As in `warn`.
    """
    for warning in warnings:
        _report(warning)


def carry(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that reports its warnings to the current case or run, whatever thread calls it."""
    scope = _current.get()

    def carried(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _current.set(scope)
        try:
            return function(*args, **kwargs)
        finally:
            _current.reset(token)

    return carried


def summarize(warnings: Iterable[tuple[str, CaseWarning]]) -> list[str]:
    """Return one line for each code: its first text, the number of cases or files, and the first names.

    Args:
        warnings: Pairs of case name (empty for a run) and warning.
    """
    groups: dict[str, list[tuple[str, CaseWarning]]] = {}
    for case, warning in warnings:
        groups.setdefault(warning.code, []).append((case, warning))
    return [f"{group[0][1].text}{_counted(group)} [{code}]" for code, group in groups.items()]


def _counted(group: list[tuple[str, CaseWarning]]) -> str:
    names = list(dict.fromkeys(name for case, warning in group if (name := case or warning.file)))
    if not names:
        return f" ({len(group)} times)" if len(group) > 1 else ""
    what = "case" if all(case for case, _ in group) else "file"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    plural = "" if len(names) == 1 else "s"
    return f" ({len(names)} {what}{plural}: {', '.join(names[:_SHOWN])}{more})"


def _report(warning: CaseWarning) -> None:
    """Add a warning to its case or run, and log it if it is new there; in strict mode raise it."""
    scope = _current.get()
    while warning.run and scope is not None and scope.case and scope.outer is not None:
        scope = scope.outer
    new = scope is None or warning not in scope.found
    if scope is not None and new:
        scope.found.append(warning)
    if scope is not None and scope.strict:
        kind = RequestError if warning.run else CaseError
        text = f"{warning}. Strict mode treats this warning ({warning.code}) as an error."
        raise kind(text, code=warning.code, file=warning.file)
    if new and not (scope is not None and scope.deferred):
        extra = {"case_warning": warning, "case": scope.case if scope is not None else ""}
        logging.getLogger(warning.logger).warning("%s", warning, extra=extra, stacklevel=3)
