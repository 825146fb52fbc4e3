"""Run a checked job, case by case, and keep the record."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.knobs import knobs
from medseg.errors import CaseError, RequestError
from medseg.files import sha256_file, stamp
from medseg.io.names import case_stem
from medseg.jobs.job import build_evaluator, guarded, open_workflow, run_case
from medseg.jobs.slides import check_slides
from medseg.manifest import BundleRecord, CaseRecord, Manifest
from medseg.notices import CaseWarning, collect, forward
from medseg.scoring.scores import nanmean

if TYPE_CHECKING:
    from medseg.jobs.job import Job
    from medseg.types import Announce, Case, Progress

    # Writes the result of one case.
    Write = Callable[[], None]

__all__ = ["evaluate", "predict", "train"]

_STEPS_BETWEEN_READINGS: Final = 10
_PLACES: Final = ("dataset_dir", "output_dir", "resume")


def predict(
    job: Job,
    cases: Sequence[Case],
    output: Path,
    *,
    resume: bool = False,
    overlay: bool = False,
    report: Progress | None = None,
    announce: Announce | None = None,
) -> Manifest:
    """Write a mask for each case and `manifest.json` into `output`; a case that fails does not stop the others.

    Slides come last, and become polygons (see `medseg.jobs.slides`).

    Args:
        job: Request from `prepare("predict", ...)`.
        cases: Images from `medseg.io.list_cases`.
        output: Folder, made if missing.
        resume: Whether to skip cases that an earlier run with the same settings has finished, of the same files.
        overlay: Whether to draw each mask over its image, as a PNG beside it.
        report: Called after each finished window.
        announce: Called with the forecast of a case after its first window.
    """
    _check_output(cases, output)
    takes_slides = "slides" in job.config
    slides = [case for case in cases if takes_slides and case.kind == "slide"]
    if slides:
        check_slides(slides, cases, job.config, output)
    workflow = open_workflow(job, "infer", cases)
    manifest = _manifest(job, output / "manifest.json")
    sources = {case.name: stamp(case.image) for case in cases}
    earlier = manifest.resume(sources) if resume else set()
    overlays = _overlays(cases)
    with manifest:
        with manifest.stage("load"):
            images = _Images(workflow, output)
            manifest.device = str(images.evaluator.state.device)
        todo = [case for case in cases if not (case.name in earlier and (output / case.output).is_file())]
        # under a memory limit, the next image would use memory of this one
        ahead = not job.config.get("max_memory")
        tell = _Teller(len(cases), len(cases) - len(todo), report, announce)
        writers = (
            images.each([case for case in todo if case not in slides], tell, ahead=ahead),
            _each_slide(workflow, job, [case for case in todo if case in slides], output, tell),
        )
        for case, write in (pair for writer in writers for pair in writer):
            with manifest.case(case.name, source=sources[case.name]) as record:
                record.output = case.output
                write()
            if overlay and record.status == "done" and case not in slides:
                _draw(case, output, overlays[case.name], job, manifest)
    return manifest


class _Images:
    """Predicts images with the bundle's workflow; after a failure its engine is built again."""

    def __init__(self, workflow: Any, output: Path) -> None:
        self.workflow = workflow
        self.output = output
        self.evaluator = build_evaluator(workflow)

    def each(self, cases: Sequence[Case], tell: _Teller, *, ahead: bool) -> Iterator[tuple[Case, Write]]:
        """Yield each case and how to write its mask; the next image is read meanwhile if `ahead`."""
        prepared = _prepared(self.workflow.preprocessing, cases, ahead=ahead)
        for case, data in zip(cases, prepared, strict=True):
            tell.begin(case.name, self.workflow.inferer)
            yield case, partial(self._write, case, data)

    def _write(self, case: Case, data: Callable[[], Mapping[str, Any]]) -> None:
        try:
            run_case(self.evaluator, data, case.image)
            if not (self.output / case.output).is_file():
                raise CaseError(f"{case.image}: the bundle's postprocessing wrote no '{self.output / case.output}'")
        except CaseError:
            self.evaluator = build_evaluator(self.workflow)
            raise


