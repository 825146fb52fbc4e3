"""`medseg train`: weights from images and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle import api
from medseg.bundle.catalog import find_bundle
from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Trust, output, progress, with_options

__all__ = ["train"]


def train(
    bundle: BundleName,
    data: Annotated[
        Path,
        typer.Option("--data", "-d", help="Data set: a folder with dataset.json, or images/, labels/ and split.json."),
    ],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Train a copy of the bundle in this new folder.")
    ] = None,
    settings: Settings = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished epoch.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights that the bundle has.")] = False,
    trust: Trust = None,
) -> None:
    """Train a bundle on your own data; the best weights become the bundle's `models/model.pt`."""
    with progress("epochs") as report:
        manifest = api.train(
            bundle,
            data,
            output=out,
            settings=parse_settings(with_options(settings, device_name=device)),
            resume=resume,
            overwrite=overwrite,
            trust=trust,
            report=report,
        )
    for note in manifest.notes:
        output.print(note, markup=False, soft_wrap=True)
    scored = [entry for entry in manifest.validations if "val_mean_dice" in entry]
    best = max(scored, key=lambda entry: entry["val_mean_dice"], default=None)
    found = f", mean Dice {best['val_mean_dice']:.4f} on the validation cases at epoch {best['epoch']}" if best else ""
    weights = (out or find_bundle(bundle).root) / "models" / "model.pt"
    output.print(f"best weights: {weights}{found}", soft_wrap=True)
