"""A job: a request on a bundle, checked completely before torch or MONAI are imported, and its MONAI workflow.

What runs is the workflow of the config files and nothing else, so `python -m monai.bundle run` on the same files writes
the same bytes.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle, merged
from medseg.bundle.knobs import changed
from medseg.bundle.trust import leads_inside, require_trust
from medseg.errors import BundleError, CaseError, WeightsError, in_a_line, links, own_error
from medseg.transforms.traits import refuse_unmapped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from medseg.types import Case

__all__ = ["Job", "build_evaluator", "checked_places", "guarded", "open_workflow", "prepare", "run_case"]

_CONFIGS: Final = {"train": ("train",), "evaluate": ("train", "evaluate"), "predict": ("inference",)}
# Components that a workflow needs besides its evaluator.
_PARTS: Final = {"infer": ("preprocessing", "inferer"), "train": ("val_preprocessing", "val_inferer")}
# Entry with the list of cases in the configs of medseg's bundles, for plain MONAI.
_LISTINGS: Final = {"infer": "dataset::data", "train": "validate::dataset::data"}
_LISTS_CASES: Final = ("medseg.components.find_cases", "medseg.components.find_dataset")


@dataclass(frozen=True)
class Job:
    """A checked request to run a command with a bundle.

    Attributes:
        command: "train", "evaluate" or "predict".
        bundle: Bundle whose configs run.
        config_files: Config files, merged in this order.
        config: Merged content with the user's values and the metadata; exactly this content was checked.
        overrides: The user's values.
        settings: Names of the settings that the user changed.
        trusted: Whether the user trusts a bundle that contains executable code.
        strict: Whether a warning fails its case, or ends the run if it belongs to none.
    """

    command: str
    bundle: Bundle
    config_files: tuple[Path, ...]
    config: Mapping[str, Any]
    overrides: Mapping[str, Any]
    settings: tuple[str, ...]
    trusted: bool
    strict: bool = False

    @property
    def weights(self) -> Path:
        """The weight file that the run starts from or uses."""
        return Path(self.overrides.get("weights", self.bundle.weights))


def prepare(
    command: str,
    bundle: Bundle,
    settings: Mapping[str, Any],
    *,
    paths: Mapping[str, Any],
    trust: str | None = None,
    strict: bool = False,
) -> Job:
    """Check a request without importing torch or MONAI.

    Args:
        command: "train", "evaluate" or "predict".
        bundle: Bundle whose configs run.
        settings: Settings of the bundle to change, by name.
        paths: `dataset_dir`, and `output_dir` or `resume` where the command has them.
        trust: SHA-256 of a bundle that contains executable code, to confirm that you trust it.
        strict: Whether a warning fails its case, or ends the run if it belongs to none.

    Raises:
        BundleError: A config is missing or unreadable, or the bundle is not trusted.
        RequestError: Unknown setting, or a value of the wrong type.
        WeightsError: The weights that the command needs, or that training starts from, do not exist.
    """
    names = _CONFIGS[command]
    configs, metadata = bundle.load_configs(*names), bundle.metadata
    require_trust(bundle.root, {**configs, "metadata.json": metadata}, trust)
    config = {**merged(configs), "_meta_": metadata}
    overrides = {**changed(config, settings), **paths, "bundle_root": str(bundle.root)}
    files = tuple(bundle.config_paths(*names))
    job = Job(command, bundle, files, {**config, **overrides}, overrides, tuple(settings), trust is not None, strict)
    checked_places(job)
    if command == "train":
        _check_start(job.config)
    elif not job.weights.is_file():
        text = f"No weights at '{job.weights}': run `medseg train` first, or pass --set weights=FILE."
        raise WeightsError(text, code="missing", path=job.weights)
    return job


def checked_places(job: Job) -> Job:
    """Return the job if its results go where the user said, or into the bundle.

    Raises:
        BundleError: They would go to a folder of the bundle's choice.
    """
    place = job.config.get("output_dir")
    if not (job.trusted or "output_dir" in job.overrides or place is None or leads_inside(place, job.config)):
        raise BundleError(
            f"bundle '{job.bundle.name}' sets its own output folder {place!r}; pass --set output_dir=FOLDER, or "
            'set its output_dir to {"_target_": "medseg.components.inside", "root": "@bundle_root", "path": ...}'
        )
    return job


def _check_start(config: Mapping[str, Any]) -> None:
    start = config.get("pretrained")
    if isinstance(start, str) and start and not config.get("resume") and not Path(start).is_file():
        text = f"No pretrained weights at '{start}' to start from: pass --set pretrained=FILE, or omit it."
        raise WeightsError(text, code="missing", path=start)


def open_workflow(job: Job, kind: str, cases: Sequence[Case] | None = None) -> Any:
    """Return MONAI's workflow of a checked job, not yet initialized.

    Args:
        job: The checked request.
        kind: "train" or "infer".
        cases: Cases of the run, in place of a listing of the config's own.

    Raises:
        BundleError: MONAI reads other configs than those that were checked.
    """
    with warnings.catch_warnings():
        # MONAI warns that configs run code; this one has just been checked, or is trusted by the user.
        warnings.simplefilter("ignore")
        from monai.bundle import ConfigWorkflow

        workflow = ConfigWorkflow(
            config_file=[str(path) for path in job.config_files],
            workflow_type=kind,
            logging_file=False,
            **job.overrides,
        )
    if job.trusted:
        # Running must not change the content that the user trusts.
        sys.dont_write_bytecode = True
    else:
        # Use the checked content, because the files may have changed since.
        workflow.parser.read_config(dict(job.config))
        if workflow.parser.get() != job.config:
            raise BundleError(f"The configs of bundle '{job.bundle.name}' differ from those that were checked.")
    if cases is not None:
        _hand_over(workflow.parser, _LISTINGS[kind], cases)
    return workflow


def _hand_over(parser: Any, listing: str, cases: Sequence[Case]) -> None:
    """Replace the entry that would list the cases again; by objects, because MONAI would parse strings."""
    own = parser.get(listing) if listing in parser else None
    if isinstance(own, dict) and own.get("_target_") in _LISTS_CASES:
        parser[listing] = tuple(case.entry() for case in cases)


def build_evaluator(workflow: Any) -> Any:
    """Build a new evaluator: an engine stopped by an error would treat the next case as the rest of its run.

    Raises:
        BundleError: The components of the config are incompatible.
    """
    try:
        workflow.initialize()
        evaluator = workflow.evaluator
        parts = preprocessing, _ = _PARTS[workflow.get_workflow_type()]
        missing = [name for name in parts if not callable(getattr(workflow, name))]
        if missing or not hasattr(evaluator, "state"):
            raise TypeError(f"no usable {', '.join(missing) or 'evaluator'}")
        refuse_unmapped(getattr(workflow, preprocessing))
    except Exception as error:
        own = own_error(error)
        if own is not None:
            raise own from error
        *_, first = links(error)
        causes = dict.fromkeys((in_a_line(error), in_a_line(first)))
        raise BundleError(
            f"the components of bundle '{workflow.config_root_path.parent}' are incompatible: {'; '.join(causes)}. "
            "`medseg bundle check` tests them one by one"
        ) from error
    return evaluator


def run_case(evaluator: Any, data: Callable[[], Mapping[str, Any]], image: str) -> None:
    """Run an evaluator on one case; any failure becomes a `CaseError` or another `MedsegError`.

    Args:
        evaluator: MONAI's engine.
        data: Returns the preprocessed case.
        image: Path of the image, for messages.
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
        while reason.__cause__ is not None:  # MONAI names the transform by its address, and the reason as its cause
            reason = reason.__cause__
        raise CaseError(f"{image}: {type(reason).__name__}: {reason}") from error


def guarded(action: Callable[[], Any]) -> Any:
    """Call the action; raise the `MedsegError` that MONAI may have wrapped."""
    try:
        return action()
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        raise own from error
