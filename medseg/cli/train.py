"""`medseg train`: weights from images and labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.bundle.catalog import find_bundle
from medseg.bundle.knobs import parse_settings
from medseg.cli.console import BundleName, Device, Settings, Strict, Trust, output, progress, with_options
from medseg.errors import RequestError
from medseg.jobs import api, folds

if TYPE_CHECKING:
    from medseg.manifest import Manifest
    from medseg.scoring.scores import Scores

__all__ = ["train"]

_FOLDS = 5


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
    devices: Annotated[
        int, typer.Option(metavar="N", help="Processes that train together, each on a GPU or a share of the cores.")
    ] = 1,
    fold_count: Annotated[
        int | None,
        typer.Option("--folds", metavar="K", help="Cross-validate: train on each of K folds, patient by patient."),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option("--fold", metavar="k", help="Train fold k alone, from 0, for job arrays; of 5 without --folds."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights that the bundle has.")] = False,
    strict: Strict = False,
    trust: Trust = None,
) -> None:
    """Train a bundle on your own data; the best weights become the bundle's `models/model.pt`."""
    options: dict[str, Any] = {
        "settings": parse_settings(with_options(settings, device_name=device)),
        "devices": devices,
        "resume": resume,
        "overwrite": overwrite,
        "strict": strict,
    }
    if fold_count is None and fold is None:
        with progress("epochs") as report:
            manifest = api.train(bundle, data, output=out, trust=trust, report=report, **options)
        _tell_run(manifest, out or find_bundle(bundle).root)
        return
    if out is None:
        raise RequestError("--folds needs --output: the folder that holds one bundle for each fold")
    if trust is not None:
        raise RequestError("--folds trains copies, for which --trust vouches not: take a declarative bundle")
    count = _FOLDS if fold_count is None else fold_count
    with progress("") as report:
        scores = folds.cross_validate(bundle, data, out, folds=count, fold=fold, report=report, **options)
    _tell_folds(scores, out)
    raise typer.Exit(1 if scores is not None and scores.failed else 0)


def _tell_run(manifest: Manifest, root: Path) -> None:
    for note in manifest.notes:
        output.print(note, markup=False, soft_wrap=True)
    scored = [entry for entry in manifest.validations if "val_mean_dice" in entry]
    best = max(scored, key=lambda entry: entry["val_mean_dice"], default=None)
    found = f", mean Dice {best['val_mean_dice']:.4f} on the validation cases at epoch {best['epoch']}" if best else ""
    output.print(f"best weights: {root / 'models' / 'model.pt'}{found}", soft_wrap=True)


def _tell_folds(scores: Scores | None, out: Path) -> None:
    if scores is None:
        missing = [each.root.name for each in folds.fold_bundles(out) if not folds.is_scored(each)]
        output.print(
            f"{', '.join(missing)} still to be trained; whichever ends last writes the table and the ensemble",
            soft_wrap=True,
        )
        return
    output.print(scores.table(), markup=False, soft_wrap=True, highlight=False)
    output.print(f"each case: {out / 'cross_validation.txt'}", soft_wrap=True)
    output.print(f"the mean of the folds: medseg predict {out} INPUT -o MASKS", markup=False, soft_wrap=True)
