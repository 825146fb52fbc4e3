"""`medseg doctor`: faults of images and labels, and repaired copies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli import completion
from medseg.cli import tables_doctor as tables
from medseg.cli.console import write_json
from medseg.cli.options import JsonTarget
from medseg.cli.progress import progress
from medseg.diagnosis import api

__all__ = ["doctor"]


def doctor(
    path: Annotated[str, typer.Argument(help="Image, folder of images, data set, or dataset.json.", metavar="PATH")],
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix", metavar="FOLDER", show_default="no repair", help="Write a repaired copy to this new folder."
        ),
    ] = None,
    bundle: Annotated[
        str | None,
        typer.Option(
            "--bundle",
            metavar="BUNDLE",
            show_default="none",
            help="Also check whether the data suit this bundle.",
            autocompletion=completion.bundle_names,
        ),
    ] = None,
    json_target: JsonTarget = None,
) -> None:
    """Check every image and label for errors, suspicious values and unsuitability for a bundle.

    The exit code is 1 if there are errors, or with --fix if errors remain in the copy.
    """
    with progress("cases") as report:
        found = api.doctor(path, bundle=bundle, fix=fix, report=report)
    tables.print_cases(found)
    tables.print_findings(found.findings)
    if fix is not None:
        tables.print_changes(found, fix)
    write_json(found.to_json(), json_target)
    raise typer.Exit(found.exit_code)
