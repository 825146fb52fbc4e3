"""Warnings: what was assumed, skipped, repaired or replaced, as records that reach the user.

Whoever assumes or skips something calls `warn`, with a code that stays the same from version to version. The warning
is logged by the package's loggers (`medseg.*`), and the case or run at work keeps it: `collect` gathers the warnings
raised in its body, `medseg.manifest` writes them down. In strict mode a warning is raised as an error instead, before
anything is written for its case.

What is raised in another thread or process is collected there (`collect(deferred=True)`) and handed over by `forward`;
`carry` lets a function of a thread pool report to the case that called it. The package raises none of Python's own
warnings (`warnings.warn`), which could not tell a case; a test holds it to that.
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

# Every code, and what it stands for.
CODES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "backend-fallback": "A back end could not be used; another one runs the network.",
        "cache-damaged": "A prepared training case in the disk cache was damaged and is prepared again.",
        "cache-not-written": "A prepared training case could not be kept in the disk cache.",
        "checkpoint-damaged": "A saved training state is damaged and is not used.",
        "checkpoint-previous": "Training goes on from the state before the last one.",
        "context-exceeds-image": "A network's dilated convolutions reach beyond its deepest feature map.",
        "contour-clipped": "A contour of an RT-STRUCT reaches beyond the image and is clipped.",
        "contour-skipped": "A contour of an RT-STRUCT encloses no area and is skipped.",
        "exif-orientation-ignored": "An image has an EXIF rotation, which is not applied.",
        "fraction-thresholded": "A fractional DICOM SEG is thresholded at half of its maximum.",
        "gpu-fallback": "The GPU's memory is full; work runs in smaller parts or on the CPU.",
        "header-repaired": "A header field is invalid; the value that was meant is assumed.",
        "identity-affine": "An image has a suspicious identity affine.",
        "label-unnamed": "A label has no name and is called by its number.",
        "levels-skipped": "Resolution levels of a slide are inconsistent and are not used.",
        "origin-assumed": "A header has no origin; 0 is assumed.",
        "overlay-skipped": "An overlay could not be drawn.",
        "positions-interpolated": "A table of position embeddings was interpolated to another size.",
        "resume-ignored": "The earlier run has another bundle, other settings or seeds; no case is taken over.",
        "sform-qform-conflict": "The sform and qform of a NIfTI file differ; the sform is used.",
        "spacing-assumed": "A header gives no voxel size along an axis; 1 mm is assumed.",
        "uid-derived": "DICOM images have no UID of their study, series or frame of reference; one is derived.",
        "unlabeled-skipped": "Images have no label and are skipped.",
        "values-rounded": "Whole numbers beyond 2^24 are rounded to float32.",
    }
)
_SHOWN: Final = 3


@dataclass(frozen=True)
class CaseWarning:
    """One warning.

    Attributes:
        code: A key of `CODES`.
        text: What happened, as half a sentence without the file.
        file: Name of the file, without its folder; empty if it is about none.
        run: Whether it is about the run as a whole, not about one case.
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
        """Return what files keep of it."""
        return {"code": self.code, "text": self.text, "file": self.file}


def read_warnings(entries: Iterable[Mapping[str, str]]) -> list[CaseWarning]:
    """Return the warnings of a file, the reverse of `CaseWarning.to_dict`."""
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
    """Report that something was assumed, skipped, repaired or replaced.

    Args:
        logger: Logger of the calling module.
        code: A key of `CODES`.
        text: What happened, as half a sentence without the file and without what could name a patient.
        path: The file; only its name is kept.
        run: Whether it is about the run as a whole, not about the case at work.

    Raises:
        CaseError: The warning is about a case and the mode is strict.
        RequestError: The warning is about the run and the mode is strict.
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
    """Gather the warnings raised in the body; each counts once.

    Args:
        case: Name of the case at work; empty for a run.
        strict: Whether warnings are raised as errors; by default as around this block.
        deferred: Keep the warnings for `forward`: neither log nor raise them, nor hand any to what is around this
            block.
        earlier: List that the warnings are added to, and that is returned; a new one if not given.
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
    """Hand warnings that were collected in another thread or process to the case or run at work here.

    Raises:
        CaseError, RequestError: As `warn` does.
    """
    for warning in warnings:
        _report(warning)


def carry(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that, in whatever thread, reports its warnings to the case or run at work now."""
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
        warnings: Pairs of the case's name, empty for a run, and the warning.
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
    """Enter a warning where it belongs, and log it if it is new there, or raise it."""
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
