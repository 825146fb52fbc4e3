"""Cross-validation: one bundle trained on each fold of a data set, its scores, and the ensemble of the folds.

::

    OUT/folds.json               folds by case; they depend on the data set and the seed alone
    OUT/fold_0/                  a bundle with the weights of this fold, and split.json
    OUT/cross_validation.json    each case scored by the fold that did not train on it; also as .txt
    OUT/configs, OUT/models      the ensemble of the folds, so `medseg predict OUT` works

Folds are trained one after the other or as separate jobs; the last one to finish writes what needs all of them.
Nothing heavy is imported before a request is checked.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle, find_bundle, merged
from medseg.bundle.knobs import changed
from medseg.errors import RequestError
from medseg.files import check_folder, replace_text, sha256_file
from medseg.io.datasets import SPLIT_FILE, find_dataset, read_dataset, read_json, split_stems
from medseg.io.names import StrPath, absolute
from medseg.io.patients import find_patients
from medseg.jobs import api
from medseg.jobs.ensembles import write_ensemble
from medseg.jobs.launch import check_processes
from medseg.manifest import Manifest
from medseg.notices import collect, warn
from medseg.scoring.scores import CROSS_VALIDATION, Scores, write_scores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from medseg.types import Progress

__all__ = ["FOLDS_FILE", "Folds", "cross_validate", "fold_bundles", "is_scored", "make_folds"]

logger = logging.getLogger(__name__)

FOLDS_FILE: Final = "folds.json"
_PARTS: Final = ("train", "val")
# Where a run takes place does not change its result.
_PLACES: Final = ("device_name", "num_workers", "split_file")


@dataclass(frozen=True)
class Folds:
    """Assignment of cases to folds.

    Attributes:
        seed: Seed of the assignment.
        folds: Validation cases of each fold; it trains on all others.
        held_out: Cases in no fold: the data set's own validation part, where it has one.
        patients: Patient of each case, named by one of the patient's cases.
    """

    seed: int
    folds: tuple[tuple[str, ...], ...]
    held_out: tuple[str, ...]
    patients: Mapping[str, str]

    def split(self, number: int) -> dict[str, list[str]]:
        """Return the training and validation cases of a fold."""
        train = sorted(case for other, cases in enumerate(self.folds) if other != number for case in cases)
        return {"train": train, "val": list(self.folds[number])}

    def to_json(self) -> str:
        """Return the content of `folds.json`."""
        content = {
            "seed": self.seed,
            "folds": [self.split(number) for number in range(len(self.folds))],
            "held_out": list(self.held_out),
            "patients": {case: self.patients[case] for case in sorted(self.patients)},
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def make_folds(data: StrPath, count: int, seed: int) -> Folds:
    """Assign the cases of a data set to folds, patient by patient.

    Where the data set has a split, its training part is divided into folds; the validation part stays held out, so that
    the ensemble of the folds can be scored on it. Otherwise all labeled cases are divided.

    Args:
        data: Data set, as for `medseg.io.list_dataset`.
        count: Number of folds.
        seed: Seed of the assignment.

    Raises:
        RequestError: The data set is unreadable, or has too few patients.
    """
    dataset = read_dataset(data)
    listed = set(_PARTS) <= set(dataset.sections)
    if listed or (dataset.root / SPLIT_FILE).is_file():
        parts = split_stems(dataset)
        cases, held_out = parts["train"], parts["val"]
    else:
        cases, held_out = sorted(set(dataset.images) & set(dataset.labels)), []
        unlabeled = len(dataset.images) - len(cases)
        if unlabeled:
            text = f"{unlabeled} of {len(dataset.images)} images have no label and are in no fold"
            warn(logger, "unlabeled-skipped", text, dataset.root, run=True)
    patients = find_patients(data)
    known = {case: patients[case] for case in cases}
    # This loads torch, which the checks above do not need.
    from medseg.training.splits import patient_folds

    dealt = patient_folds(cases, known, count, seed)
    return Folds(seed, tuple(tuple(fold) for fold in dealt), tuple(sorted(held_out)), known)


def cross_validate(
    bundle: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    folds: int = 5,
    fold: int | None = None,
    devices: int = 1,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    report: Progress | None = None,
) -> Scores | None:
    """Train a copy of a bundle on each fold, or on one of them, and score each case with the fold that has not seen it.

    Args:
        bundle: Folder, or name of a shipped bundle; it must be declarative.
        data: Data set, as for `medseg.io.list_dataset`.
        output: Folder of all folds.
        folds: Number of folds.
        fold: Fold to train, from 0; all by default.
        devices: Number of processes that train one fold together.
        settings: Settings to change, by name; `seed` also determines the assignment to folds.
        resume: Whether to keep finished folds and continue unfinished ones.
        overwrite: Whether to train all folds from scratch.
        strict: Whether a warning ends the run.
        report: Called with the number of epochs done, their total, and a short note.

    Returns:
        The scores; None as long as a fold is not trained.

    Raises:
        RequestError: Invalid request.
        CaseError: A case is unusable.
    """
    source, root, out = find_bundle(bundle), absolute(data), absolute(output)
    if fold is not None and not 0 <= fold < folds:
        raise RequestError(f"--fold {fold}: invalid fold number, expected 0 to {folds - 1}")
    values = dict(settings or {})
    known = api.train_config(source, values.get("recipe"))
    own = {name: value for name, value in values.items() if name != "recipe"}
    config = {**known, **changed(known, {**own, "split_file": SPLIT_FILE})}
    check_processes(devices, config)
    with collect(strict=strict):
        dealt = make_folds(root, folds, _seed(config.get("seed", 0)))
    chosen = list(range(folds)) if fold is None else [fold]
    targets = {number: Bundle(out / f"fold_{number}") for number in chosen}
    begun = [target.root.name for target in targets.values() if target.weights.is_file() or _has_state(target)]
    if begun and not (resume or overwrite):
        raise RequestError(
            f"'{out}' already contains {', '.join(begun)}: pass --resume to keep finished folds and continue, "
            "--overwrite to start over, or another --output"
        )
    _write_folds(dealt, out)
    for number, target in targets.items():
        replace_text(target.root / SPLIT_FILE, json.dumps(dealt.split(number), indent=2, ensure_ascii=False) + "\n")
        run = _FoldRun(source, target, root, number, folds, values, known, report, strict)
        run.complete(devices, resume=resume)
    return _summarize(source, out, root, dealt)


def fold_bundles(folder: Path) -> list[Bundle]:
    """Return the bundles of the folds in the folder of a cross-validation, in order, whether trained or not."""
    count = len(read_json(folder / FOLDS_FILE).get("folds", []))
    return [Bundle(folder / f"fold_{number}") for number in range(count)]


@dataclass(frozen=True)
class _FoldRun:
    """One fold: what to train, where, and its progress."""

    source: Bundle
    target: Bundle
    data: Path
    number: int
    count: int
    settings: dict[str, Any]
    config: Mapping[str, Any]
    report: Progress | None
    strict: bool

    @property
    def values(self) -> dict[str, Any]:
        """The settings of the run with the fold's own split."""
        return {**self.settings, "split_file": str(self.target.root / SPLIT_FILE)}

    def complete(self, devices: int, *, resume: bool) -> None:
        """Train and score the fold, unless that is done."""
        if resume:
            self._check_config()
        trained = resume and self.is_trained()
        if not trained:
            api.train(
                self.source.root,
                self.data,
                output=self.target.root,
                settings=self.values,
                devices=devices,
                resume=resume and _has_state(self.target),
                overwrite=True,
                strict=self.strict,
                report=self._told("epochs"),
            )
        if not (trained and is_scored(self.target)):
            scored = {name: value for name, value in self.values.items() if name != "recipe"}
            report = self._told("scored cases")
            api.evaluate(self.target.root, self.data, settings=scored, strict=self.strict, report=report)

    def is_trained(self) -> bool:
        """Whether an earlier run has finished this fold with the same settings.

        Raises:
            RequestError: It has, with other settings.
        """
        path = self.target.root / "runs" / "train" / "manifest.json"
        if not (path.is_file() and self.target.weights.is_file()):
            return False
        manifest = Manifest.read(path)
        self._check_settings(manifest)
        return manifest.status == "done"

    def _check_config(self) -> None:
        """Refuse a fold that was started from another bundle or recipe."""
        known = self.target.config_path("train").is_file()
        if known and merged(self.target.load_configs("train")) != self.config:
            raise RequestError(
                f"'{self.target.root}' was started from another bundle or recipe than the present "
                f"'{self.source.name}': folds must be trained alike to be compared. Give the same ones, or another "
                "--output"
            )

    def _check_settings(self, manifest: Manifest) -> None:
        known = {name: value for name, value in self.settings.items() if name not in (*_PLACES, "recipe")}
        now = {name: known.get(name) for name in {*known, *manifest.overrides} - {*_PLACES}}
        for name, value in now.items():
            then = manifest.knobs.get(name)
            if name not in known or (name in manifest.knobs and not _alike(then, value)):
                given = "not set" if name not in known else f"{value!r}"
                raise RequestError(
                    f"'{self.target.root}' was trained with {name}={then!r}, which now is {given}: folds must be "
                    "trained alike to be compared. Give the same --set, --overwrite to start over, or another "
                    "--output"
                )

    def _told(self, counted: str) -> Progress | None:
        if self.report is None:
            return None
        report = self.report

        def tell(done: float, total: int, note: str) -> None:
            report(done, total, f"{counted} of fold {self.number} of {self.count}: {note}")

        return tell


