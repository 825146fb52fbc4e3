"""`medseg train`: weights from images and labels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from medseg.bundle.catalog import Bundle, find_bundle
from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Trust, output, progress, with_device
from medseg.errors import RequestError
from medseg.files import check_folder
from medseg.io import find_dataset

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
    from medseg.bundle import runner

    source = find_bundle(bundle)
    parsed = parse_settings(with_device(settings, device))
    paths = {"dataset_dir": str(data.absolute()), "resume": resume}
    runner.prepare("train", source, parsed, paths=paths, trust=trust)
    cases = {split: find_dataset(data, split) for split in ("train", "val")}
    target = _target(source, out, resume=resume, overwrite=overwrite)
    job = runner.prepare("train", target, parsed, paths=paths, trust=trust)
    output.print(f"training {target.name} on {len(cases['train'])} cases, {len(cases['val'])} for validation")
    with progress("epochs") as report:
        manifest = runner.train(job, report=report)
    best = max(manifest.validations, key=lambda entry: entry["val_mean_dice"], default=None)
    found = f", mean Dice {best['val_mean_dice']:.4f} on the validation cases at epoch {best['epoch']}" if best else ""
    output.print(f"best weights: {target.weights}{found}", soft_wrap=True)


def _target(source: Bundle, out: Path | None, *, resume: bool, overwrite: bool) -> Bundle:
    """Return the bundle to write to: the source itself, or a copy of it without weights and runs."""
    target = Bundle(out.absolute()) if out is not None else source
    if target.weights.is_file() and not (resume or overwrite):
        raise RequestError(
            f"'{target.weights}' exists and training would replace it: give --output NEW_FOLDER to train a copy, "
            "--resume to go on, or --overwrite"
        )
    check_folder(target.root)
    if out is not None and target.root != source.root and not (target.root / "configs").is_dir():
        for part in ("configs", "docs"):
            if (source.root / part).is_dir():
                shutil.copytree(source.root / part, target.root / part)
        for file in ("bundle.json", "LICENSE"):
            if (source.root / file).is_file():
                shutil.copy2(source.root / file, target.root / file)
    return target
