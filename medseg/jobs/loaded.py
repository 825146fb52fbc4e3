"""A bundle that stays in memory and runs its workflow on one image at a time."""

from __future__ import annotations

import copy
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from medseg.errors import RequestError
from medseg.jobs.job import build_evaluator, open_workflow, run_case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from monai.data import MetaTensor

    from medseg.jobs.job import Job

    Output = Literal["file", "labels", "probabilities"]

__all__ = ["LoadedBundle"]


class LoadedBundle:
    """A bundle with its network in memory; calls from several threads run one at a time.

    Args:
        job: Job from `prepare("predict", ...)`.

    Attributes:
        workflow: MONAI's workflow of the bundle's `inference.json`, initialized.

    Raises:
        BundleError: Incompatible components in the config.
        WeightsError: Weights that do not match the network.
    """

    def __init__(self, job: Job) -> None:
        self._lock = threading.Lock()
        self.workflow = open_workflow(job, "infer", ())
        self._evaluator = build_evaluator(self.workflow)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Run the whole workflow, which writes the mask.

        Args:
            entry: Input of the workflow's preprocessing, with `image` and `name`.

        Raises:
            CaseError: An unusable image.
        """
        self._run(entry, "file")

    def predict(self, entry: Mapping[str, Any], *, probabilities: bool = False) -> MetaTensor:
        """Run the workflow without its writer, and return the result.

        Args:
            entry: Input of the workflow's preprocessing, with `image` (a path or an image in memory) and `name`.
            probabilities: Whether to return the probability of each class instead of labels.

        Returns:
            Labels of shape (1, *spatial), or float32 probabilities of shape (K, *spatial), in native space.

        Raises:
            CaseError: An unusable image.
            RequestError: A workflow without probabilities in native space.
        """
        result: MetaTensor = self._run(entry, "probabilities" if probabilities else "labels")["pred"]
        return result

    def _run(self, entry: Mapping[str, Any], output: Output) -> Mapping[str, Any]:
        with self._lock:
            if self._evaluator is None:
                self._evaluator = build_evaluator(self.workflow)
            engine = self._evaluator
            # An engine stopped by an error would first finish its old run, so it is kept only after success.
            self._evaluator = None
            with _changed(engine.inferer, self.workflow.postprocessing, output):
                run_case(engine, partial(self._preprocess, entry), str(entry.get("source", entry["image"])))
            result: Mapping[str, Any] = engine.state.output[0]
            engine.state.output = engine.state.batch = None
            self._evaluator = engine
        return result

    def _preprocess(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """Preprocess a case; an image in memory is loaded here if the bundle's loader accepts files only."""
        from monai.transforms import LoadImaged

        from medseg.io import load
        from medseg.transforms.load import LoadCased

        steps: Any = self.workflow.preprocessing
        loaders = [step for step in getattr(steps, "transforms", ()) if isinstance(step, LoadImaged)]
        if loaders and not isinstance(entry["image"], str) and not any(isinstance(one, LoadCased) for one in loaders):
            steps = copy.copy(steps)
            steps.transforms = tuple(step for step in steps.transforms if step not in loaders)
            entry = {**entry, "image": load(entry["image"])}
        result: Mapping[str, Any] = steps(dict(entry))
        return result


@contextmanager
def _changed(inferer: Any, postprocessing: Any, output: Output) -> Iterator[None]:
    """Change the components of a workflow temporarily, so that they return an output instead of writing a file."""
    steps = getattr(postprocessing, "transforms", None)
    if output == "file":
        yield
        return
    if steps is None:
        raise RequestError(f"Unsupported postprocessing: {type(postprocessing).__name__}, expected a Compose.")
    restore = _as_probabilities(inferer) if output == "probabilities" else None
    try:
        postprocessing.transforms = _without_writer(steps) if output == "labels" else _up_to_labels(steps, restore)
        yield
    finally:
        postprocessing.transforms = steps
        if restore is not None:
            restore()


def _without_writer(steps: tuple[Any, ...]) -> tuple[Any, ...]:
    from monai.transforms import SaveImaged

    return tuple(step for step in steps if not isinstance(step, SaveImaged))


def _up_to_labels(steps: tuple[Any, ...], native: Callable[[], None] | None) -> tuple[Any, ...]:
    """Return the transforms before the discretization; none if the inferer returns native probabilities itself.

    Raises:
        RequestError: No transform that discretizes probabilities.
    """
    from monai.transforms import AsDiscreted

    if native is not None:
        return ()
    ends = [number for number, step in enumerate(steps) if isinstance(step, AsDiscreted)]
    if not ends:
        raise RequestError(
            "The bundle's workflow has no probabilities in native space: expected an inferer with output='labels', or "
            "AsDiscreted after Invertd."
        )
    return _without_writer(steps[: ends[0]])


def _as_probabilities(inferer: Any) -> Callable[[], None] | None:
    """Switch an inferer of medseg to probabilities; return a function that undoes it, or None for other inferers."""
    from medseg.inferers.native import NativeInferer, NativeResult

    name = "result" if isinstance(inferer, NativeInferer) else "native"
    native = getattr(inferer, name, None)
    if not isinstance(native, NativeResult) or native.output == "logits":
        return None
    before = {name: native, **({"output": inferer.output} if hasattr(inferer, "output") else {})}
    activation = "softmax" if native.activation == "none" else native.activation
    setattr(inferer, name, replace(native, output="float32", activation=activation))
    if "output" in before:
        inferer.output = "float32"
    return lambda: vars(inferer).update(before)
