"""The three jobs of a bundle as functions: train, evaluate, predict. The command line is a face of these.

Each checks the whole request before torch or MONAI are imported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle import runner
from medseg.bundle.catalog import Bundle, find_bundle
from medseg.bundle.trust import load_json
from medseg.errors import RequestError
from medseg.files import check_folder, replace_text
from medseg.io import find_cases, find_dataset

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from medseg.bundle.runner import Announce, Report
    from medseg.manifest import Manifest

__all__ = ["evaluate", "predict", "train"]


def predict(
    bundle: str | Path,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    trust: str | None = None,
    report: Report | None = None,
    announce: Announce | None = None,
) -> Manifest:
    """Write a mask for every image, on the image's own grid and under its name, and `manifest.json`.

    Args:
        bundle: folder, or name of a shipped bundle.
        inputs: an image, several, a folder of images, or a `dataset.json`.
        output: folder for the results, made if missing.
        settings: knobs to change, by name.
        resume: leave out what an earlier run with the same settings has done.
        trust: fingerprint by which you vouch for a bundle that is not declarative.
        report: called with cases done, cases in all, and a few words.
        announce: called with the name of each case and what it will take in time and memory.

    Returns:
        The record of the run; a case that failed is in it with the reason.

    Raises:
        RequestError: anything about the request that cannot be; nothing was written.
    """
    found, folder = find_bundle(bundle), Path(output).absolute()
    given = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    places = [str(Path(place).absolute()) for place in given]
    source = places[0] if len(places) == 1 else places
    cases = find_cases(source)
    paths = {"dataset_dir": source, "output_dir": str(folder)}
    job = runner.prepare("predict", found, settings or {}, paths=paths, trust=trust)
    check_folder(folder)
    return runner.predict(job, cases, folder, resume=resume, report=report, announce=announce)


def evaluate(
    bundle: str | Path,
    data: str | Path,
    *,
    split: str = "val",
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    trust: str | None = None,
    report: Report | None = None,
) -> Manifest:
    """Predict labeled cases and score them, each on its label's own grid.

    Args:
        bundle: folder, or name of a shipped bundle.
        data: data set as `medseg.io.find_dataset` takes it.
        split: "val", "train" or "test".
        output: folder for `manifest.json`; the bundle's `runs/evaluate` if not given.
        settings: knobs to change, by name.
        trust: fingerprint by which you vouch for a bundle that is not declarative.
        report: called with cases done, cases in all, and a few words.

    Returns:
        The record of the run, with the Dice of each label in the cases' metrics.

    Raises:
        RequestError: anything about the request that cannot be.
    """
    found, root = find_bundle(bundle), Path(data).absolute()
    cases = find_dataset(root, split)
    folder = found.root / "runs" / "evaluate" if output is None else Path(output).absolute()
    paths = {"dataset_dir": str(root), "split": split, "output_dir": str(folder)}
    job = runner.prepare("evaluate", found, settings or {}, paths=paths, trust=trust)
    check_folder(folder)
    return runner.evaluate(job, cases, folder, report=report)


def train(
    bundle: str | Path,
    data: str | Path,
    *,
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust: str | None = None,
    report: Report | None = None,
) -> Manifest:
    """Train a bundle, or a copy of it; the best weights become its `models/model.pt`.

    Args:
        bundle: folder, or name of a shipped bundle.
        data: data set as `medseg.io.find_dataset` takes it.
        output: new folder for a copy to train; the bundle itself is trained if not given.
        settings: knobs to change, by name.
        resume: go on from the last finished epoch.
        overwrite: replace the weights that the bundle has.
        trust: fingerprint by which you vouch for a bundle that is not declarative.
        report: called with epochs done, epochs in all, and a few words.

    Returns:
        The record of the run, with the validations.

    Raises:
        RequestError: anything about the request that cannot be.
        CaseError: a training case that cannot be used.
    """
    source, root = find_bundle(bundle), Path(data).absolute()
    target = source if output is None else Bundle(Path(output).absolute())
    paths = {"dataset_dir": str(root), "resume": resume}
    runner.prepare("train", source, settings or {}, paths=paths, trust=trust)
    for split in ("train", "val"):
        find_dataset(root, split)
    if target.weights.is_file() and not (resume or overwrite):
        raise RequestError(
            f"'{target.weights}' exists and training would replace it: give --output NEW_FOLDER to train a copy, "
            "--resume to go on, or --overwrite"
        )
    check_folder(target.root)
    _copy(source, target)
    job = runner.prepare("train", target, settings or {}, paths=paths, trust=trust)
    return runner.train(job, report=report)


def _copy(source: Bundle, target: Bundle) -> None:
    """Copy a bundle without its weights and runs, unless the target is one already."""
    if target.root == source.root or (target.root / "configs").is_dir():
        return
    for folder in ("configs", "docs"):
        if (source.root / folder).is_dir():
            shutil.copytree(source.root / folder, target.root / folder)
    if (source.root / "LICENSE").is_file():
        shutil.copy2(source.root / "LICENSE", target.root / "LICENSE")
    # What these say of the source's weights is not true of those to come.
    for path, entry in (("bundle.json", "weights_license"), ("configs/metadata.json", "weights")):
        if (source.root / path).is_file():
            content = load_json(source.root / path)
            content.pop(entry, None)
            replace_text(target.root / path, json.dumps(content, indent=2) + "\n")
