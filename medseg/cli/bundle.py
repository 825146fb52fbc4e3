"""`medseg bundle build | check | list | inspect`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from medseg.bundle.build import build as build_bundle
from medseg.bundle.catalog import find_bundle, merged, shipped_bundles
from medseg.bundle.trust import Finding, find_files, find_programs, fingerprint, load_json
from medseg.cli.console import BundleName, errors, output
from medseg.errors import BundleError, RequestError

if TYPE_CHECKING:
    from medseg.bundle.catalog import Bundle
    from medseg.bundle.compose import Config

__all__ = ["app", "build", "check", "inspect", "list_bundles"]

app = typer.Typer(help="Build, check, list and inspect bundles.", no_args_is_help=True)

Names = Annotated[
    list[str] | None, typer.Argument(help="Bundle folders or names of shipped bundles.", metavar="BUNDLE...")
]
All = Annotated[bool, typer.Option("--all", help="All shipped bundles.")]


@app.command()
def build(names: Names = None, every: All = False) -> None:
    """Write the configs of bundles from their bundle.json."""
    for bundle in _chosen(names, every=every):
        for path in build_bundle(bundle):
            output.print(str(path), markup=False, soft_wrap=True)


@app.command()
def check(names: Names = None, every: All = False) -> None:
    """Check that bundles are built, declarative, and what MONAI expects."""
    from rich.table import Table

    from medseg.bundle.check import CHECKS, check_bundle

    table = Table("bundle", *CHECKS)
    problems: list[str] = []
    for bundle in _chosen(names, every=every):
        results = check_bundle(bundle)
        table.add_row(bundle.name, *("failed" if results[name] else "ok" for name in CHECKS))
        problems += [f"{bundle.name}: {name}: {text}" for name, text in results.items() if text]
    output.print(table)
    for problem in problems:
        errors.print(problem, markup=False, soft_wrap=True)
    raise typer.Exit(1 if problems else 0)


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
    """Show every callable and expression of a bundle, and its fingerprint, without running anything of it."""
    bundle = find_bundle(name)
    findings = _programs({path.name: load_json(path) for path in sorted(bundle.root.glob("configs/*.json"))})
    findings += [("", finding) for finding in find_files(bundle.root)]
    try:
        vouched = fingerprint(bundle.root)
    except BundleError as error:
        vouched = f"none: {error}"
    if as_json:
        rows = [{"file": file, **vars(finding)} for file, finding in findings]
        output.print_json(json.dumps({"bundle": bundle.name, "sha256": vouched, "findings": rows}))
        return
    for file, finding in sorted(findings, key=lambda item: item[1].allowed):
        output.print(f"{'ok ' if finding.allowed else 'NOT'} {file:15} {finding}", markup=False, soft_wrap=True)
    counts = Counter(finding.allowed for _, finding in findings)
    output.print(f"{counts[True]} allowed, {counts[False]} not")
    output.print(f"SHA-256 of the bundle: {vouched}", soft_wrap=True)


def _programs(configs: dict[str, Config]) -> list[tuple[str, Finding]]:
    """List what each config file would run; references may lead into any of the files, as MONAI merges them."""
    parts = {name: {"_meta_": config} if name == "metadata.json" else config for name, config in configs.items()}
    whole = merged(parts)
    return [(name, found) for name, part in parts.items() for found in find_programs(part, {**whole, **part})]


def _chosen(names: list[str] | None, *, every: bool) -> list[Bundle]:
    if bool(names) == every:
        raise RequestError("name the bundles, or give --all")
    return shipped_bundles() if every else [find_bundle(name) for name in names or ()]
