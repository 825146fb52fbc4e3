"""Run a bundle's own configs, case by case, and keep the record.

A request is checked completely before torch or MONAI are imported. What then runs is the MONAI workflow of the config
files and nothing else, so `python -m monai.bundle run` on the same files writes the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle.catalog import Bundle, merged
from medseg.bundle.knobs import changed, knobs
from medseg.bundle.trust import leads_inside, require_trust
from medseg.errors import BundleError, CaseError, RequestError, WeightsError, in_a_line, links, own_error
from medseg.files import sha256_file
from medseg.io.names import mask_name
from medseg.jobs.slides import check_slides, is_slide, named_slides
from medseg.manifest import BundleRecord, Manifest, stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    # Called with what is done, what there is to do (cases or epochs) and a few words on the present state.
    Report = Callable[[float, int, str], None]
    # Called with the name of a case and what it will take.
    Announce = Callable[[str, str], None]

__all__ = [
    "Job",
    "build_evaluator",
    "checked_places",
    "evaluate",
    "nanmean",
    "open_workflow",
    "predict",
    "prepare",
    "run_case",
    "train",
]


@dataclass(frozen=True)
class Job:
    """A request that was checked: what to run, and with which values.

    Attributes:
        command: "train", "evaluate" or "predict".
        bundle: whose configs run.
        config_files: the config files, laid over each other in this order.
        config: what they give together, with the user's values in place and the metadata; this very content was
            checked.
        overrides: the user's values.
        settings: names of the knobs that the user set.
        vouched: whether the user vouched for a bundle that need not be declarative.
    """

    command: str
    bundle: Bundle
    config_files: tuple[Path, ...]
    config: Mapping[str, Any]
    overrides: Mapping[str, Any]
    settings: tuple[str, ...]
    vouched: bool

    @property
    def weights(self) -> Path:
        """The weight file that the run starts from or uses."""
        return Path(self.overrides.get("weights", self.bundle.weights))


_CONFIGS = {"train": ("train",), "evaluate": ("train", "evaluate"), "predict": ("inference",)}
_STEPS_BETWEEN_READINGS = 10
_PLACES = ("dataset_dir", "output_dir", "resume")
# What a workflow needs besides its evaluator.
_PARTS = {"infer": ("preprocessing", "inferer"), "train": ("val_preprocessing", "val_inferer")}


def prepare(
    command: str,
    bundle: Bundle,
    settings: Mapping[str, Any],
    *,
    paths: Mapping[str, Any],
    trust: str | None = None,
) -> Job:
    """Check a request without importing torch or MONAI.

    Args:
        command: "train", "evaluate" or "predict".
        bundle: whose configs are to run.
        settings: knobs to change, by name.
        paths: `dataset_dir`, and `output_dir` or `resume` where the command has them.
        trust: fingerprint by which the user vouches for a bundle that is not declarative.

    Raises:
        BundleError: a config is missing or unreadable, or the bundle is not to be trusted.
        RequestError: an unknown knob or a value of the wrong kind.
        WeightsError: the weights that the command needs, or that training is to start from, do not exist.
    """
    names = _CONFIGS[command]
    configs, metadata = bundle.load_configs(*names), bundle.metadata
    require_trust(bundle.root, {**configs, "metadata.json": metadata}, trust)
    config = {**merged(configs), "_meta_": metadata}
    overrides = {**changed(config, settings), **paths, "bundle_root": str(bundle.root)}
    files = tuple(bundle.config_paths(*names))
    job = Job(command, bundle, files, {**config, **overrides}, overrides, tuple(settings), trust is not None)
    checked_places(job)
    if command == "train":
        _check_start(job.config)
    elif not job.weights.is_file():
        raise WeightsError(f"no weights at '{job.weights}': run `medseg train` first, or give --set weights=FILE")
    return job


def checked_places(job: Job) -> Job:
    """Return a job whose results go where the user said, or into the bundle.

    Raises:
        BundleError: they would go to a folder that the bundle names, wherever the user happens to be.
    """
    place = job.config.get("output_dir")
    if not (job.vouched or "output_dir" in job.overrides or place is None or leads_inside(place, job.config)):
        raise BundleError(
            f"bundle '{job.bundle.name}' would write to {place!r} of its own choice; give --set output_dir=FOLDER, or "
            'let its output_dir be {"_target_": "medseg.components.inside", "root": "@bundle_root", "path": ...}'
        )
    return job


def predict(
    job: Job,
    cases: Sequence[Mapping[str, str]],
    output: Path,
    *,
    resume: bool = False,
    report: Report | None = None,
    announce: Announce | None = None,
) -> Manifest:
    """Write a mask for each case and `manifest.json` into `output`; a case that fails does not stop the others.

    Slides come last, and become polygons (see `medseg.jobs.slides`).

    Args:
        job: from `prepare("predict", ...)`.
        cases: from `medseg.components.find_cases`.
        output: folder, made if missing.
        resume: leave out cases that an earlier run with the same settings has done, of the same files.
        report: told about each finished window.
        announce: told what a case will take in time and memory, after its first window.
    """
    cases = named_slides(cases, job.config)
    names = _output_names(job, cases)
    _check_output(cases, names, output)
    check_slides(cases, job.config, output)
    workflow = open_workflow(job, "infer")
    manifest = _manifest(job, output / "manifest.json")
    sources = {case["name"]: stamp(case["image"]) for case in cases}
    earlier = manifest.resume(sources) if resume else set()
    with manifest:
        with manifest.stage("load"):
            evaluator = build_evaluator(workflow)
            manifest.device = str(evaluator.state.device)
        todo = [case for case in cases if not (case["name"] in earlier and (output / names[case["name"]]).is_file())]
        slides = [case for case in todo if is_slide(case["image"], job.config)]
        pictures = [case for case in todo if case not in slides]
        # under a limit, the next image would take from what was promised to this one
        prepared = _prepared(workflow, pictures, ahead=not job.config.get("max_memory"))
        for number, (case, data) in enumerate(zip(pictures, prepared, strict=True), len(cases) - len(todo)):
            with manifest.case(case["name"], source=sources[case["name"]]) as record:
                record.output = names[case["name"]]
                _tell_windows(workflow.inferer, number, len(cases), case["name"], report, announce)
                run_case(evaluator, data, case)
                if not (output / record.output).is_file():
                    raise CaseError(f"{case['image']}: the bundle's postprocessing wrote no '{output / record.output}'")
            if record.status == "failed":
                evaluator = build_evaluator(workflow)
        predictor: Any = _guarded(lambda: workflow.parser.get_parsed_content("slides")) if slides else None
        for number, case in enumerate(slides, len(cases) - len(slides)):
            with manifest.case(case["name"], source=sources[case["name"]]) as record:
                record.output = names[case["name"]]
                _tell_windows(predictor.inferer, number, len(cases), case["name"], report, announce)
                predictor(
                    case["image"],
                    output / record.output,
                    labels=job.bundle.label_names,
                    output_format=job.config.get("output_format") or "",
                )
    return manifest


def evaluate(job: Job, cases: Sequence[Mapping[str, str]], output: Path, *, report: Report | None = None) -> Manifest:
    """Predict each case and score it against its label on the label's own grid.

    The manifest goes to `output`. Each case holds the key metric for each class by the class's name
    (no value where the label lacks it), and their mean.

    Args:
        job: from `prepare("evaluate", ...)`.
        cases: from `medseg.components.find_dataset`.
        output: folder, made if missing.
        report: told about each finished window.
    """
    workflow = open_workflow(job, "train")
    evaluator = build_evaluator(workflow)
    with _manifest(job, output / "manifest.json") as manifest:
        manifest.device = str(evaluator.state.device)
        names = list(job.bundle.label_names.values())
        for number, case in enumerate(cases):
            with manifest.case(case["name"]) as record:
                _tell_windows(workflow.val_inferer, number, len(cases), case["name"], report)
                run_case(evaluator, partial(workflow.val_preprocessing, dict(case)), case)
                values = evaluator.state.metric_details[evaluator.state.key_metric_name][0].tolist()
                record.metrics = dict(zip(names, values, strict=True))
                record.metrics["mean"] = nanmean(values)
            if record.status == "failed":
                evaluator = build_evaluator(workflow)
    return manifest


def train(job: Job, *, report: Report | None = None) -> Manifest:
    """Train the bundle: best weights to `models/model.pt`, state and manifest to the config's `output_dir`.

    What the steps of the config's `initialize` return as text goes into the manifest's notes.

    Args:
        job: from `prepare("train", ...)`.
        report: told about each finished step.
    """
    from ignite.engine import Events

    workflow = open_workflow(job, "train")
    said = _guarded(workflow.initialize)
    output = Path(workflow.parser.get_parsed_content("output_dir"))
    manifest = _manifest(job, output / "manifest.json")
    manifest.notes = [text for text in said if isinstance(text, str) and text]
    with manifest:
        with manifest.stage("load"):
            trainer = _guarded(lambda: workflow.trainer)
        manifest.device = str(trainer.state.device)
        _follow(trainer, workflow.evaluator, manifest, report)
        if isinstance(job.config.get("run_log"), dict):
            log = workflow.parser.get_parsed_content("run_log")
            # of a resumed run: what was found before
            trainer.add_event_handler(Events.STARTED, lambda: _take_validations(log.history, manifest))
        with manifest.stage("train"):
            _guarded(workflow.run)
    return manifest


def _follow(trainer: Any, validator: Any, manifest: Manifest, report: Report | None) -> None:
    """Tell of each step, and enter each validation into the manifest."""
    from ignite.engine import Events

    state = trainer.state
    found: dict[str, float] = {}

    def step() -> None:
        # on CUDA, to read the loss is to wait for it
        if report is not None and (state.device.type == "cpu" or state.iteration % _STEPS_BETWEEN_READINGS == 0):
            report(state.iteration / state.epoch_length, state.max_epochs, _live_line(state, found))

    def validated() -> None:
        found.update({name: float(value) for name, value in validator.state.metrics.items()})
        manifest.add_validation(state.epoch, getattr(state, "last_metrics", found))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
    validator.add_event_handler(Events.EPOCH_COMPLETED, validated)


def _live_line(state: Any, found: Mapping[str, float]) -> str:
    """Loss, latest metrics and speed of a training, in a few words."""
    words = [f"loss {float(state.output['loss'].detach()):.3f}"]
    words += [f"{name.removeprefix('val_').replace('_', ' ')} {value:.4f}" for name, value in found.items()]
    speed = getattr(state, "patches_per_second", None)
    return ", ".join([*words, *([f"{speed:.1f} patches/s"] if speed else [])])


def _take_validations(history: Sequence[Mapping[str, float]], manifest: Manifest) -> None:
    for entry in history:
        values = {name: value for name, value in entry.items() if name != "epoch"}
        if "loss" not in values:
            manifest.add_validation(int(entry["epoch"]), values)


def _check_start(config: Mapping[str, Any]) -> None:
    start = config.get("pretrained")
    if isinstance(start, str) and start and not config.get("resume") and not Path(start).is_file():
        raise WeightsError(f"no weights at '{start}' to start from: give --set pretrained=FILE, or leave it out")


def open_workflow(job: Job, kind: str) -> Any:
    """Return MONAI's workflow of a checked job, not yet initialized; `kind` is "train" or "infer"."""
    with warnings.catch_warnings():
        # MONAI warns that configs run code; this one has just been checked, or vouched for by the user.
        warnings.simplefilter("ignore")
        from monai.bundle import ConfigWorkflow

        workflow = ConfigWorkflow(
            config_file=[str(path) for path in job.config_files],
            workflow_type=kind,
            logging_file=False,
            **job.overrides,
        )
    if job.vouched:
        # Running must not change the content that the user vouched for.
        sys.dont_write_bytecode = True
    else:
        # Not what the files hold by now, but what was checked.
        workflow.parser.read_config(dict(job.config))
        if workflow.parser.get() != job.config:
            raise BundleError(f"MONAI reads the configs of '{job.bundle.name}' in another way than they were checked")
    return workflow


