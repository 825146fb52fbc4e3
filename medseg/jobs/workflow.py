"""The MONAI workflow of a checked job: built from its config files and nothing else, run case by case.

So `python -m monai.bundle run` on the same files writes the same bytes.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import BundleError, CaseError, in_a_line, links, own_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from medseg.jobs.job import Job
    from medseg.types import Case

__all__ = ["build_evaluator", "guarded", "open_workflow", "run_case"]

# What a workflow needs besides its evaluator.
_PARTS: Final = {"infer": ("preprocessing", "inferer"), "train": ("val_preprocessing", "val_inferer")}
# Where the configs of our bundles list the cases themselves, for plain MONAI.
_LISTINGS: Final = {"infer": "dataset::data", "train": "validate::dataset::data"}
_LISTS_CASES: Final = ("medseg.components.find_cases", "medseg.components.find_dataset")


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
    if cases is not None:
        _hand_over(workflow.parser, _LISTINGS[kind], cases)
    return workflow


def _hand_over(parser: Any, listing: str, cases: Sequence[Case]) -> None:
    """Put the cases where the config would list them again; as objects, since MONAI reads signs in text."""
    own = parser.get(listing) if listing in parser else None
    if isinstance(own, dict) and own.get("_target_") in _LISTS_CASES:
        parser[listing] = tuple(case.entry() for case in cases)


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


def run_case(evaluator: Any, data: Callable[[], Mapping[str, Any]], image: str) -> None:
    """Run an evaluator on one case; whatever goes wrong becomes a `CaseError` or another error of ours.

    Args:
        evaluator: MONAI's engine.
        data: Gives the preprocessed case.
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
    """Call, and bring the error of ours to light that MONAI may have wrapped."""
    try:
        return action()
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        raise own from error
