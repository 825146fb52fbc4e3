"""The largest network and patch that memory and time allow.

Memory is counted (`estimate.count`), the same on every machine; time is measured, on every candidate that a bisection
comes by. What is chosen is among these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from medseg.errors import RequestError
from medseg.inferers.blend import count_windows
from medseg.machine import shown_bytes
from medseg.planning.case_stats import shown
from medseg.planning.estimate import Cost, count
from medseg.planning.geometry import Layout, lay_out
from medseg.planning.network_sizing import SIZE_LADDER, max_poolings, network_def
from medseg.planning.probe import Measurement
from medseg.planning.schedule import Throughput, epoch_steps, needed_steps, steps_within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.planning.case_stats import Fingerprint
    from medseg.planning.choices import DatasetAnalysis
    from medseg.planning.request import PlanRequest

__all__ = ["Candidate", "Found", "Measure", "candidates", "find", "overlap_for", "pace_of", "whole_number"]

# Given a candidate, measures a bundle planned around it.
Measure: TypeAlias = Callable[["Candidate"], Measurement]

# Programs and libraries of a training process, measured once: torch, MONAI and what they load.
PROGRAM_BYTES: Final = 900 << 20
# Without a GPU and without a budget, the first rung whose width two cores train in hours.
_CPU_RUNG: Final = {3: (16, 96**3 // 4), 2: (16, 320**2)}
# Voxels of all patches of a step: enough to average over, few enough to leave memory to the network.
_STEP_VOXELS = {3: 200_000, 2: 400_000}
_BATCHES = {3: (2, 8), 2: (4, 16)}
_CACHE_SHARE = 0.4
_OVERHEAD = 1.05
_PROBES = 4


@dataclass(frozen=True)
class Candidate:
    """One network with its patch.

    Attributes:
        width: see `medseg.planning.network_sizing`.
        layout: patch and strides.
        batch: patches per step.
        batch_size: cases per step.
        definition: the `network_def`.
        cache_bytes: prepared cases that are kept in memory.
        cache_all: whether these are all of them.
    """

    width: int
    layout: Layout
    batch: int
    batch_size: int
    definition: Mapping[str, Any]
    cache_bytes: int
    cache_all: bool

    @cached_property
    def cost(self) -> Cost:
        """Of a training step, counted when it is first asked for."""
        return count(self.definition, self.layout.patch, self.batch)

    @property
    def work(self) -> int:
        """What multiplications grow with, without counting them."""
        return self.width**2 * self.layout.voxels * self.batch

    @property
    def patches_per_case(self) -> int:
        """Patches cut from each case in one step."""
        return self.batch // self.batch_size

    def memory(self, *, gpu: bool) -> int:
        """Bytes that training takes on its device."""
        return self.cost.memory if gpu else PROGRAM_BYTES + self.cache_bytes + self.cost.memory


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        candidate: what was chosen.
        measured: its measurement; None where nothing was measured.
        larger: how many larger candidates were left out for memory.
        slower: how many were left out for time.
    """

    candidate: Candidate
    measured: Measurement | None
    larger: int
    slower: int


def candidates(analysis: DatasetAnalysis, fingerprint: Fingerprint, request: PlanRequest) -> Iterator[Candidate]:
    """Yield networks and patches, each with less work in a step than the one before."""
    least: float = math.inf
    for width, limit in SIZE_LADDER[analysis.spatial_dims]:
        layout = _layout(analysis, request, limit)
        item = _candidate(analysis, fingerprint, request, width, layout)
        if item.work < least:
            least = item.work
            yield item
    if analysis.spatial_dims == 3 and "batch_size" not in request.settings:
        yield _candidate(analysis, fingerprint, request, width, layout, batch=1)


