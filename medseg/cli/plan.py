"""`medseg plan`: from a labeled data set to a bundle that can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle.knobs import parse_settings
from medseg.cli.console import Device, Settings, progress, with_options
from medseg.cli.tables import print_plan
from medseg.networks.registry import NETWORKS
from medseg.planning import api

__all__ = ["plan"]


def plan(
    data: Annotated[
        Path,
        typer.Argument(
            help="Data set: a folder with dataset.json, imagesTr/ and labelsTr/, or images/ and labels/.",
            metavar="DATASET",
        ),
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new bundle.", metavar="BUNDLE")],
    network: Annotated[
        str, typer.Option(help=f"{', '.join(NETWORKS).lower()}; with +selfreg its features are regularized.")
    ] = "unet",
    dims: Annotated[int | None, typer.Option(min=2, max=3, help="Refuse data of other dimensions.")] = None,
    memory: Annotated[
        str, typer.Option(help="Limit of the device memory for training, such as 8G (the default) or 1500M.")
    ] = "",
    budget: Annotated[
        str, typer.Option(help="Limit of the time for training and validation here, such as 30m or 12h.")
    ] = "",
    name: Annotated[str, typer.Option(help="Name of the bundle: <target>_<modality>_<network>.")] = "",
    settings: Settings = None,
    device: Device = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure a training step of the planned network.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an untrained bundle.")] = False,
) -> None:
    """Choose grid, patch size, network and schedule for a data set, and write them as an untrained bundle."""
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