def build_evaluator(workflow: Any) -> Any:
    """Build everything anew: an engine that an error has stopped would take the next case for the rest of that run.

    Raises:
        BundleError: the config's parts do not go together.
    """
    try:
        workflow.initialize()
        evaluator = workflow.evaluator
        missing = [name for name in _PARTS[workflow.get_workflow_type()] if not callable(getattr(workflow, name))]
        if missing or not hasattr(evaluator, "state"):
            raise TypeError(f"no usable {', '.join(missing) or 'evaluator'}")
    except Exception as error:
        own = own_error(error)
        if own is not None:
            raise own from error
        *_, first = links(error)
        causes = dict.fromkeys((in_a_line(error), in_a_line(first)))
        raise BundleError(
            f"the parts of bundle '{workflow.config_root_path.parent}' do not go together: {'; '.join(causes)}. "
            "`medseg bundle check` looks at them one by one"
        ) from error
    return evaluator


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
    return Manifest(job.command, bundle=record, knobs=values, overrides=list(job.settings), seeds=seeds, path=path)


def _output_names(job: Job, cases: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the file of each case: a mask of the wanted format, or the polygons of a slide.

    Raises:
        RequestError: two cases would share one.
    """
    wanted = str(job.config.get("output_format") or "")
    slides = {case["name"] for case in cases if is_slide(case["image"], job.config)}
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for case in cases:
        name = case["name"] if case["name"] in slides else mask_name(case["name"], wanted)
        if name in taken:
            raise RequestError(
                f"{taken[name]} and {case['image']} would share the mask {name}: rename or leave out one"
            )
        taken[name] = case["image"]
        names[case["name"]] = name
    return names


def _check_output(cases: Sequence[Mapping[str, str]], names: Mapping[str, str], output: Path) -> None:
    images = {Path(case["image"]).resolve(): case["image"] for case in cases}
    for case in cases:
        replaced = images.get((output / names[case["name"]]).resolve())
        if replaced is not None:
            which = "itself" if replaced == case["image"] else f"'{replaced}'"
            raise RequestError(f"the mask of '{case['image']}' would replace the image {which}; choose another folder")


def _prepared(
    workflow: Any, cases: Sequence[Mapping[str, str]], *, ahead: bool
) -> Iterator[Callable[[], Mapping[str, Any]]]:
    """Yield for each case how to get its preprocessed data; the next case is read while this one is predicted."""
    if not ahead:
        for case in cases:
            yield partial(workflow.preprocessing, dict(case))
        return
    with ThreadPoolExecutor(1) as reader:
        following = [reader.submit(workflow.preprocessing, dict(case)) for case in cases[:1]]
        for number in range(len(cases)):
            present = following.pop()
            following = [reader.submit(workflow.preprocessing, dict(case)) for case in cases[number + 1 : number + 2]]
            yield present.result


def run_case(evaluator: Any, data: Callable[[], Mapping[str, Any]], case: Mapping[str, str]) -> None:
    """Run an evaluator on one case; whatever goes wrong becomes a `CaseError` or another error of ours.

    Args:
        evaluator: MONAI's engine.
        data: gives the preprocessed case.
        case: its entry, for messages.
    """
    from monai.data import DataLoader, Dataset

    try:
        evaluator.data_loader = DataLoader(Dataset([data()]), batch_size=1)
        evaluator.state.epoch_length = 1
        evaluator.run()
    except Exception as error:
        own = own_error(error)
        if own is not None:
            raise own from error
        reason: BaseException = error
        while reason.__cause__ is not None:  # MONAI tells the transform's place in memory, and why by its cause
            reason = reason.__cause__
        raise CaseError(f"{case['image']}: {type(reason).__name__}: {reason}") from error


def _tell_windows(
    inferer: Any, number: int, total: int, name: str, report: Report | None, announce: Announce | None = None
) -> None:
    if report is not None and hasattr(inferer, "on_progress"):
        report(number, total, name)
        inferer.on_progress = lambda done, windows: report(number + done / windows, total, name)
    if announce is not None and hasattr(inferer, "on_forecast"):
        inferer.on_forecast = lambda forecast: announce(name, forecast.describe())


def _guarded(action: Callable[[], Any]) -> Any:
    """Call, and bring the error of ours to light that MONAI may have wrapped."""
    try:
        return action()
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        raise own from error


def nanmean(values: Sequence[float]) -> float:
    """Return the mean of the values that are numbers; NaN where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
