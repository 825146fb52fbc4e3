"""`medseg convert`: weights of public code into a bundle."""

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
    weights: Annotated[
        Path, typer.Argument(help="State dict: .npz, or a file that torch.save wrote.", metavar="WEIGHTS")
    ],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="SOURCE",
            help=f"Code that the weights come from: {_SOURCES}.",
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
            help="Bundle whose template, channels, labels, blocks and settings the new one gets.",
            autocompletion=completion.bundle_names,
        ),
    ] = None,
    prefix: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            show_default="all tensors",
            help="Read only tensors whose names begin with this; it is removed from the names.",
        ),
    ] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            show_default="as the tensors show",
            help="Argument of the network that tensors do not show. Repeatable.",
        ),
    ] = None,
    reverse_channels: Annotated[
        bool,
        typer.Option("--reverse-channels", help="The code reads images as BGR, and the bundle as RGB."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights that the bundle has.")] = False,
) -> None:
    """Convert a published checkpoint into the weights of a bundle; every tensor has to fit."""
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
