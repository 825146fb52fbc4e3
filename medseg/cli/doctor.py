"""`medseg doctor`: what is wrong with images and labels, and repaired copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medseg.cli import tables_doctor as tables
from medseg.cli.console import progress
from medseg.diagnosis import api
from medseg.files import replace_text

__all__ = ["doctor"]


def doctor(
    path: Annotated[str, typer.Argument(help="An image, a folder, a data set, or its dataset.json.", metavar="PATH")],
    fix: Annotated[
        Path | None, typer.Option("--fix", metavar="OUT", help="Write a repaired copy into this new folder.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report to this file.")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option("--bundle", metavar="NAME", help="Also check the data against the needs of a bundle.")
    ] = None,
) -> None:
    """Open every image and label, and list what is wrong, suspicious or unsuitable for a bundle."""
    with progress("cases") as report:
        found = api.doctor(path, bundle=bundle, fix=fix, report=report)
    tables.print_cases(found)
    tables.print_findings(found.findings)
    if fix is not None:
        tables.print_changes(found, fix)
    if json_file is not None:
        replace_text(json_file, json.dumps(found.to_json(), indent=1) + "\n")
    raise typer.Exit(found.exit_code)