def _each_slide(
    workflow: Any, job: Job, slides: Sequence[Case], output: Path, tell: _Teller
) -> Iterator[tuple[Case, Write]]:
    """Yield each slide and how to write its polygons."""
    predictor: Any = guarded(lambda: workflow.parser.get_parsed_content("slides")) if slides else None
    for case in slides:
        tell.begin(case.name, predictor.inferer)
        options = {"labels": job.bundle.label_names, "output_format": job.config.get("output_format") or ""}
        yield case, partial(predictor, case.image, output / case.output, **options)


class _Teller:
    """Reports the progress of each case, and the forecasts."""

    def __init__(self, total: int, done: int, report: Progress | None, announce: Announce | None = None) -> None:
        self.total = total
        self.next = done
        self.report = report
        self.announce = announce

    def begin(self, name: str, inferer: Any) -> None:
        """Start to count the windows of the next case."""
        number, report, announce = self.next, self.report, self.announce
        self.next += 1
        if report is not None and hasattr(inferer, "on_progress"):
            report(number, self.total, name)
            inferer.on_progress = lambda done, windows: report(number + done / windows, self.total, name)
        if announce is not None and hasattr(inferer, "on_forecast"):
            inferer.on_forecast = lambda forecast: announce(name, forecast.describe())


def evaluate(job: Job, cases: Sequence[Case], output: Path, *, report: Progress | None = None) -> Manifest:
    """Predict each case and score it against its label in the label's native space.

    The manifest goes to `output`. Each case holds the key metric for each class by the class's name
    (no value where the label lacks it), and their mean.

    Args:
        job: Request from `prepare("evaluate", ...)`.
        cases: Labeled images from `medseg.io.list_dataset`.
        output: Folder, made if missing.
        report: Called after each finished window.
    """
    workflow = open_workflow(job, "train", cases)
    names = list(job.bundle.label_names.values())
    tell = _Teller(len(cases), 0, report)
    with _manifest(job, output / "manifest.json") as manifest:
        evaluator = build_evaluator(workflow)
        manifest.device = str(evaluator.state.device)
        for case in cases:
            with manifest.case(case.name) as record:
                tell.begin(case.name, workflow.val_inferer)
                run_case(evaluator, partial(workflow.val_preprocessing, case.entry()), case.image)
                _score(record, names, evaluator.state)
            if record.status == "failed":
                evaluator = build_evaluator(workflow)
    return manifest


def _score(record: CaseRecord, names: Sequence[str], state: Any) -> None:
    values = state.metric_details[state.key_metric_name][0].tolist()
    record.metrics = dict(zip(names, values, strict=True))
    record.metrics["mean"] = nanmean(values)


def train(job: Job, *, report: Progress | None = None) -> Manifest:
    """Train the bundle: best weights to `models/model.pt`, state and manifest to the config's `output_dir`.

    What the steps of the config's `initialize` return as text goes into the manifest's notes.

    Args:
        job: from `prepare("train", ...)`.
        report: told about each finished step.
    """
    from ignite.engine import Events

    workflow = open_workflow(job, "train")
    with collect(strict=job.strict) as warnings:
        said = guarded(workflow.initialize)
    output = Path(workflow.parser.get_parsed_content("output_dir"))
    manifest = _manifest(job, output / "manifest.json")
    manifest.notes = [text for text in said if isinstance(text, str) and text]
    manifest.warnings = warnings
    with manifest:
        with manifest.stage("load"):
            trainer = guarded(lambda: workflow.trainer)
        manifest.device = str(trainer.state.device)
        _follow(trainer, workflow.evaluator, manifest, report)
        if isinstance(job.config.get("run_log"), dict):
            log = workflow.parser.get_parsed_content("run_log")
            # of a resumed run: what was found before
            trainer.add_event_handler(Events.STARTED, lambda: _take_validations(log.history, manifest))
        with manifest.stage("train"):
            guarded(workflow.run)
    return manifest


def _follow(trainer: Any, validator: Any, manifest: Manifest, report: Progress | None) -> None:
    """Report each step, and record each validation in the manifest."""
    from ignite.engine import Events

    state = trainer.state
    found: dict[str, float] = {}

    def step() -> None:
        # on CUDA, reading the loss waits for the device
        if report is not None and (state.device.type == "cpu" or state.iteration % _STEPS_BETWEEN_READINGS == 0):
            report(state.iteration / state.epoch_length, state.max_epochs, _live_line(state, found))

    def validated() -> None:
        found.update({name: float(value) for name, value in validator.state.metrics.items()})
        manifest.add_validation(state.epoch, getattr(state, "last_metrics", found))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
    validator.add_event_handler(Events.EPOCH_COMPLETED, validated)


