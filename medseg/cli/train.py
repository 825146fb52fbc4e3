"""`medseg train`: training and cross-validation of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from medseg.bundle.catalog import find_bundle
from medseg.bundle.knobs import parse_settings
from medseg.cli.console import notes, output, write_json
from medseg.cli.options import BundleName, DataSet, Device, JsonTarget, Settings, Strict, Trust, with_options
from medseg.cli.progress import progress
from medseg.cli.tables import print_folds, print_training
from medseg.errors import RequestError
from medseg.jobs import api, folds

__all__ = ["train"]

_FOLDS: Final = 5


def train(
    bundle: BundleName,
    data: DataSet,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            show_default="train the bundle itself",
            help="Train a copy of the bundle in this new folder.",
        ),
    ] = None,
    settings: Settings = None,
    device: Device = None,
    devices: Annotated[
        int,
        typer.Option(
            metavar="N", help="Number of processes for distributed training, one per GPU or share of the CPU cores."
        ),
    ] = 1,
    fold_count: Annotated[
        int | None,
        typer.Option(
            "--folds",
            metavar="K",
            show_default="no cross-validation",
            help="Train a K-fold cross-validation, split by patient.",
        ),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(
            "--fold",
            metavar="N",
            show_default="all folds",
            help=f"Train only fold N, counted from 0, as in a job array; of {_FOLDS} folds without --folds.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing weights of the bundle.")] = False,
    strict: Strict = False,
    trust: Trust = None,
    json_target: JsonTarget = None,
) -> None:
    """Train a bundle on your own data; the best weights are saved as its models/model.pt.

    The exit code is 1 if cases of a cross-validation failed.
    """
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
        for note in manifest.notes:
            notes.print(note)
        print_training(manifest, out or find_bundle(bundle).root, data)
        write_json(manifest.to_dict(), json_target)
        return
    if out is None:
        raise RequestError("--folds requires --output: the folder of the bundles, one for each fold")
    if trust is not None:
        raise RequestError(
            "--folds does not support --trust, since it trains copies of the bundle: use a declarative bundle"
        )
    count = _FOLDS if fold_count is None else fold_count
    with progress("") as report:
        scores = folds.cross_validate(bundle, data, out, folds=count, fold=fold, report=report, **options)
    if scores is None:
        output.print(f"remaining folds: {', '.join(_missing(out))}; the last one writes the table and the ensemble")
        write_json({"missing": _missing(out)}, json_target)
        return
    print_folds(scores, out)
    write_json(scores.to_dict(), json_target)
    raise typer.Exit(1 if scores.failed else 0)


def _missing(out: Path) -> list[str]:
    return [each.root.name for each in folds.fold_bundles(out) if not folds.is_scored(each)]
