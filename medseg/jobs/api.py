"""Training, evaluation and prediction with a bundle, as the command line calls them.

Each checks the whole request before torch or MONAI are imported.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle.build import build, stale_files
from medseg.bundle.catalog import Bundle, find_bundle, merged
from medseg.bundle.compose import compose, spatial_dims
from medseg.bundle.knobs import changed
from medseg.bundle.recipes import with_recipe
from medseg.bundle.trust import require_trust
from medseg.errors import RequestError
from medseg.files import check_folder, load_json, replace_text
from medseg.io import list_cases, list_dataset
from medseg.jobs import launch, runner
from medseg.jobs.ensembles import ensemble_of
from medseg.jobs.job import prepare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medseg.manifest import Manifest
    from medseg.types import Announce, Progress

__all__ = ["evaluate", "predict", "train", "train_config"]


def predict(
    bundle: str | Path | Sequence[str | Path],
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overlay: bool = False,
    trust: str | None = None,
    strict: bool = False,
    report: Progress | None = None,
    announce: Announce | None = None,
) -> Manifest:
    """Write a mask for every image, in the image's geometry and under its name, and `manifest.json`.

    Args:
        bundle: Folder, or name of a shipped bundle. Several bundles are an ensemble: their probabilities are averaged.
        inputs: An image, a list of images, a folder of images, or a `dataset.json`.
        output: Folder of the results, created if missing.
        settings: Settings of the bundle to change, by name.
        resume: Whether to skip what an earlier run with the same settings has finished.
        overlay: Whether to draw each mask over its image, as a PNG next to it.
        trust: SHA-256 of a bundle that contains executable code, to confirm that you trust it.
        strict: Whether a warning fails its case, or ends the run if it belongs to none.
        report: Called with the number of cases done, their total, and a short note.
        announce: Called with the name of each case and its forecast of time and memory.

    Returns:
        The record of the run, with the reason for each case that failed.

    Raises:
        RequestError: Invalid request; nothing was written.
    """
    if not isinstance(bundle, (str, Path)):
        with ensemble_of(bundle) as together:
            return predict(
                together.root,
                inputs,
                output,
                settings=settings,
                resume=resume,
                overlay=overlay,
                trust=trust,
                strict=strict,
                report=report,
                announce=announce,
            )
    found, folder = find_bundle(bundle), Path(output).absolute()
    given = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    places = [str(Path(place).absolute()) for place in given]
    source = places[0] if len(places) == 1 else places
    paths = {"dataset_dir": source, "output_dir": str(folder)}
    job = prepare("predict", found, settings or {}, paths=paths, trust=trust, strict=strict)
    wanted = str(job.config.get("output_format") or "")
    tiff_slides = "slides" in job.config and bool(job.config.get("tiff_slides"))
    listing = list_cases(source, output_format=wanted, tiff_slides=tiff_slides)
    check_folder(folder)
    manifest = runner.predict(
        job, listing.cases, folder, resume=resume, overlay=overlay, report=report, announce=announce
    )
    manifest.skipped = listing.skipped
    return manifest


def evaluate(
    bundle: str | Path,
    data: str | Path,
    *,
    split: str = "val",
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    trust: str | None = None,
    strict: bool = False,
    report: Progress | None = None,
) -> Manifest:
    """Predict labeled cases and score them, each in the native space of its label.

    Args:
        bundle: Folder, or name of a shipped bundle.
        data: Data set, as for `medseg.io.list_dataset`.
        split: Part of the data set: "val", "train" or "test".
        output: Folder of `manifest.json`; the bundle's `runs/evaluate` by default.
        settings: Settings of the bundle to change, by name.
        trust: SHA-256 of a bundle that contains executable code, to confirm that you trust it.
        strict: Whether a warning fails its case, or ends the run if it belongs to none.
        report: Called with the number of cases done, their total, and a short note.

    Returns:
        The record of the run, with the Dice of each label in the cases' metrics.

    Raises:
        RequestError: Invalid request.
    """
    found, root = find_bundle(bundle), Path(data).absolute()
    folder = found.root / "runs" / "evaluate" if output is None else Path(output).absolute()
    paths = {"dataset_dir": str(root), "split": split, "output_dir": str(folder)}
    job = prepare("evaluate", found, settings or {}, paths=paths, trust=trust, strict=strict)
    cases = list_dataset(root, split, split_file=_split_file(job.config, split))
    check_folder(folder)
    return runner.evaluate(job, cases, folder, report=report)


def train(
    bundle: str | Path,
    data: str | Path,
    *,
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    devices: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    trust: str | None = None,
    strict: bool = False,
    report: Progress | None = None,
) -> Manifest:
    """Train a bundle, or a copy of it; the best weights become its `models/model.pt`.

    Args:
        bundle: Folder, or name of a shipped bundle.
        data: Data set, as for `medseg.io.list_dataset`.
        output: New folder for a copy to train; the bundle itself is trained by default.
        settings: Settings to change, by name; `recipe` names one of `medseg.bundle.recipes`, which rewrites the
            bundle's `bundle.json` and configs ("" restores those of its template).
        devices: Number of processes that train together; on CUDA each has a device of its own.
        resume: Whether to continue from the last finished epoch.
        overwrite: Whether to replace existing weights.
        trust: SHA-256 of a bundle that contains executable code, to confirm that you trust it.
        strict: Whether a warning fails its case, or ends the run if it belongs to none.
        report: Called with the number of epochs done, their total, and a short note.

    Returns:
        The record of the run, with the validations.

    Raises:
        RequestError: Invalid request.
        CaseError: A training case is unusable.
    """
    source, root = find_bundle(bundle), Path(data).absolute()
    target = source if output is None else Bundle(Path(output).absolute())
    paths = {"dataset_dir": str(root), "resume": resume}
    values = dict(settings or {})
    recipe = values.pop("recipe", None)
    if recipe is None:
        prepare("train", source, values, paths=paths, trust=trust)
    else:
        require_trust(source.root, source.load_configs("train"), trust)
    known = train_config(source, recipe)
    changed(known, values)
    config = {**known, **values}
    launch.check_processes(devices, config)
    for split in ("train", "val"):
        list_dataset(root, split, split_file=_split_file(config, split))
    _check_target(target, config, resume=resume, overwrite=overwrite)
    if (target.root / "configs").is_dir():
        _check_same(target, known, recipe, resume=resume)
    check_folder(target.root)
    _copy(source, target)
    if recipe is not None:
        replace_text(target.root / "bundle.json", json.dumps(_by_recipe(target, recipe), indent=2) + "\n")
        build(target)
    prepared = partial(prepare, "train") if devices == 1 else launch.prepare
    job = prepared(target, values, paths=paths, trust=trust, strict=strict)
    return launch.train(job, devices, report=report)


def _split_file(config: Mapping[str, Any], split: str) -> str | None:
    """Return the file that splits the cases of a run in place of the data set's own split."""
    given = config.get("split_file")
    return given if isinstance(given, str) and given and split != "test" else None


