"""Child process that measures one pruning level: JSON request on standard input, JSON lines on standard output."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from medseg.bundle.catalog import Bundle
from medseg.errors import MedsegError
from medseg.io import list_dataset
from medseg.jobs.job import build_evaluator, open_workflow, prepare, run_case
from medseg.machine import peak_bytes
from medseg.scoring.scores import nanmean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from medseg.types import Progress

__all__ = ["measure_from_stdin"]


def measure_from_stdin() -> None:
    """Measure one level in a child process of `prune`: read a JSON request, write JSON lines."""
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        request = json.load(sys.stdin)
        say(result=_measure(request, lambda *passes: say(passes=passes)))
    except MedsegError as error:
        say(error=error.to_json())


def _measure(request: Mapping[str, Any], report: Progress) -> dict[str, Any]:
    """Score and time the cases of a request with the bundle's evaluation config."""
    bundle, paths = Bundle(Path(request["bundle"])), request["paths"]
    job = prepare("evaluate", bundle, request["settings"], paths=paths, trust=request["trust"])
    level = {"network_def": request["network_def"], "weights": request["weights"]}
    job = replace(job, config={**job.config, **level}, overrides={**job.overrides, **level})
    cases = list_dataset(paths["dataset_dir"], paths["split"])
    workflow = open_workflow(job, "train", cases)
    evaluator = build_evaluator(workflow)
    device = str(evaluator.state.device)
    watch = _Watch(evaluator.inferer, device, len(cases), report)
    evaluator.inferer = watch
    dice, iou = [], []
    for case in cases:
        watch.name = case.name
        run_case(evaluator, partial(workflow.val_preprocessing, case.entry()), case.image)
        values = evaluator.state.metric_details[evaluator.state.key_metric_name][0].tolist()
        dice.append(nanmean(values))
        # IoU follows from Dice for one case and one label.
        iou.append(nanmean([value / (2 - value) for value in values]))
    return {
        "device": device,
        "peak_memory_mib": None if watch.peak is None else watch.peak / 2**20,
        "milliseconds": 1000 * median(watch.seconds),
        "dice": _mean_of_known(dice),
        "iou": _mean_of_known(iou),
    }


def _mean_of_known(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else None


class _Watch:
    """Inferer that times each case, after a warm-up pass over the first case."""

    def __init__(self, inferer: Any, device: str, cases: int, report: Progress) -> None:
        self.inferer = inferer
        self.cuda = device if device.startswith("cuda") else None
        self.passes = cases + 1
        self.report = report
        self.name = ""
        self.done = 0
        self.peak: int | None = None
        self.seconds: list[float] = []

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not self.seconds:
            self._timed(inputs, network, *args, **kwargs)
            self.peak = _peak_bytes(self.cuda)
        seconds, logits = self._timed(inputs, network, *args, **kwargs)
        self.seconds.append(seconds)
        return logits

    def _timed(self, *args: Any, **kwargs: Any) -> tuple[float, Tensor]:
        self.report(self.done, self.passes, self.name)
        if hasattr(self.inferer, "on_progress"):
            before = self.done
            self.inferer.on_progress = lambda n, windows: self.report(before + n / windows, self.passes, self.name)
        self._wait()
        start = time.perf_counter()
        logits: Tensor = self.inferer(*args, **kwargs)
        self._wait()
        self.done += 1
        return time.perf_counter() - start, logits

    def _wait(self) -> None:
        if self.cuda is not None:
            import torch

            torch.cuda.synchronize(self.cuda)


def _peak_bytes(cuda: str | None) -> int | None:
    """Return the peak memory of this process, on the CUDA device or resident on the host."""
    if cuda is not None:
        import torch

        return int(torch.cuda.max_memory_allocated(cuda))
    return peak_bytes() or None
