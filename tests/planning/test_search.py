"""The search for the largest network and patch that memory and time allow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from medseg.errors import RequestError
from medseg.inferers.blend import count_windows
from medseg.planning.case_stats import CaseStats, Fingerprint
from medseg.planning.choices import DatasetAnalysis, analyze
from medseg.planning.network_sizing import SIZE_LADDER
from medseg.planning.probe import Measurement
from medseg.planning.request import PlanRequest
from medseg.planning.schedule import needed_steps, steps_within
from medseg.planning.search import PROGRAM_BYTES, Candidate, candidates, find, overlap_for, pace_of, positive_integer
from tests.planning.synthetic import color_image, fingerprint, image, volume

LARGE = (volume(shape=(128, 128, 128)),) * 3
MEASURED = Measurement("cpu", 2, {"float32": 1.0}, 0.1, 2.0, 0.5, 1 << 20, 700 << 20)


def ladder(
    *cases: CaseStats, memory: int = 64 << 30, **settings: Any
) -> tuple[list[Candidate], DatasetAnalysis, Fingerprint, PlanRequest]:
    found = fingerprint(*cases)
    request = PlanRequest(memory=memory, settings=settings)
    analysis = analyze(found, request)
    return list(candidates(analysis, found, request)), analysis, found, request


@cache
def large() -> tuple[list[Candidate], DatasetAnalysis, Fingerprint, PlanRequest]:
    """The candidates for volumes of 128 voxels to a side: every rung of the ladder, and one with a batch of one."""
    return ladder(*LARGE)


@pytest.mark.parametrize("cases", [LARGE, (volume(),), (volume(shape=(20, 24, 9)),), (image(shape=(900, 700)),)])
def test_every_candidate_takes_less_work_than_the_one_before(cases: tuple[CaseStats, ...]) -> None:
    every = ladder(*cases)[0]
    work = [item.work for item in every]
    assert work == sorted(set(work), reverse=True)
    assert [item.width for item in every] == sorted((item.width for item in every), reverse=True)


def test_the_last_candidate_for_volumes_is_a_batch_of_one() -> None:
    every = large()[0]
    assert {item.width for item in every} == {width for width, _ in SIZE_LADDER[3]}
    assert all(item.batch >= 2 for item in every[:-1])
    assert (every[-1].batch, every[-1].width) == (1, every[-2].width)
    assert every[-1].layout.voxels <= every[-2].layout.voxels
    assert all(item.batch >= 4 for item in ladder(image(shape=(900, 700)))[0])
    assert all(item.batch == 3 for item in ladder(*LARGE, batch_size=3)[0])


def test_counted_memory_shrinks_along_the_ladder() -> None:
    every = large()[0]
    taken = [item.memory(gpu=True) for item in every]
    # A narrower network on a larger patch takes as much as the rung above it, give or take a percent.
    assert all(after <= 1.02 * before for before, after in pairwise(taken))
    for width in {item.width for item in every}:
        own = [item.memory(gpu=True) for item in every if item.width == width]
        assert own == sorted(set(own), reverse=True)
    assert [item.memory(gpu=False) for item in every] == [
        n + PROGRAM_BYTES + item.cache_bytes for n, item in zip(taken, every, strict=True)
    ]


@pytest.mark.parametrize("shape", [(16, 16, 16), (60, 70, 50), (200, 200, 200), (400, 30, 30)])
def test_a_batch_is_a_power_of_two_and_holds_at_least_two_patches(shape: tuple[int, int, int]) -> None:
    for item in ladder(volume(shape=shape))[0][:-1]:
        assert 2 <= item.batch <= 8
        assert math.log2(item.batch).is_integer()
        assert item.batch == item.batch_size * item.patches_per_case
        assert item.batch == 2 or item.batch * item.layout.voxels <= 200_000


def test_cases_are_kept_in_memory_until_they_take_two_fifths_of_it() -> None:
    voxels = 3 * 128**3 * 4 * 2
    every = ladder(*LARGE)[0]
    assert {(item.cache_all, item.cache_bytes) for item in every} == {(True, voxels)}
    memory = voxels * 2
    tight = ladder(*LARGE, memory=memory)[0]
    assert {(item.cache_all, item.cache_bytes) for item in tight} == {(False, int(0.4 * memory))}
    assert {item.patches_per_case for item in tight[:-1]} == {2}
    assert {item.patches_per_case for item in every} == {1}


def test_given_patch_size_batch_and_patches_are_kept() -> None:
    every, *_ = ladder(*LARGE, patch_size=[32, 48, 64], batch_size=3, patches_per_case=2)
    assert {item.layout.patch for item in every} == {(32, 48, 64)}
    assert {(item.batch_size, item.patches_per_case, item.batch) for item in every} == {(3, 2, 6)}
    assert {item.width for item in every} == {width for width, _ in SIZE_LADDER[3]}
    assert not every[0].layout.whole
    assert ladder(*LARGE, patch_size=[128, 128, 160])[0][0].layout.whole


@pytest.mark.parametrize("patch", [32, [32, 32], [32, 32, 32, 32], [32, 32, 32.5], "32,32,32", (32, 32, 32)])
def test_a_patch_size_of_another_form_is_refused(patch: Any) -> None:
    with pytest.raises(RequestError, match="patch_size=") as error:
        ladder(*LARGE, patch_size=patch)
    assert repr(patch) in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None, [2]])
def test_a_count_is_a_positive_integer_from_one_up(value: Any) -> None:
    with pytest.raises(RequestError, match="batch_size="):
        ladder(*LARGE, batch_size=value)
    with pytest.raises(RequestError, match="max_epochs="):
        positive_integer("max_epochs", value)
    assert positive_integer("max_epochs", 1) == 1


def test_on_a_gpu_the_first_that_fits_the_memory_is_taken() -> None:
    every, analysis, found, request = large()
    for place in (0, 3, len(every) - 1):
        exact = replace(request, memory=every[place].memory(gpu=True))
        first = next(n for n, item in enumerate(every) if item.memory(gpu=True) <= exact.memory)
        chosen = find(every, analysis, found, exact, None, gpu=True)
        assert chosen.candidate is every[first]
        assert (chosen.larger, chosen.slower, chosen.measured) == (first, 0, None)
        tighter = replace(request, memory=every[first].memory(gpu=True) - 1)
        if place < len(every) - 1:
            assert find(every, analysis, found, tighter, None, gpu=True).candidate is not every[first]


def test_on_a_cpu_the_search_starts_at_a_size_that_trains_in_hours() -> None:
    every, analysis, found, request = large()
    chosen = find(every, analysis, found, request, None, gpu=False).candidate
    assert chosen.width == 16
    assert chosen.layout.voxels <= 1.2 * 96**3 / 4
    slides, *rest = ladder(image(shape=(900, 700)))
    assert find(slides, *rest, None, gpu=False).candidate.width == 16


@pytest.mark.parametrize("gpu", [True, False])
def test_less_memory_than_the_smallest_takes_is_refused_with_what_would_do(gpu: bool) -> None:
    every, analysis, found, request = large()
    smallest = every[-1].memory(gpu=gpu)
    with pytest.raises(RequestError, match="--memory") as error:
        find(every, analysis, found, replace(request, memory=smallest - 1), None, gpu=gpu)
    assert f"{math.ceil(smallest / 2**30 * 10) / 10:g}G" in str(error.value)
    enough = replace(request, memory=int(math.ceil(smallest / 2**30 * 10) / 10 * 2**30))
    assert find(every, analysis, found, enough, None, gpu=gpu).candidate.memory(gpu=gpu) <= enough.memory


def counting(
    measure: Callable[[Candidate, int], Measurement],
) -> tuple[list[Candidate], Callable[[Candidate], Measurement]]:
    """Return a list of what is measured, and a measurement that is also given how many came before."""
    seen: list[Candidate] = []

    def wrapped(item: Candidate) -> Measurement:
        seen.append(item)
        return measure(item, len(seen) - 1)

    return seen, wrapped


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_what_does_not_run_gives_way_to_the_next_smaller(failing: int) -> None:
    every, analysis, found, request = large()
    seen, measure = counting(lambda item, before: replace(MEASURED, fits=before >= failing))
    chosen = find(every, analysis, found, request, measure, gpu=True)
    assert seen == every[: failing + 1]
    assert (chosen.candidate, chosen.larger) == (every[failing], failing)
    assert chosen.measured is not None
    assert chosen.measured.fits


def test_after_four_that_do_not_run_the_plan_is_refused() -> None:
    every, analysis, found, request = large()
    seen, measure = counting(lambda item, before: replace(MEASURED, fits=False))
    with pytest.raises(RequestError, match="--memory"):
        find(every, analysis, found, request, measure, gpu=True)
    assert seen == every[:4]


@pytest.mark.parametrize(("gpu", "held"), [(True, 0), (False, 1)])
def test_the_measured_memory_of_program_cases_and_step_has_to_fit(gpu: bool, held: int) -> None:
    every, analysis, found, request = large()
    start = find(every, analysis, found, request, None, gpu=gpu).candidate
    room = request.memory - held * (MEASURED.program_bytes + start.cache_bytes)
    for step_bytes, fits in ((room, True), (room + 1, False)):
        measured = replace(MEASURED, step_bytes=step_bytes)
        seen, measure = counting(lambda item, before, first=measured: MEASURED if before else first)  # type: ignore[misc]
        chosen = find(every, analysis, found, request, measure, gpu=gpu).candidate
        assert (chosen is start) == fits
        assert len(seen) == (1 if fits else 2)


def by_work(scale: float) -> Callable[[Candidate, int], Measurement]:
    return lambda item, before: replace(MEASURED, step_seconds={"float32": scale * item.work / 1e9}, draw_seconds=0.0)


@pytest.mark.parametrize("budget", [600.0, 3600.0, 14_400.0, 86_400.0, 1e7])
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_a_budget_gives_the_largest_that_has_time_for_its_steps(budget: float, scale: float) -> None:
    every, analysis, found, request = large()
    request = replace(request, budget=budget)
    seen, measure = counting(by_work(scale))
    chosen = find(every, analysis, found, request, measure, gpu=True)
    usable = [item for item in every if item.batch > 1]

    def has_time(item: Candidate) -> bool:
        pace = pace_of(item, by_work(scale)(item, 0), analysis, found, request)
        return steps_within(budget, pace) >= needed_steps(pace.steps)

    expected = next((item for item in usable if has_time(item)), usable[-1])
    assert chosen.candidate is expected
    assert chosen.slower == usable.index(expected)
    assert len(seen) <= math.ceil(math.log2(len(usable) + 1))
    assert len(set(map(id, seen))) == len(seen)


def test_memory_is_refused_before_anything_is_measured_for_a_budget() -> None:
    every, analysis, found, request = large()
    seen, measure = counting(by_work(1.0))
    with pytest.raises(RequestError, match="--memory"):
        find(every, analysis, found, replace(request, memory=1 << 20, budget=3600.0), measure, gpu=True)
    assert seen == []


def test_a_batch_of_one_is_left_for_want_of_memory_alone() -> None:
    every, analysis, found, request = large()
    _, measure = counting(by_work(1e6))
    slow = find(every, analysis, found, replace(request, budget=60.0), measure, gpu=True)
    assert slow.candidate is every[-2]
    tight = replace(request, budget=60.0, memory=every[-1].memory(gpu=True))
    assert find(every, analysis, found, tight, measure, gpu=True).candidate is every[-1]


def test_nothing_that_runs_within_a_budget_is_refused() -> None:
    every, analysis, found, request = large()
    _, measure = counting(lambda item, before: replace(MEASURED, fits=False))
    with pytest.raises(RequestError, match="--memory"):
        find(every, analysis, found, replace(request, budget=3600.0), measure, gpu=True)


def test_a_budget_that_is_not_measured_changes_nothing() -> None:
    every, analysis, found, request = large()
    plain = find(every, analysis, found, request, None, gpu=True)
    assert find(every, analysis, found, replace(request, budget=60.0), None, gpu=True) == plain


def test_pace_follows_from_the_measured_times() -> None:
    every, analysis, _, request = large()
    found = fingerprint(*LARGE * 40, validation_cases=7)
    item = every[0]
    measured = replace(MEASURED, step_seconds={"float32": 1.0, "bfloat16": 0.5})
    pace = pace_of(item, measured, analysis, found, request)
    assert pace.step == pytest.approx(0.5 * 1.05 + item.batch * 0.1)
    assert pace.load == pytest.approx(120 * 2.0)
    windows = count_windows(analysis.shape, item.layout.patch, overlap_for(analysis, item))
    assert pace.validation == pytest.approx(7 * (2.0 + windows * 0.5))
    assert pace.steps == -(-120 // item.batch_size)
    given = replace(request, settings={"steps_per_epoch": 11})
    assert pace_of(item, measured, analysis, found, given).steps == 11


@pytest.mark.parametrize(
    ("device", "threads", "workers", "draw", "step"),
    [
        ("cpu", 2, 0, 0.1, 1.05 + 0.2),
        ("cpu", 2, 4, 0.1, 1.05 + 0.1),
        ("cpu", 0, 4, 0.1, 1.05 + 0.2),
        ("NVIDIA H200", 8, 0, 0.1, 1.05 + 0.2),
        ("NVIDIA H200", 8, 4, 0.1, 1.05),
        ("NVIDIA H200", 8, 4, 5.0, 2.5),
    ],
)
def test_workers_draw_patches_while_a_gpu_computes_and_share_the_threads_of_a_cpu(
    device: str, threads: int, workers: int, draw: float, step: float
) -> None:
    every, analysis, found, request = large()
    measured = replace(MEASURED, device=device, threads=threads, workers=workers, draw_seconds=draw)
    assert every[0].batch == 2
    assert pace_of(every[0], measured, analysis, found, request).step == pytest.approx(step)


@pytest.mark.parametrize(("shape", "overlap"), [((64, 64, 64), 0.5), ((128, 128, 128), 0.5), ((300, 300, 300), 0.25)])
def test_windows_overlap_by_half_until_they_are_more_than_64(shape: tuple[int, int, int], overlap: float) -> None:
    every, analysis, *_ = ladder(volume(shape=shape), patch_size=[64, 64, 64])
    assert overlap_for(analysis, every[0]) == overlap
    assert (count_windows(shape, (64, 64, 64), 0.5) <= 64) == (overlap == 0.5)


def test_color_counts_three_channels_of_every_prepared_image() -> None:
    every, *_ = ladder(color_image(), image())
    assert every[0].definition["in_channels"] == 3
    assert every[0].cache_bytes == 2 * 96 * 80 * 4 * (3 + 1)