def train_config(bundle: Bundle, recipe: Any = None) -> dict[str, Any]:
    """Return the training config of a bundle or a copy of it: its own, or that of a recipe.

    Raises:
        RequestError: Unknown recipe, or a bundle whose configs differ from its `bundle.json`.
    """
    return merged(bundle.load_configs("train")) if recipe is None else compose(_by_recipe(bundle, recipe))["train"]


def _by_recipe(bundle: Bundle, recipe: Any) -> dict[str, Any]:
    """Return the `bundle.json` by which the bundle is trained with a recipe.

    Raises:
        RequestError: Unknown recipe, or a bundle whose configs differ from its `bundle.json`.
    """
    stale = [name for name in stale_files(bundle) if name != "configs/metadata.json"]
    if stale:
        raise RequestError(
            f"{', '.join(stale)} of '{bundle.root}' differ from its bundle.json, and a recipe would undo those "
            f"edits; run `medseg bundle build {bundle.root}` first"
        )
    description = load_json(bundle.root / "bundle.json")
    return with_recipe(description, str(recipe), spatial_dims(description))


def _check_target(target: Bundle, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Refuse to replace the result of an earlier training.

    Raises:
        RequestError: There are weights, or the state of a training that was interrupted before its first weights.
    """
    state = launch.run_folder(target, config) / "previous.pt"
    found = next((path for path in (target.weights, state) if path.is_file()), None)
    if found is not None and not (resume or overwrite):
        raise RequestError(
            f"'{found}' exists and training would replace it: give --output NEW_FOLDER to train a copy, --resume to "
            "continue, or --overwrite"
        )


def _check_same(target: Bundle, known: Mapping[str, Any], recipe: str | None, *, resume: bool) -> None:
    """Refuse to train a bundle that is not a copy of the source, or to continue with another recipe.

    Raises:
        RequestError: Its configs differ from the requested ones.
    """
    if resume and recipe is not None and merged(target.load_configs("train")) != train_config(target, recipe):
        raise RequestError(
            f"'{target.root}' was not started with recipe={recipe!r}, so it cannot continue with it: omit the recipe, "
            "or give --overwrite in place of --resume to start over"
        )
    if not resume and train_config(target, recipe) != known:
        raise RequestError(
            f"'{target.root}' holds a different bundle, not a copy of the one to train: train it under its own name, "
            "or give another --output"
        )


def _copy(source: Bundle, target: Bundle) -> None:
    """Copy a bundle without its weights and runs, unless the target is a bundle already."""
    if target.root == source.root or (target.root / "configs").is_dir():
        return
    for folder in ("configs", "docs"):
        if (source.root / folder).is_dir():
            shutil.copytree(source.root / folder, target.root / folder, symlinks=True)
    if (source.root / "LICENSE").is_file():
        shutil.copy2(source.root / "LICENSE", target.root / "LICENSE")
    # What these say of the source's weights is not true of those to come.
    for path, entry in (("bundle.json", "weights_license"), ("configs/metadata.json", "weights")):
        if (source.root / path).is_file():
            content = load_json(source.root / path)
            content.pop(entry, None)
            replace_text(target.root / path, json.dumps(content, indent=2) + "\n")
