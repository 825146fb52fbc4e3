"""`medseg bundle build | check | list | inspect | pack | unpack`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from medseg.bundle import archive
from medseg.bundle.build import build as build_bundle
from medseg.bundle.catalog import find_bundle, shipped_bundles
from medseg.bundle.trust import fingerprint
from medseg.cli import completion
from medseg.cli.console import errors, notes, output, write_json
from medseg.cli.layout import show_table
from medseg.cli.options import BundleName, Command, Group, JsonTarget, examples
from medseg.cli.progress import progress
from medseg.errors import BundleError, RequestError

if TYPE_CHECKING:
    from medseg.bundle.catalog import Bundle
    from medseg.tools.check import Outcome

__all__ = ["app", "build", "check", "inspect", "list_bundles", "pack", "unpack"]

app = typer.Typer(
    cls=Group,
    help="Build, check, list, inspect, pack and unpack bundles.",
    epilog=examples("medseg bundle list", "medseg bundle check my_bundle --full"),
    no_args_is_help=True,
)

Names = Annotated[
    list[str] | None,
    typer.Argument(
        help="Folders of bundles, or names of shipped bundles.",
        metavar="BUNDLE",
        show_default=False,
        autocompletion=completion.bundle_names,
    ),
]
All = Annotated[bool, typer.Option("--all", help="Use all shipped bundles.")]

_COLORS: Final = {"ok": "green", "failed": "bold red", "skipped": "yellow"}
# A bundle has about a hundred findings.
_MAX_LINES: Final = 2000


@app.command(cls=Command, epilog=examples("medseg bundle build my_bundle", "medseg bundle build --all"))
def build(names: Names = None, every: All = False) -> None:
    """Generate the configs of bundles from their bundle.json."""
    for bundle in _chosen(names, every=every):
        for path in build_bundle(bundle):
            output.print(str(path))


@app.command(cls=Command, epilog=examples("medseg bundle check my_bundle --full", "medseg bundle check --all --json"))
def check(
    names: Names = None,
    every: All = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Also train, evaluate, predict and export copies, with medseg and MONAI; takes minutes per bundle.",
        ),
    ] = False,
    json_target: JsonTarget = None,
) -> None:
    """Check that bundles are built, declarative and valid for MONAI, and with --full that they run.

    The exit code is 1 if a check failed.
    """
    bundles = _chosen(names, every=every)
    from medseg.tools.check import examine

    found: dict[str, dict[str, Outcome]] = {}
    with progress("bundles") as report:
        for number, bundle in enumerate(bundles):

            def tell(done: float, total: int, note: str, number: int = number) -> None:
                report(number + done / total, len(bundles), note)

            found[bundle.name] = examine(bundle, full=full, report=tell)
    _print_outcomes(found)
    content = {name: {check: one._asdict() for check, one in row.items()} for name, row in found.items()}
    write_json(content, json_target)
    raise typer.Exit(int(any(one.status == "failed" for row in found.values() for one in row.values())))


def _print_outcomes(found: dict[str, dict[str, Outcome]]) -> None:
    """Print a row for each bundle, or for each check of a single one, and the reasons of failed and skipped checks."""
    if len(found) == 1:
        ((name, row),) = found.items()
        show_table(
            ["check", "status", "details"],
            [[check, _status(one), one.text if one.status == "ok" else ""] for check, one in row.items()],
            title=name,
        )
    elif found:
        rows = [[name, *map(_status, row.values())] for name, row in found.items()]
        show_table(["bundle", *next(iter(found.values()))], rows)
    for name, row in found.items():
        for check_name, one in row.items():
            if one.status != "ok":
                where = errors if one.status == "failed" else output
                where.print(f"{one.status}: {name}: {check_name}: {one.text}")


def _status(outcome: Outcome) -> Text:
    return Text(outcome.status, style=_COLORS[outcome.status])


@app.command("list", cls=Command, epilog=examples("medseg bundle list", "medseg bundle list --json"))
def list_bundles(json_target: JsonTarget = None) -> None:
    """List the shipped bundles, and those in the folders named by the variable MEDSEG_BUNDLES."""
    rows = [
        {
            "bundle": bundle.name,
            "weights": bundle.weights.is_file(),
            "labels": list(bundle.label_names.values()),
            "task": str(bundle.metadata.get("task", "not built")),
            "folder": str(bundle.root),
        }
        for bundle in shipped_bundles()
    ]
    cells = [[row["bundle"], "yes" if row["weights"] else "none", _joined(row["labels"]), row["task"]] for row in rows]
    show_table(["bundle", "weights", "labels", "task"], cells)
    write_json(rows, json_target)


def _joined(names: object) -> str:
    return ", ".join(names) if isinstance(names, list) else ""


@app.command(
    cls=Command,
    epilog=examples("medseg bundle inspect downloaded_bundle", "medseg bundle inspect hippocampus_mri_unet --json"),
)
def inspect(name: BundleName, json_target: JsonTarget = None) -> None:
    """List the callables and expressions of a bundle, and its fingerprint, without running any code.

    The exit code is 1 if the bundle is not declarative, that is, contains executable code.
    """
    bundle = find_bundle(name)
    findings = archive.find_all(bundle)
    try:
        digest = fingerprint(bundle.root)
    except BundleError as error:
        digest = f"none: {error}"
    counts = Counter(finding.allowed for _, finding in findings)
    for file, finding in sorted(findings, key=lambda item: item[1].allowed)[:_MAX_LINES]:
        output.print(f"{'ok ' if finding.allowed else 'NOT'} {file:15} {finding}")
    if len(findings) > _MAX_LINES:
        output.print(f"... and {len(findings) - _MAX_LINES} more; --json lists all")
    output.print(f"{counts[True]} allowed, {counts[False]} not allowed")
    output.print(f"SHA-256 of the bundle: {digest}")
    rows = [{"file": file, **vars(finding)} for file, finding in findings]
    write_json({"bundle": bundle.name, "sha256": digest, "findings": rows}, json_target)
    raise typer.Exit(1 if counts[False] else 0)


@app.command(
    cls=Command,
    epilog=examples("medseg bundle pack my_bundle", "medseg bundle pack my_bundle -o shared/my_bundle.zip"),
)
def pack(
    name: BundleName,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", show_default="BUNDLE.zip", help="Zip archive to write."),
    ] = None,
) -> None:
    """Write a bundle to a reproducible zip archive with the hashes of its files."""
    bundle = find_bundle(name)
    packed = archive.pack(bundle, Path(f"{bundle.name}.zip") if out is None else out)
    for left, reason in packed.left_out:
        notes.print(f"skipped: {left} ({reason})")
    if not bundle.weights.is_file():
        notes.print("no weights in this bundle: train it after unpacking, or add a models/model.pt")
    output.print(f"{packed.path}: {len(packed.files)} files, {packed.path.stat().st_size:,} bytes")
    output.print(f"SHA-256 of the archive: {packed.sha256}")


@app.command(cls=Command, epilog=examples("medseg bundle unpack my_bundle.zip -o bundles/my_bundle"))
def unpack(
    path: Annotated[Path, typer.Argument(help="Zip archive of `medseg bundle pack`.", metavar="ARCHIVE")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", show_default="name of the bundle", help="New folder of the bundle."
        ),
    ] = None,
) -> None:
    """Unpack a bundle after checking its names, sizes, hashes and contents, without running any code."""
    bundle = archive.unpack(path, out)
    counts = Counter(finding.kind for _, finding in archive.find_all(bundle))
    output.print(f"{bundle.root}: {counts['callable']} callables, all allowed")
    output.print(f"SHA-256 of the bundle: {fingerprint(bundle.root)}")


def _chosen(names: list[str] | None, *, every: bool) -> list[Bundle]:
    if bool(names) == every:
        raise RequestError(
            "no bundles given: name them, or give --all" if not every else "bundles and --all given: use one of them"
        )
    return shipped_bundles() if every else [find_bundle(name) for name in names or ()]
