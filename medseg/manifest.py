"""The record of a run: software, bundle, settings, and the outcome of each case.

A manifest is one JSON file (UTF-8, two-space indent, fixed order of fields, no NaN or infinity). It is rewritten
atomically after each case, so a killed run leaves a valid file with `"status": "running"`. Fields::

    manifest_version  int      1
    command           str      "predict", "train", "evaluate", ...
    status            str      "running" | "done" | "partial" (some cases failed) | "aborted" (an error ended the run)
    started           str      UTC, "2026-01-31T12:00:00Z"
    finished          str?     UTC; null while running
    error             str?     error that ended an aborted run
    arguments         [str]    names of the options given, without their values
    bundle            object?  name str, version str?, config_sha256 str?, weights_sha256 str?
    knobs             object   every setting in force -> its value, sorted by name
    overrides         [str]    names of the settings that the user changed
    seeds             object   name of the seeded component -> int
    device            str      "cpu", "cuda:0", ...
    software          object   python and package -> version str? (null: not installed)
    machine           object   platform str, cpu str, cpus int, threads int?, accelerator str?
    notes             [str]    further remarks, such as the initial weights of a training
    warnings          [object] of the run, or of the data of a training: code str (a key of
                               `medseg.notices.CODES`), text str, file str (file name; "" for none)
    stages            object   stage -> seconds, summed over the cases
    validations       [object] during training: epoch int and each metric -> float?, in order
    peak_memory       object   host_bytes int?, device_bytes int? (null: unknown or unused)
    counts            object   done, failed, skipped: int
    cases             [object] sorted by name: name str, status "done" | "failed" | "skipped", seconds float,
                               error str?, output str?, metrics object (metric -> float?; null where undefined),
                               source str? (checksum of the input's path, size and time), warnings [object] as above

A trailing ? marks a field that may be null. Files of earlier versions without `notes` or `warnings` are read as
if these were empty.

Privacy: no host or user name, header value, command line or input folder is recorded, and a setting that holds an
absolute path is reduced to its last part. Names chosen by the user can still identify a person: the name of a case and
its output (the input's file name), and error messages, which contain the file name and sometimes its folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from medseg.errors import CaseError, MedsegError, RequestError
from medseg.files import replace_text
from medseg.machine import core_count, cpu_name, peak_bytes
from medseg.notices import CaseWarning, collect, read_warnings, summarize, warn
from medseg.types import Skipped
from medseg.version import installed_versions

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["BundleRecord", "CaseRecord", "Manifest"]

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 1
PACKAGES = ("torch", "monai", "numpy", "nibabel", "SimpleITK", "pydicom")

CaseStatus = Literal["done", "failed", "skipped"]
RunStatus = Literal["running", "done", "partial", "aborted"]


@dataclass(frozen=True)
class BundleRecord:
    """Name and version of the bundle that ran, and the SHA-256 (hexadecimal) of its config and weights."""

    name: str
    version: str | None = None
    config_sha256: str | None = None
    weights_sha256: str | None = None


@dataclass
class CaseRecord:
    """Outcome of one case.

    Attributes:
        name: Name of the case, the input's file name.
        status: "done", "failed", or "skipped" (nothing to do; `error` may hold the reason).
        seconds: Wall-clock time in seconds.
        error: Error message; None without an error.
        output: File name of the result, relative to the manifest's folder.
        metrics: Metric -> value; non-finite values are undefined and written as null.
        source: Checksum of the input from `medseg.files.stamp`; None if not computed.
        warnings: Warnings of the case: what was assumed, skipped, repaired or replaced.
    """

    name: str
    status: CaseStatus = "done"
    seconds: float = 0.0
    error: str | None = None
    output: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    source: str | None = None
    warnings: list[CaseWarning] = field(default_factory=list)

    def fail(self, error: BaseException) -> None:
        """Mark the case as failed and clear its output."""
        self.status, self.error, self.output = "failed", _message(error), None


def _machine() -> dict[str, str | int | None]:
    known: dict[str, Any] = {"platform": platform.platform(), "cpu": cpu_name(), "cpus": core_count()}
    return {**known, "threads": None, "accelerator": None}


def _utc_now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Manifest:
    """The record of a run; the module docstring lists the fields of the file.

    As a context manager it writes the file at the start and, with the final status, at the end::

        with Manifest("predict", bundle=bundle, path=output / "manifest.json") as manifest:
            for name in names:
                with manifest.case(name) as record:
                    record.output = segment(name).name

    Args:
        command: Name of the subcommand, never the whole command line.
        bundle: The bundle used.
        arguments: Names of the options given, without their values, which may be paths that identify patients.
        knobs: Every setting in force and its value.
        overrides: Names of the settings that the user changed.
        seeds: Name of the seeded component -> seed.
        device: Device of the network.
        path: File to keep up to date; with None, only `write(path)` writes.
        strict: Whether a warning fails its case, or aborts the run if it belongs to no case. Not in the file.

    Attributes:
        skipped: Input files that are not predicted; not in the file.
        notes: Further remarks on the run.
        warnings: Warnings of the run, or of the data of a training.
        stages: Stage -> seconds so far.
        validations: Epoch and metrics of each validation so far.
        cases: Name of the case -> record.
        earlier: Names of the cases whose results come from an earlier run; not in the file.
    """

    command: str
    _: KW_ONLY
    bundle: BundleRecord | None = None
    arguments: list[str] = field(default_factory=list)
    knobs: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    seeds: dict[str, int] = field(default_factory=dict)
    device: str = "cpu"
    path: Path | None = None
    strict: bool = False
    status: RunStatus = "running"
    started: str = field(default_factory=_utc_now)
    finished: str | None = None
    error: str | None = None
    software: dict[str, str | None] = field(default_factory=lambda: installed_versions(PACKAGES))
    machine: dict[str, str | int | None] = field(default_factory=_machine)
    notes: list[str] = field(default_factory=list)
    warnings: list[CaseWarning] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    validations: list[dict[str, float]] = field(default_factory=list)
    peak_memory: dict[str, int | None] = field(default_factory=lambda: {"host_bytes": None, "device_bytes": None})
    cases: dict[str, CaseRecord] = field(default_factory=dict)
    earlier: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    skipped: tuple[Skipped, ...] = field(default=(), init=False, repr=False, compare=False)
    _read_back: bool = field(default=False, init=False, repr=False, compare=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False, repr=False, compare=False)

    def __enter__(self) -> Self:
        self.warnings = self._open.enter_context(collect(strict=self.strict, earlier=self.warnings))
        self._save()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self.finished = _utc_now()
        self.status = "aborted" if error else "partial" if self.counts["failed"] else "done"
        self.error = _message(error) if error else None
        self._save()

    @contextmanager
    def case(self, name: str, *, source: str | None = None) -> Iterator[CaseRecord]:
        """Time one case and record its outcome, and the checksum of its input from `stamp`.

        A `CaseError` marks the case as failed and is suppressed, so that the next case can start; check
        `record.status` afterward. Any other exception marks it as failed too and is re-raised, because it does not
        concern this case alone. The body may set `output`, `metrics` and, for a case with nothing to do,
        `status = "skipped"`. Its warnings are added to the record.
        """
        record = CaseRecord(name, source=source)
        start = time.perf_counter()
        try:
            with collect(name, earlier=record.warnings):
                yield record
        except CaseError as error:
            record.fail(error)
        except BaseException as error:
            record.fail(error)
            raise
        finally:
            record.seconds = time.perf_counter() - start
            self.add_case(record)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the body to the seconds of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def add_case(self, record: CaseRecord) -> None:
        """Add a finished case, replacing an earlier record of that name, and update the file."""
        self.cases[record.name] = record
        self.earlier.discard(record.name)
        self._save()

    def resume(self, sources: Mapping[str, str] | None = None) -> set[str]:
        """Load the finished cases of an earlier, identical run from the file at `path`.

        Call it before the run starts to write there, that is, before `with`. The cases keep their records, so they
        stay in the file even if this run is killed too. The caller has to check that their outputs still exist.

        Args:
            sources: Case name -> checksum of its input from `stamp`; a case whose input has changed is not resumed.

        Returns:
            Names of the resumed cases; empty if there is no such file, or its bundle, settings or seeds differ.
        """
        if self.path is None or not self.path.exists():
            return set()
        earlier = Manifest.read(self.path)
        changes = self._changes_since(earlier)
        if changes:
            text = f"the earlier run differs in its {', '.join(changes)}; no case is resumed"
            with collect(strict=self.strict, earlier=self.warnings):
                warn(logger, "resume-ignored", text, self.path, run=True)
            return set()
        wanted = sources or {}
        found = {
            name: record
            for name, record in earlier.cases.items()
            if earlier.is_done(name)
            and wanted.get(name, record.source) == record.source
            and not (self.strict and record.warnings)
        }
        self.cases.update(found)
        self.earlier = set(found)
        return set(found)

    def add_validation(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a validation during training, and update the file."""
        self.validations.append({"epoch": epoch, **metrics})
        self._save()

    def is_done(self, name: str) -> bool:
        """Return whether this case has a result, from this run or from an earlier one."""
        record = self.cases.get(name)
        return record is not None and record.status != "failed" and record.output is not None

    def _changes_since(self, other: Manifest) -> list[str]:
        """Return the names of the fields in which two runs differ, as shown to users."""
        ours, theirs = self.to_dict(), other.to_dict()
        names = {"command": "command", "bundle": "bundle", "knobs": "settings", "seeds": "seeds"}
        return [name for key, name in names.items() if ours[key] != theirs[key]]

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases that are done, failed and skipped."""
        statuses = [record.status for record in self.cases.values()]
        return {status: statuses.count(status) for status in ("done", "failed", "skipped")}

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0, or 1 if a case failed."""
        return 1 if self.counts["failed"] else 0

    def __str__(self) -> str:
        bundle = f" with {self.bundle.name} {self.bundle.version or ''}".rstrip() if self.bundle else ""
        counts = "".join(f", {count} {status}" for status, count in self.counts.items() if count)
        lines = [f"{self.command}{bundle}: {self.status}{counts}"]
        lines += [f"error: {self.error}"] if self.error else []
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"validated {len(self.validations)} times"] if self.validations else []
        lines += [f"warning: {line}" for line in summarize(self._warnings_by_case())]
        lines += [f"failed: {case.name}: {case.error}" for case in self.cases.values() if case.status == "failed"]
        return "\n".join([*lines, *([f"manifest: {self.path}"] if self.path else [])])

    def _warnings_by_case(self) -> list[tuple[str, CaseWarning]]:
        of_cases = [(record.name, warning) for record in self.cases.values() for warning in record.warnings]
        return [("", warning) for warning in self.warnings] + of_cases

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file as JSON types, in the order of the file."""
        content = {
            "manifest_version": MANIFEST_VERSION,
            "command": self.command,
            "status": self.status,
            "started": self.started,
            "finished": self.finished,
            "error": self.error,
            "arguments": sorted(self.arguments),
            "bundle": asdict(self.bundle) if self.bundle else None,
            "knobs": _without_folders({name: self.knobs[name] for name in sorted(self.knobs)}),
            "overrides": sorted(self.overrides),
            "seeds": {name: self.seeds[name] for name in sorted(self.seeds)},
            "device": self.device,
            "software": self.software,
            "machine": self.machine,
            "notes": self.notes,
            "warnings": [warning.to_dict() for warning in self.warnings],
            "stages": {name: round(seconds, 3) for name, seconds in self.stages.items()},
            "validations": self.validations,
            "peak_memory": self.peak_memory,
            "counts": self.counts,
            "cases": [_case_dict(self.cases[name]) for name in sorted(self.cases)],
        }
        plain: dict[str, Any] = _plain(content)
        return plain

    def write(self, path: str | Path) -> Path:
        """Write the file atomically and return its path.

        Raises:
            OutputError: The file cannot be written.
        """
        self._measure()
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        return replace_text(Path(path), text + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Read a manifest; its `path` is None, so that nothing overwrites the file by accident.

        Raises:
            RequestError: The file is missing, or is not a manifest of this version.
        """
        path = Path(path)
        content = _read_json(path)
        try:
            bundle = content["bundle"]
            known = {f.name for f in fields(cls) if f.init} - {"bundle", "cases", "notes", "path", "strict", "warnings"}
            manifest = cls(
                bundle=BundleRecord(**bundle) if bundle else None,
                cases={
                    case["name"]: CaseRecord(**{**case, "warnings": read_warnings(case.get("warnings", []))})
                    for case in content["cases"]
                },
                notes=content.get("notes", []),  # missing, like the warnings, in the first manifests
                warnings=read_warnings(content.get("warnings", [])),
                **{name: content[name] for name in known},
            )
        except (KeyError, TypeError) as error:
            raise RequestError(
                f"{path.name} is not a complete run manifest ({error}). Give a manifest written by a run."
            ) from error
        manifest._read_back = True
        return manifest

    def _save(self) -> None:
        if self.path is not None:
            self.write(self.path)

    def _measure(self) -> None:
        """Update the values that only the running process knows; those of torch only if it is already imported."""
        if self._read_back:
            return
        torch = sys.modules.get("torch")
        self.peak_memory["host_bytes"] = peak_bytes() or None
        if torch is None:
            return
        self.machine["threads"] = torch.get_num_threads()
        if self.device.startswith("cuda") and torch.cuda.is_available():
            self.machine["accelerator"] = torch.cuda.get_device_name(self.device)
            self.peak_memory["device_bytes"] = torch.cuda.max_memory_allocated(self.device)