def find(
    every: Sequence[Candidate],
    analysis: DatasetAnalysis,
    fingerprint: Fingerprint,
    request: PlanRequest,
    measure: Measure | None,
    *,
    gpu: bool,
) -> Found:
    """Choose a candidate.

    Args:
        every: from `candidates`.
        analysis: what the data decided.
        fingerprint: of the data.
        request: with memory and budget.
        measure: measures a candidate; None measures nothing.
        gpu: whether training will run on a GPU.

    Raises:
        RequestError: nothing fits the memory.
    """
    if request.budget is not None and measure is not None:
        return _within_budget(every, analysis, fingerprint, request, measure, gpu=gpu)
    start = 0 if gpu else _cpu_rung(every, analysis.spatial_dims)
    fits = (place for place in range(start, len(every)) if every[place].memory(gpu=gpu) <= request.memory)
    place = next(fits, None)
    if place is None:
        raise _too_large(every[-1], request, gpu=gpu)
    if measure is None:
        return Found(every[place], None, place - start, 0)
    return _first_that_runs(every[place:], request, measure, place - start, gpu=gpu)


def pace_of(
    candidate: Candidate,
    measured: Measurement,
    analysis: DatasetAnalysis,
    fingerprint: Fingerprint,
    request: PlanRequest,
) -> Throughput:
    """Return how fast a candidate trains.

    Args:
        candidate: whose pace.
        measured: its measurement.
        analysis: shape of the median image.
        fingerprint: numbers of cases.
        request: what the user set.
    """
    compute = measured.step_seconds[measured.precision] * _OVERHEAD
    data = candidate.batch * measured.draw_seconds
    windows = count_windows(analysis.shape, candidate.layout.patch, overlap_for(analysis, candidate))
    cases = len(fingerprint.cases)
    return Throughput(
        step=_together(compute, data, measured),
        validation=fingerprint.validation_cases * (measured.load_seconds + windows * measured.window_seconds),
        load=cases * measured.load_seconds,
        steps=epoch_steps(cases, candidate.batch_size, request.settings.get("steps_per_epoch")),
    )


def _together(compute: float, data: float, measured: Measurement) -> float:
    """Return the seconds of a step with its data, which workers make meanwhile: on a CPU they take time from it."""
    if not measured.workers:
        return compute + data
    if measured.device != "cpu":
        return max(compute, data / measured.workers)
    return compute + data / max(measured.threads, 1)


def overlap_for(analysis: DatasetAnalysis, candidate: Candidate) -> float:
    """Return the overlap of windows: half, or a quarter where that would be more than 64 of them."""
    return 0.5 if count_windows(analysis.shape, candidate.layout.patch, 0.5) <= 64 else 0.25


def _layout(analysis: DatasetAnalysis, request: PlanRequest, limit: int) -> Layout:
    poolings = max_poolings(request.network, analysis.spatial_dims)
    spacing = analysis.spacing or (1.0,) * analysis.spatial_dims
    given = request.settings.get("patch_size")
    if given is None:
        return lay_out(analysis.shape, spacing, limit, poolings)
    if not isinstance(given, list) or len(given) != analysis.spatial_dims or not all(isinstance(n, int) for n in given):
        raise RequestError(f"patch_size={given!r} must be {analysis.spatial_dims} whole numbers of voxels.")
    strides = lay_out(given, spacing, math.prod(given), poolings).strides
    whole = all(p >= n for p, n in zip(given, analysis.shape, strict=True))
    return Layout(tuple(given), strides, whole)