def _live_line(state: Any, found: Mapping[str, float]) -> str:
    """Return a short text with loss, latest metrics and speed of a training."""
    words = [f"loss {float(state.output['loss'].detach()):.3f}"]
    words += [f"{name.removeprefix('val_').replace('_', ' ')} {value:.4f}" for name, value in found.items()]
    speed = getattr(state, "patches_per_second", None)
    return ", ".join([*words, *([f"{speed:.1f} patches/s"] if speed else [])])


def _take_validations(history: Sequence[Mapping[str, float]], manifest: Manifest) -> None:
    for entry in history:
        values = {name: value for name, value in entry.items() if name != "epoch"}
        if "loss" not in values:
            manifest.add_validation(int(entry["epoch"]), values)


def _manifest(job: Job, path: Path) -> Manifest:
    files = b"".join(file.read_bytes() for file in job.config_files)
    record = BundleRecord(
        name=job.bundle.name,
        version=job.bundle.metadata.get("version"),
        config_sha256=hashlib.sha256(files).hexdigest(),
        weights_sha256=sha256_file(job.weights) if job.weights.is_file() and job.command != "train" else None,
    )
    values = {name: value for name, value in knobs(dict(job.config)).items() if name not in ("bundle_root", *_PLACES)}
    seeds = {"seed": job.config["seed"]} if "seed" in job.config else {}
    settings = list(job.settings)
    return Manifest(
        job.command, bundle=record, knobs=values, overrides=settings, seeds=seeds, path=path, strict=job.strict
    )


def _check_output(cases: Sequence[Case], output: Path) -> None:
    images = {Path(case.image).resolve(): case.image for case in cases}
    for case in cases:
        replaced = images.get((output / case.output).resolve())
        if replaced is not None:
            which = "itself" if replaced == case.image else f"'{replaced}'"
            raise RequestError(f"The mask of '{case.image}' would overwrite the image {which}: choose another folder.")


def _overlays(cases: Sequence[Case]) -> dict[str, str]:
    """Return the overlay of each case: never the path of a mask, or of another overlay."""
    short = {case.name: str(Path(case.output).with_name(f"{case_stem(case.output)}_overlay.png")) for case in cases}
    taken = Counter([*short.values(), *(case.output for case in cases)])
    return {
        case.name: short[case.name] if taken[short[case.name]] == 1 else f"{case.output}_overlay.png" for case in cases
    }


def _draw(case: Case, output: Path, name: str, job: Job, manifest: Manifest) -> None:
    from medseg.reporting.overlay import write_overlay

    # The values of such masks are object numbers, which have no names
    labels = None if job.config.get("number_objects") else job.bundle.label_names
    try:
        with collect(deferred=True):  # the prediction has already given the warnings of this image
            write_overlay(case.image, output / case.output, output / name, labels=labels)
    except CaseError as error:
        manifest.notes.append(f"no overlay of {case.output}: {error}")


def _prepared(preprocessing: Any, cases: Sequence[Case], *, ahead: bool) -> Iterator[Callable[[], Mapping[str, Any]]]:
    """Yield a function per case that returns its preprocessed data; the next case is read during the prediction."""
    if not ahead:
        for case in cases:
            yield partial(preprocessing, case.entry())
        return
    with ThreadPoolExecutor(1) as reader:
        following = [_ReadAhead(reader, preprocessing, case) for case in cases[:1]]
        for number in range(len(cases)):
            present = following.pop()
            following = [_ReadAhead(reader, preprocessing, case) for case in cases[number + 1 : number + 2]]
            yield present


class _ReadAhead:
    """A case that a thread preprocesses ahead; its warnings are emitted when its data are requested."""

    def __init__(self, reader: ThreadPoolExecutor, preprocessing: Any, case: Case) -> None:
        self.warnings: list[CaseWarning] = []
        self.future = reader.submit(self._read, preprocessing, case)

    def __call__(self) -> Mapping[str, Any]:
        """Wait for the preprocessed data."""
        wait([self.future])
        forward(self.warnings)
        return self.future.result()

    def _read(self, preprocessing: Any, case: Case) -> Mapping[str, Any]:
        with collect(deferred=True, earlier=self.warnings):
            prepared: Mapping[str, Any] = preprocessing(case.entry())
            return prepared
