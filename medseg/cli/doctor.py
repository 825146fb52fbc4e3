"""`medseg doctor`: what images and labels would be read as, what is wrong with them, and repaired copies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.bundle.catalog import find_bundle, merged
from medseg.cli.console import errors, output, progress
from medseg.errors import BundleError, RequestError, by
from medseg.files import replace_text
from medseg.io.dicom.detect import split_series

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.checks.subjects import Finding
    from medseg.checks.suitability import Needs
    from medseg.diagnosis.doctor import Report
    from medseg.diagnosis.repair import Change
    from medseg.io.survey import FileFacts

__all__ = ["doctor"]

_COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}
_MAX_ROWS = 40
_FULL_ROWS = 10
_SHOWN = 3
_VALUES = 6
# A key of a label mapping, and the directions of three axes.
_VALUE = re.compile(r"other|-?[0-9]{1,18}")
_AXES = re.compile(r"(?!.*[LR].*[LR])(?!.*[AP].*[AP])(?!.*[IS].*[IS])[LRAPIS]{3}")


def doctor(
    path: Annotated[str, typer.Argument(help="An image, a folder, a data set, or its dataset.json.", metavar="PATH")],
    fix: Annotated[
        Path | None, typer.Option("--fix", metavar="OUT", help="Write a repaired copy into this new folder.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report to this file.")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", metavar="NAME", help="Also check them against what this bundle needs.")
    ] = None,
) -> None:
    """Open everything, and say what would be read, what disagrees, and what cannot be used."""
    if not split_series(path)[0].exists():
        raise RequestError(f"'{path}' does not exist: check the path.")
    needs = _bundle_needs(bundle) if bundle else None
    if fix is not None:
        _check_target(fix, split_series(path)[0])
    from medseg.diagnosis.doctor import examine

    with progress("cases") as report:
        found = examine(path, needs=needs, report=report)
    _print_cases(found)
    _print_findings(found.findings)
    changes: Sequence[Change] = ()
    remaining = found
    if fix is not None:
        from medseg.diagnosis.repair import repair

        with progress("cases") as report:
            changes = repair(found, fix, report=report)
            remaining = examine(fix / Path(path).name if path.endswith(".json") else fix, needs=needs, report=report)
        _write_changes(fix, changes, remaining)
        _print_changes(fix, changes, remaining)
    if json_file is not None:
        replace_text(json_file, json.dumps(found.to_json(), indent=1) + "\n")
    raise typer.Exit(1 if remaining.errors else 0)


def _check_target(target: Path, source: Path) -> None:
    """Refuse a folder that holds something, and one within what is examined, or around it."""
    out, root = target.resolve(), source.resolve()
    root = root if root.is_dir() else root.parent
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RequestError(f"'{target}' exists and is not empty: --fix writes into a new folder.")
    if out.is_relative_to(root) or root.is_relative_to(out):
        raise RequestError(f"'{target}' lies within the data, or around it: --fix needs a folder elsewhere.")


def _bundle_needs(name: str) -> Needs:
    """Read from its configs what a bundle asks of its data; knobs of another form do not count."""
    bundle = find_bundle(name)
    try:
        shape = bundle.metadata["network_data_format"]["inputs"]["image"]
        spatial_dims, channels = len(shape["spatial_shape"]), int(shape["num_channels"])
        modality = shape.get("modality")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"bundle '{bundle.name}' does not describe its input: expected metadata.json to give spatial_shape and "
            "num_channels of the image under network_data_format."
        ) from error
    train = merged(bundle.load_configs("train")) if bundle.config_path("train").is_file() else {}
    mapping, orientation = _numbers_by_name(train.get("label_mapping")), train.get("orientation")
    spacing = _numbers(train.get("spacing"), 3) if spatial_dims == 3 else None
    window = _numbers(train.get("intensity_range"), 2)
    from medseg.checks.suitability import Needs

    return Needs(
        name=bundle.name,
        spatial_dims=spatial_dims,
        channels=channels,
        mapping=mapping if all(map(_VALUE.fullmatch, mapping or ())) else None,
        modality=str(modality or ""),
        label_names=_numbers_by_name(train.get("label_names")) or {},
        classes=bundle.label_names,
        spacing=spacing if spacing and min(spacing) > 0 else None,
        orientation=orientation if isinstance(orientation, str) and _AXES.fullmatch(orientation) else "RAS",
        intensity_range=(window[0], window[1]) if window else None,
    )


def _numbers_by_name(value: Any) -> dict[str, int] | None:
    """Return the value of a knob that is an object of whole numbers."""
    fits = isinstance(value, dict) and all(type(number) is int for number in value.values())
    return dict(value) if fits else None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """Return the value of a knob that is so many numbers; the configs of others may hold anything there."""
    if isinstance(value, list) and len(value) == count and all(isinstance(item, int | float) for item in value):
        return tuple(float(item) for item in value)
    return None


def _print_cases(found: Report) -> None:
    """Print a line per case; of many cases without counts and percentiles, so that a line is one line."""
    from rich.box import HEAVY_HEAD
    from rich.table import Table

    compact = len(found.cases) > _FULL_ROWS
    table = Table(title=f"{len(found.cases)} cases", title_justify="left", box=None if compact else HEAVY_HEAD)
    middle = "median" if compact else "1 / 50 / 99 %"
    for column in ("case", "part", "format", "shape", "mm", "axes", "type", "min", middle, "max", "labels"):
        table.add_column(column, overflow="ellipsis" if compact else "fold", no_wrap=compact)
    for case in found.cases[:_MAX_ROWS]:
        table.add_row(*_row(case.name, case.part, case.image, case.label, compact=compact))
    output.print(table, markup=True)
    if len(found.cases) > _MAX_ROWS:
        output.print(f"and {len(found.cases) - _MAX_ROWS} more; --json FILE has them all")


def _row(name: str, part: str, image: FileFacts | None, label: FileFacts | None, *, compact: bool) -> list[str]:
    from rich.markup import escape

    values = _label_text(label, compact=compact)
    if image is None:
        return [escape(name), part, "[red]not read[/]", *[""] * 7, values]
    shares = image.percentiles[1:2] if compact else image.percentiles
    return [
        escape(name),
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


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print counts, then each kind once with the first messages."""
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
            output.print(f"  {_named(item)}", markup=False, soft_wrap=True)
        if len(group) > _SHOWN:
            output.print(f"  and {len(group) - _SHOWN} more")


def _named(finding: Finding) -> str:
    known = not finding.cases or any(name in finding.message for name in finding.cases)
    return finding.message if known else f"{finding.cases[0]}: {finding.message}"


def _write_changes(folder: Path, changes: Sequence[Change], remaining: Report) -> None:
    from dataclasses import asdict

    from medseg.version import __version__

    content: dict[str, Any] = {
        "medseg": __version__,
        "changes": [asdict(change) for change in changes],
        "remaining": remaining.to_json()["findings"],
    }
    replace_text(folder / "changes.json", json.dumps(content, indent=1) + "\n")


def _print_changes(folder: Path, changes: Sequence[Change], remaining: Report) -> None:
    for change in changes[:_MAX_ROWS]:
        output.print(f"changed {change.file}: {change.what}", markup=False, soft_wrap=True)
    if len(changes) > _MAX_ROWS:
        output.print(f"and {len(changes) - _MAX_ROWS} more")
    output.print(f"{len(changes)} changes; {remaining.errors} errors remain; see {folder / 'changes.json'}")
    for finding in remaining.findings:
        if finding.severity == "error":
            errors.print(f"remains: {finding.kind}: {_named(finding)}", markup=False, soft_wrap=True)