def is_scored(bundle: Bundle) -> bool:
    """Whether the present weights of a fold were evaluated."""
    path = bundle.root / "runs" / "evaluate" / "manifest.json"
    if not (path.is_file() and bundle.weights.is_file()):
        return False
    manifest = Manifest.read(path)
    record = manifest.bundle
    return (
        manifest.status in ("done", "partial")
        and record is not None
        and (record.weights_sha256 == sha256_file(bundle.weights))
    )


def _write_folds(dealt: Folds, out: Path) -> None:
    """Write `folds.json`; parallel jobs write the same content."""
    check_folder(out)
    path, text = out / FOLDS_FILE, dealt.to_json()
    if not path.is_file():
        replace_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise RequestError(
            f"'{path}' assigns the cases differently from this data set, number of folds and seed: give the ones it "
            "was made with, or another --output"
        )


def _summarize(source: Bundle, out: Path, data: Path, dealt: Folds) -> Scores | None:
    """Write the table and the ensemble, once all folds are there."""
    members = fold_bundles(out)
    if not all(is_scored(member) for member in members):
        return None
    failed: list[str] = []
    rows: list[dict[str, Any]] = []
    for number, member in enumerate(members):
        manifest = Manifest.read(member.root / "runs" / "evaluate" / "manifest.json")
        stems = dealt.folds[number]
        cases = find_dataset(data, "val", split_file=member.root / SPLIT_FILE)
        for stem, case in zip(stems, cases, strict=True):
            record = manifest.cases.get(case["name"])
            if record is None or record.status == "failed":
                failed.append(case["name"])
                continue
            rows.append(
                {"case": case["name"], "patient": dealt.patients[stem], "fold": number, "metrics": record.metrics}
            )
    scores = Scores(source.name, len(members), tuple(rows), tuple(failed))
    write_scores(scores, out / CROSS_VALIDATION)
    write_ensemble(members, out)
    return scores


def _seed(value: Any) -> int:
    if not isinstance(value, int):
        raise RequestError(f"seed={value!r}: expected an integer, which decides the assignment to folds")
    return value


def _has_state(bundle: Bundle) -> bool:
    """Whether there is a state to resume from."""
    return any((bundle.root / "runs" / "train" / name).is_file() for name in ("last.pt", "previous.pt"))


def _alike(one: Any, other: Any) -> bool:
    """Compare a value with its record in a manifest, which cuts absolute paths to their last part."""
    if isinstance(one, str) and isinstance(other, str):
        return Path(one).name == Path(other).name
    return bool(one == other)
