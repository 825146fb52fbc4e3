"""`medseg plan`: a bundle for training, planned from a labeled data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli import completion
from medseg.cli.console import write_json
from medseg.cli.options import Device, JsonTarget, Settings, with_options
from medseg.cli.progress import progress
from medseg.cli.tables import print_plan
from medseg.networks.registry import NETWORKS
from medseg.planning import api

__all__ = ["plan"]


def plan(
    data: Annotated[
        Path,
        typer.Argument(
            help="Folder of the data set, with dataset.json, imagesTr/ and labelsTr/, or images/ and labels/.",
            metavar="DATASET",
        ),
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.", metavar="BUNDLE")],
    network: Annotated[
        str,
        typer.Option(
            metavar="NETWORK",
            help=f"Network: {', '.join(NETWORKS).lower()}; with +selfreg for self-regularized training.",
            autocompletion=completion.networks,
        ),
    ] = "unet",
    dims: Annotated[
        int | None,
        typer.Option(
            min=2, max=3, metavar="N", show_default="as the images", help="Spatial dimensions that the data must have."
        ),
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            show_default="8G",
            help="Device memory for training, in bytes or with K, M, G or T (powers of 1024).",
        ),
    ] = "",
    budget: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            show_default="no limit",
            help="Time for training and validation on this machine, in seconds or with m, h or d.",
        ),
    ] = "",
    name: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            show_default="from data set and network",
            help="Name of the bundle: TARGET_MODALITY_NETWORK.",
        ),
    ] = "",
    settings: Settings = None,
    device: Device = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure time and memory of a training step.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing untrained bundle.")] = False,
    json_target: JsonTarget = None,
) -> None:
    """Plan spacing, patch size, network and schedule for a data set, and write an untrained bundle."""
    with progress("cases") as report:
        made = api.plan(
            data,
            out,
            network=network,
            dims=dims,
            memory=memory,
            budget=budget,
            name=name,
            settings=parse_settings(with_options(settings, device_name=device)),
            measure=measure,
            overwrite=overwrite,
            report=report,
        )
    print_plan(made, data)
    write_json(made.to_dict(), json_target)
