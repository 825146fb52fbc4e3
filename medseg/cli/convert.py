"""`medseg convert`: published weights for a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli import completion
from medseg.cli.progress import progress
from medseg.cli.tables import print_conversion
from medseg.tools import convert as conversion

__all__ = ["convert"]

_SOURCES: Final = ", ".join(conversion.SOURCE_NAMES)


def convert(
    weights: Annotated[Path, typer.Argument(help="State dict, as .npz or in a file of torch.save.", metavar="WEIGHTS")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="SOURCE",
            help=f"Code base of the weights: {_SOURCES}.",
            autocompletion=completion.weight_sources,
        ),
    ],
    to: Annotated[
        Path,
        typer.Option("--to", metavar="BUNDLE", help="Bundle with the same network, or a new folder (with --like)."),
    ],
    like: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE",
            show_default="--to names a bundle",
            help="Bundle from which the new one takes template, channels, labels, blocks and settings.",
            autocompletion=completion.bundle_names,
        ),
    ] = None,
    prefix: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            show_default="all tensors",
            help="Use only tensors whose names start with TEXT, and remove it from the names.",
        ),
    ] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            show_default="derived from the tensors",
            help="Set an argument of the network that the tensors do not determine. Repeatable.",
        ),
    ] = None,
    reverse_channels: Annotated[
        bool,
        typer.Option("--reverse-channels", help="Convert the first layer from BGR to RGB input."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing weights of the bundle.")] = False,
) -> None:
    """Convert a published checkpoint to the weights of a bundle; every tensor must match."""
    with progress(""):
        done = conversion.convert(
            weights,
            source,
            to,
            like=like,
            prefix=prefix,
            settings=parse_settings(settings or []),
            reverse_channels=reverse_channels,
            overwrite=overwrite,
        )
    print_conversion(done)
