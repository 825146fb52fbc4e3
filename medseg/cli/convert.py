"""`medseg convert`: weights of public code into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli.tables import print_conversion
from medseg.tools import convert as conversion

__all__ = ["convert"]

_SOURCES = ", ".join(conversion.SOURCE_NAMES)


def convert(
    weights: Annotated[Path, typer.Argument(help="A state dict: .npz, or what torch.save wrote.", metavar="WEIGHTS")],
    source: Annotated[str, typer.Option("--from", help=f"Whose code they come from: {_SOURCES}.")],
    to: Annotated[Path, typer.Option("--to", help="A bundle of the same network, or a new folder (with --like).")],
    like: Annotated[
        str | None,
        typer.Option(help="Make the new bundle with template, channels, labels, blocks and knobs of this one."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Take the tensors whose names start so, without it.")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An argument of the network that tensors cannot tell: name=value. Repeatable."),
    ] = None,
    reverse_channels: Annotated[
        bool,
        typer.Option("--reverse-channels", help="The code read pictures as blue, green, red; the bundle reads RGB."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights that the bundle has.")] = False,
) -> None:
    """Put the weights of a published checkpoint into a bundle, each tensor in its place or none."""
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
