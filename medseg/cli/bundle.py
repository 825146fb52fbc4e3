"""`medseg bundle build | check | list | inspect | pack | unpack`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.bundle import archive
from medseg.bundle.build import build as build_bundle
from medseg.bundle.catalog import find_bundle, shipped_bundles
from medseg.bundle.trust import fingerprint
from medseg.cli.console import BundleName, PlainConsole, errors, output, progress
from medseg.errors import BundleError, RequestError

if TYPE_CHECKING:
    from medseg.bundle.catalog import Bundle
    from medseg.tools.check import Outcome

__all__ = ["app", "build", "check", "inspect", "list_bundles", "pack", "unpack"]

app = typer.Typer(help="Build, check, list, inspect, pack and unpack bundles.", no_args_is_help=True)

Names = Annotated[
    list[str] | None, typer.Argument(help="Bundle folders or names of shipped bundles.", metavar="BUNDLE...")
]
All = Annotated[bool, typer.Option("--all", help="All shipped bundles.")]

_COLORS = {"ok": "green", "failed": "bold red", "skipped": "yellow"}
# More than the table of many bundles needs: none of its lines is cut, a narrower terminal breaks them.
_WIDE = 1000
# A bundle has about a hundred parts.
_MAX_LINES = 2000


@app.command()
def build(names: Names = None, every: All = False) -> None:
    """Write the configs of bundles from their bundle.json."""
    for bundle in _chosen(names, every=every):
        for path in build_bundle(bundle):
            output.print(str(path), markup=False, soft_wrap=True)


@app.command()
def check(
    names: Names = None,
    every: All = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Also train, score, predict and export copies, by medseg and by MONAI: minutes."),
    ] = False,
) -> None:
    """Check that bundles are built, declarative, what MONAI expects, and, with --full, that they run.

    Exit code 1 if anything failed.
    """
    from medseg.tools.check import examine

    bundles = _chosen(names, every=every)
    found: dict[str, dict[str, Outcome]] = {}
    with progress("bundles") as report:
        for number, bundle in enumerate(bundles):

            def tell(done: float, total: int, note: str, number: int = number) -> None:
                report(number + done / total, len(bundles), note)

            found[bundle.name] = examine(bundle, full=full, report=tell)
    _print_outcomes(found)
    raise typer.Exit(int(any(one.status == "failed" for row in found.values() for one in row.values())))


def _print_outcomes(found: dict[str, dict[str, Outcome]]) -> None:
    """Print a row for each bundle, or each check of a single one; below it what failed or was skipped, and why."""
    from rich.markup import escape
    from rich.table import Table

    shown = {name: [f"[{_COLORS[one.status]}]{one.status}[/]" for one in row.values()] for name, row in found.items()}
    if len(found) == 1:
        ((name, row),) = found.items()
        table = Table(escape(name), "", "")
        for check_name, one, status in zip(row, row.values(), shown[name], strict=True):
            table.add_row(check_name, status, escape(one.text) if one.status == "ok" else "")
    else:
        table = Table("bundle", *next(iter(found.values()), {}))
        for name, cells in shown.items():
            table.add_row(escape(name), *cells)
    # A console of its own: rich makes no print wider than its console
    (output if len(found) == 1 else PlainConsole(width=_WIDE)).print(table, markup=True, crop=False)
    for name, row in found.items():
        for check_name, one in row.items():
            if one.status != "ok":
                where = errors if one.status == "failed" else output
                where.print(f"{one.status}: {name}: {check_name}: {one.text}", markup=False, soft_wrap=True)


@app.command("list")
def list_bundles() -> None:
    """List the shipped bundles and those in the folders of MEDSEG_BUNDLES."""
    from rich.table import Table

    table = Table("bundle", "weights", "labels", "what it does")
    for bundle in shipped_bundles():
        weights = "yes" if bundle.weights.is_file() else "train it"
        task = str(bundle.metadata.get("task", "not built"))
        table.add_row(bundle.name, weights, ", ".join(bundle.label_names.values()), task)
    output.print(table)


@app.command()
def inspect(
    name: BundleName, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False
) -> None:
    """Show every callable and expression of a bundle, and its fingerprint, without running anything of it.

    Exit code 1 if there is anything that a declarative bundle may not hold.
    """
    bundle = find_bundle(name)
    findings = archive.find_all(bundle)
    try:
        vouched = fingerprint(bundle.root)
    except BundleError as error:
        vouched = f"none: {error}"
    counts = Counter(finding.allowed for _, finding in findings)
    if as_json:
        rows = [{"file": file, **vars(finding)} for file, finding in findings]
        content = {"bundle": bundle.name, "sha256": vouched, "findings": rows}
        output.print_json(json.dumps(content), ensure_ascii=True)
        raise typer.Exit(1 if counts[False] else 0)
    for file, finding in sorted(findings, key=lambda item: item[1].allowed)[:_MAX_LINES]:
        output.print(f"{'ok ' if finding.allowed else 'NOT'} {file:15} {finding}", markup=False, soft_wrap=True)
    if len(findings) > _MAX_LINES:
        output.print(f"... and {len(findings) - _MAX_LINES} more; --json lists all")
    output.print(f"{counts[True]} allowed, {counts[False]} not")
    output.print(f"SHA-256 of the bundle: {vouched}", soft_wrap=True)
    raise typer.Exit(1 if counts[False] else 0)


@app.command()
def pack(
    name: BundleName,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="The archive; BUNDLE.zip if not given.")] = None,
) -> None:
    """Write a bundle into one zip archive, with hashes; equal bundles give equal bytes."""
    bundle = find_bundle(name)
    packed = archive.pack(bundle, Path(f"{bundle.name}.zip") if out is None else out)
    for left, reason in packed.left_out:
        errors.print(f"left out: {left} ({reason})", markup=False, soft_wrap=True)
    if not bundle.weights.is_file():
        errors.print("it has no weights: who unpacks it trains it, or puts models/model.pt there", soft_wrap=True)
    output.print(f"{packed.path}: {len(packed.files)} files, {packed.path.stat().st_size:,} bytes", soft_wrap=True)
    output.print(f"SHA-256 of the archive: {packed.sha256}", soft_wrap=True)


@app.command()
def unpack(
    path: Annotated[Path, typer.Argument(help="A zip that `medseg bundle pack` wrote.", metavar="ARCHIVE")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder of the bundle; its packed name if not given.")
    ] = None,
) -> None:
    """Unpack a bundle, checking names, sizes, hashes and contents, without running anything of it."""
    bundle = archive.unpack(path, out)
    counts = Counter(finding.kind for _, finding in archive.find_all(bundle))
    output.print(f"{bundle.root}: {counts['callable']} callables, all allowed", soft_wrap=True)
    output.print(f"SHA-256 of the bundle: {fingerprint(bundle.root)}", soft_wrap=True)


def _chosen(names: list[str] | None, *, every: bool) -> list[Bundle]:
    if bool(names) == every:
        raise RequestError("name the bundles, or give --all")
    return shipped_bundles() if every else [find_bundle(name) for name in names or ()]