def _candidate(
    analysis: DatasetAnalysis,
    fingerprint: Fingerprint,
    request: PlanRequest,
    width: int,
    layout: Layout,
    batch: int | None = None,
) -> Candidate:
    wanted = batch or _batch(analysis.spatial_dims, layout)
    total, room = _cached(analysis, fingerprint), int(_CACHE_SHARE * request.memory)
    patches = _whole(request, "patches_per_case", 1 if wanted == 1 or total <= room else 2)
    size = _whole(request, "batch_size", max(1, wanted // patches))
    wanted = size * patches
    definition = network_def(
        request.network,
        analysis.spatial_dims,
        len(analysis.channels),
        len(analysis.classes.labels),
        width,
        layout,
        analysis.norm,
    )
    return Candidate(width, layout, wanted, size, definition, min(total, room), total <= room)


def _whole(request: PlanRequest, knob: str, planned: int) -> int:
    """Return what the user set a knob to, or else what is planned."""
    return whole_number(knob, request.settings.get(knob, planned))


def whole_number(knob: str, value: Any) -> int:
    """Return a number that a knob may count something by.

    Raises:
        RequestError: it is no whole number from 1 up.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{knob}={value!r} must be a whole number from 1 up.")
    return value


def _batch(dims: int, layout: Layout) -> int:
    least, most = _BATCHES[dims]
    room = max(1, _STEP_VOXELS[dims] // layout.voxels)
    return min(max(1 << int(math.log2(room)), least), most)


def _cached(analysis: DatasetAnalysis, fingerprint: Fingerprint) -> int:
    """Bytes of all prepared cases: float32 for each channel, and labels of four bytes."""
    voxels = sum(math.prod(shape) for shape in fingerprint.shapes(analysis.spacing))
    return voxels * 4 * (len(analysis.channels) + 1)


def _cpu_rung(every: Sequence[Candidate], dims: int) -> int:
    """Return the place of the first candidate that two cores train in hours."""
    width, voxels = _CPU_RUNG[dims]
    able = (n for n, item in enumerate(every) if item.width <= width and item.layout.voxels <= 1.2 * voxels)
    return next(able, len(every) - 1)


def _first_that_runs(
    fitting: Sequence[Candidate], request: PlanRequest, measure: Measure, larger: int, *, gpu: bool
) -> Found:
    for number, item in enumerate(fitting[:_PROBES]):
        measured = measure(item)
        if _runs(item, measured, request, gpu=gpu):
            return Found(item, measured, larger + number, 0)
    raise _too_large(fitting[min(_PROBES, len(fitting)) - 1], request, gpu=gpu)


def _runs(item: Candidate, measured: Measurement, request: PlanRequest, *, gpu: bool) -> bool:
    held = 0 if gpu else measured.program_bytes + item.cache_bytes
    return measured.fits and held + measured.step_bytes <= request.memory


def _within_budget(
    every: Sequence[Candidate],
    analysis: DatasetAnalysis,
    fingerprint: Fingerprint,
    request: PlanRequest,
    measure: Measure,
    *,
    gpu: bool,
) -> Found:
    """Find the largest that has time for its steps, by bisection: every candidate that counts is measured itself.

    Multiplications do not tell the time of a step: kernels work on blocks of channels, so a narrow network may gain
    nothing over one of twice its width.
    """
    budget = request.budget or math.inf
    fitting = [item for item in every if item.memory(gpu=gpu) <= request.memory]
    if not fitting:
        raise _too_large(every[-1], request, gpu=gpu)
    larger = len(every) - len(fitting)
    # A batch of one is for want of memory, never of time.
    fitting = [item for item in fitting if item.batch > 1] or fitting
    low, high = 0, len(fitting) - 1
    found: Found | None = None
    while low <= high:
        place = (low + high) // 2
        item = fitting[place]
        measured = measure(item)
        runs = _runs(item, measured, request, gpu=gpu)
        pace = pace_of(item, measured, analysis, fingerprint, request) if runs else None
        enough = pace is not None and steps_within(budget, pace) >= needed_steps(pace.steps)
        # The smallest is taken even if it is too slow; the schedule says whether an epoch fits.
        if enough or (runs and place == len(fitting) - 1):
            found = Found(item, measured, larger, place)
        low, high = (low, place - 1) if enough else (place + 1, high)
    if found is None:
        raise _too_large(fitting[-1], request, gpu=gpu)
    return found


def _too_large(item: Candidate, request: PlanRequest, *, gpu: bool) -> RequestError:
    needed = item.memory(gpu=gpu)
    return RequestError(
        f"No plan fits into {shown_bytes(request.memory)}: the smallest, of width {item.width} on patches of "
        f"{shown(item.layout.patch)}, takes about {shown_bytes(needed)}"
        + (
            ""
            if gpu
            else f", of which {shown_bytes(PROGRAM_BYTES)} are programs and {shown_bytes(item.cache_bytes)} cases"
        )
        + f". Give --memory {math.ceil(needed / 2**30 * 10) / 10:g}G or more, or a smaller network."
    )