def _case_dict(record: CaseRecord) -> dict[str, Any]:
    metrics = {name: record.metrics[name] for name in sorted(record.metrics)}
    warnings = [warning.to_dict() for warning in record.warnings]
    return {**asdict(record), "seconds": round(record.seconds, 3), "metrics": metrics, "warnings": warnings}


def _message(error: BaseException) -> str:
    """Return the message of an error, preceded by its type unless it is a medseg error."""
    if isinstance(error, MedsegError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _plain(value: Any) -> Any:
    """Convert a value to JSON types: numpy scalars to numbers, non-finite values to null, anything else to text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return Path(value).name
    # numpy and torch scalars and arrays, recognized without importing either
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _without_folders(value: Any) -> Any:
    """Convert a value to JSON types and shorten each absolute path in it to its last part."""
    value = _plain(value)
    if isinstance(value, str):
        return PurePath(value).name if PurePath(value).is_absolute() else value
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    return [_without_folders(item) for item in value] if isinstance(value, list) else value


def _read_json(path: Path) -> dict[str, Any]:
    """Read the JSON of a manifest and check its version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fault = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else f"is not JSON ({error})"
        raise RequestError(f"{path.name} {fault}; expected a run manifest. Check the name.") from error
    known: dict[str, Any] = content if isinstance(content, dict) else {}
    if (version := known.get("manifest_version")) != MANIFEST_VERSION:
        raise RequestError(
            f"{path.name} has manifest_version {version!r}; expected {MANIFEST_VERSION}. "
            "Give a manifest written by this version of medseg."
        )
    return known
