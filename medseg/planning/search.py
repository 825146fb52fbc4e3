"""Search for the largest network and patch that memory and time allow.

Memory is estimated (`estimate.count`), with the same result on every machine. Time is measured for each candidate that
the bisection visits, so the chosen one has been measured itself.
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

__all__ = ["Candidate", "Found", "Measure", "candidates", "find", "overlap_for", "pace_of", "positive_integer"]

# Measures the bundle of a candidate.
Measure: TypeAlias = Callable[["Candidate"], Measurement]

# Memory of the libraries of a training process (torch, MONAI and their dependencies), measured once.
PROGRAM_BYTES: Final = 900 << 20
# (width, voxels of a patch) of the largest size that two CPU cores train in hours; used without GPU and budget.
_CPU_SIZE: Final = {3: (16, 96**3 // 4), 2: (16, 320**2)}
# Voxels of all patches of a step: enough to average the gradient, few enough to leave memory to the network.
_STEP_VOXELS = {3: 200_000, 2: 400_000}
_BATCHES = {3: (2, 8), 2: (4, 16)}
_CACHE_SHARE = 0.4
_OVERHEAD = 1.05
_PROBES = 4


@dataclass(frozen=True)
class Candidate:
    """A network with its patch and batch.

    Attributes:
        width: Width of the network, as in `medseg.planning.network_sizing`.
        layout: Patch size and strides.
        batch: Number of patches per step.
        batch_size: Number of cases per step.
        definition: Content of the `network_def`.
        cache_bytes: Memory of the cached training cases, in bytes.
        cache_all: Whether all training cases are cached.
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
        """Cost of a training step, estimated on first use."""
        return count(self.definition, self.layout.patch, self.batch)

    @property
    def work(self) -> int:
        """Quantity to which the number of multiplications is proportional."""
        return self.width**2 * self.layout.voxels * self.batch

    @property
    def patches_per_case(self) -> int:
        """Number of patches cropped from each case in one step."""
        return self.batch // self.batch_size

    def memory(self, *, gpu: bool) -> int:
        """Estimated memory of training on its device, in bytes."""
        return self.cost.memory if gpu else PROGRAM_BYTES + self.cache_bytes + self.cost.memory


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        candidate: Chosen candidate.
        measured: Measurement of the chosen candidate; None where nothing was measured.
        larger: Number of larger candidates that exceed the memory.
        slower: Number of larger candidates that exceed the time.
    """

    candidate: Candidate
    measured: Measurement | None
    larger: int
    slower: int


def candidates(analysis: DatasetAnalysis, fingerprint: Fingerprint, request: PlanRequest) -> Iterator[Candidate]:
    """Yield candidates in the order of decreasing work per step."""
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
        every: Candidates, as from `candidates`.
        analysis: Choices that follow from the data.
        fingerprint: Statistics of the training cases.
        request: Memory, budget and settings.
        measure: Measures a candidate; None for no measurement.
        gpu: Whether training will run on a GPU.

    Raises:
        RequestError: No candidate fits the memory.
    """
    if request.budget is not None and measure is not None:
        return _within_budget(every, analysis, fingerprint, request, measure, gpu=gpu)
    start = 0 if gpu else _cpu_start(every, analysis.spatial_dims)
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
    """Return the training times of a candidate.

    Args:
        candidate: Candidate.
        measured: Measurement of that candidate.
        analysis: Choices that follow from the data, with the median shape.
        fingerprint: Statistics of the training cases, with the numbers of cases.
        request: Settings of the user.
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
    """Return the time of a step with its data in seconds; on a CPU, data workers slow the step down."""
    if not measured.workers:
        return compute + data
    if measured.device != "cpu":
        return max(compute, data / measured.workers)
    return compute + data / max(measured.threads, 1)


def overlap_for(analysis: DatasetAnalysis, candidate: Candidate) -> float:
    """Return the overlap of windows: 0.5, or 0.25 if the median image would have more than 64 windows."""
    return 0.5 if count_windows(analysis.shape, candidate.layout.patch, 0.5) <= 64 else 0.25


def _layout(analysis: DatasetAnalysis, request: PlanRequest, limit: int) -> Layout:
    poolings = max_poolings(request.network, analysis.spatial_dims)
    spacing = analysis.spacing or (1.0,) * analysis.spatial_dims
    given = request.settings.get("patch_size")
    if given is None:
        return lay_out(analysis.shape, spacing, limit, poolings)
    if not isinstance(given, list) or len(given) != analysis.spatial_dims or not all(isinstance(n, int) for n in given):
        raise RequestError(f"Invalid patch_size={given!r}: expected {analysis.spatial_dims} integers, in voxels.")
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
    patches = _setting(request, "patches_per_case", 1 if wanted == 1 or total <= room else 2)
    size = _setting(request, "batch_size", max(1, wanted // patches))
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


def _setting(request: PlanRequest, name: str, planned: int) -> int:
    """Return the user's value of a setting, or the planned one."""
    return positive_integer(name, request.settings.get(name, planned))


def positive_integer(setting: str, value: Any) -> int:
    """Return the value of a setting that must be an integer from 1 up.

    Raises:
        RequestError: Any other value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"Invalid {setting}={value!r}: expected an integer from 1 up.")
    return value


def _batch(dims: int, layout: Layout) -> int:
    least, most = _BATCHES[dims]
    room = max(1, _STEP_VOXELS[dims] // layout.voxels)
    return min(max(1 << int(math.log2(room)), least), most)


def _cached(analysis: DatasetAnalysis, fingerprint: Fingerprint) -> int:
    """Return the size of all prepared cases in bytes: float32 channels and a label of 4 bytes per voxel."""
    voxels = sum(math.prod(shape) for shape in fingerprint.shapes(analysis.spacing))
    return voxels * 4 * (len(analysis.channels) + 1)


def _cpu_start(every: Sequence[Candidate], dims: int) -> int:
    """Return the index of the largest candidate that two CPU cores train in hours."""
    width, voxels = _CPU_SIZE[dims]
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
    """Find the largest candidate with time for its training steps, by bisection over measured candidates.

    The number of multiplications does not predict the time of a step: kernels work on blocks of channels, so a narrow
    network may be no faster than one of twice its width.
    """
    budget = request.budget or math.inf
    fitting = [item for item in every if item.memory(gpu=gpu) <= request.memory]
    if not fitting:
        raise _too_large(every[-1], request, gpu=gpu)
    larger = len(every) - len(fitting)
    # A batch of one patch saves memory, but hardly any time.
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
        # The smallest is taken even if it is too slow; `schedule_for` refuses a budget below one epoch.
        if enough or (runs and place == len(fitting) - 1):
            found = Found(item, measured, larger, place)
        low, high = (low, place - 1) if enough else (place + 1, high)
    if found is None:
        raise _too_large(fitting[-1], request, gpu=gpu)
    return found


def _too_large(item: Candidate, request: PlanRequest, *, gpu: bool) -> RequestError:
    needed = item.memory(gpu=gpu)
    parts = f" ({shown_bytes(PROGRAM_BYTES)} for libraries, {shown_bytes(item.cache_bytes)} for cached cases)"
    return RequestError(
        f"Not enough memory: the smallest network, of width {item.width} on patches of {shown(item.layout.patch)}, "
        f"needs about {shown_bytes(needed)}{'' if gpu else parts}; the limit is {shown_bytes(request.memory)}. Raise "
        f"it with --memory {math.ceil(needed / 2**30 * 10) / 10:g}G, or choose a smaller --network."
    )
