"""Tables of `medseg doctor`: cases, findings, changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from medseg.cli.console import errors, output
from medseg.cli.layout import Column, show_table
from medseg.errors import by

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from medseg.checks.subjects import Finding
    from medseg.diagnosis.doctor import Findings
    from medseg.io.survey import FileFacts

__all__ = ["print_cases", "print_changes", "print_findings"]

_COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}
_MAX_ROWS = 40
_FULL_ROWS = 10
_SHOWN = 3
_VALUES = 6


def print_cases(found: Findings) -> None:
    """Print a row for each case; tables of many cases omit counts and percentiles."""
    compact = len(found.cases) > _FULL_ROWS
    numbers = ("min", "median" if compact else "1 / 50 / 99 %", "max")
    columns = [
        *map(Column, ("case", "part", "format")),
        *(Column(name, number=True) for name in ("shape", "mm")),
        *map(Column, ("axes", "type")),
        *(Column(name, number=True) for name in numbers),
        Column("labels"),
    ]
    rows = [_row(case.name, case.part, case.image, case.label, compact=compact) for case in found.cases[:_MAX_ROWS]]
    show_table(columns, rows, title=f"{len(found.cases)} cases")
    if len(found.cases) > _MAX_ROWS:
        output.print(f"and {len(found.cases) - _MAX_ROWS} more; --json FILE lists all")


def _row(name: str, part: str, image: FileFacts | None, label: FileFacts | None, *, compact: bool) -> list[str | Text]:
    values = _label_text(label, compact=compact)
    if image is None:
        return [name, part, Text("not read", style="red"), *[""] * 7, values]
    shares = image.percentiles[1:2] if compact else image.percentiles
    return [
        name,
        part,
        image.format,
        by(image.shape) + (f" ({image.channels})" if image.channels > 1 else ""),
        "x".join(f"{step:.3g}" for step in image.spacing),
        image.orientation,
        image.dtype,
        f"{image.minimum:.5g}",
        " / ".join(f"{value:.4g}" for value in shares),
        f"{image.maximum:.5g}",
        values,
    ]


def _label_text(label: FileFacts | None, *, compact: bool) -> str:
    if label is None:
        return ""
    if len(label.labels) > _VALUES:
        return f"{len(label.labels)} values, {min(label.labels)} to {max(label.labels)}"
    return ", ".join(str(value) if compact else f"{value}: {count:,}" for value, count in label.labels.items())


def print_findings(findings: Sequence[Finding]) -> None:
    """Print the number of findings, then each kind with its first messages."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind), []).append(finding)
    counts = {severity: sum(item.severity == severity for item in findings) for severity in _COLORS}
    output.print(", ".join(f"{count} {severity}s" for severity, count in counts.items()))
    for (severity, kind), group in groups.items():
        repairable = sum(bool(item.repair) for item in group)
        note = f", {repairable} can be repaired with --fix" if repairable else ""
        output.print(f"[bold {_COLORS[severity]}]{severity}[/] [bold]{kind}[/] ({len(group)}{note})", markup=True)
        for item in group[:_SHOWN]:
            output.print(f"  {_named(item)}")
        if len(group) > _SHOWN:
            output.print(f"  and {len(group) - _SHOWN} more")


def _named(finding: Finding) -> str:
    known = not finding.cases or any(name in finding.message for name in finding.cases)
    return finding.message if known else f"{finding.cases[0]}: {finding.message}"


def print_changes(found: Findings, folder: Path) -> None:
    """Print the changes of a repaired copy, and its remaining errors."""
    changes, remaining = found.changes, found.repaired or found
    for change in changes[:_MAX_ROWS]:
        output.print(f"changed {change.file}: {change.what}")
    if len(changes) > _MAX_ROWS:
        output.print(f"and {len(changes) - _MAX_ROWS} more")
    output.print(f"{len(changes)} changes; {remaining.errors} errors remain; see {folder / 'changes.json'}")
    for finding in remaining.findings:
        if finding.severity == "error":
            errors.print(f"remains: {finding.kind}: {_named(finding)}")
