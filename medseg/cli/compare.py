"""`medseg compare`: statistical comparison of scored runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.console import write_json
from medseg.cli.options import JsonTarget
from medseg.cli.tables import print_comparison
from medseg.scoring import comparison

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of cross-validations, or of bundles scored by `medseg evaluate`.", metavar="RUN"),
    ],
    json_target: JsonTarget = None,
) -> None:
    """Compare scored bundles on their common cases, and report which is best."""
    found = comparison.compare(runs)
    print_comparison(found)
    write_json(found.to_dict(), json_target)
