"""`medseg compare`: which of several runs is the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.tables import print_comparison
from medseg.files import replace_text
from medseg.scoring import comparison

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of cross-validations, or of bundles that `medseg evaluate` has scored.", metavar="RUN..."
        ),
    ],
    table: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the comparison as JSON.")] = None,
) -> None:
    """Compare scored bundles on the cases they share, and name the best."""
    found = comparison.compare(runs)
    print_comparison(found)
    if table is not None:
        replace_text(table, json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n")
