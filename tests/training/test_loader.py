"""Batches by epochs from workers that stay; errors and deaths of workers in words that help."""

from __future__ import annotations

import logging
import multiprocessing.context
import os
import signal
import time
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Compose, RandGaussianNoised, Transform

from medseg.errors import CaseError, RequestError, WeightsError
from medseg.notices import collect, warn
from medseg.training.dataset import SeededDataset
from medseg.training.loader import TrainingLoader
from medseg.training.sampling import InfiniteBatchSampler

CASES = [{"image": f"/somewhere/{name}.png", "name": f"{name}.png"} for name in "abcde"]


class Load(Transform):
    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        return {**case, "image": MetaTensor(torch.full((1, 4, 4), float(ord(case["name"][0]))))}


class Harms(Transform):
    """Does something to the process that loads case d."""

    def __init__(self, harm: Any) -> None:
        self.harm = harm

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        if case["name"] == "d.png":
            self.harm()
        return case


def _loader(workers: int = 0, *steps: Any, seed: int = 1, batch_size: int = 2, cases: Any = CASES) -> TrainingLoader:
    transform = Compose([Load(), *steps, RandGaussianNoised("image", prob=1.0)])
    dataset = SeededDataset(cases, transform, seed=seed, cache_memory="0")
    return TrainingLoader(dataset, InfiniteBatchSampler(dataset, batch_size, seed=seed), num_workers=workers)


def _images(loader: TrainingLoader, epochs: int) -> list[list[torch.Tensor]]:
    return [[batch["image"].as_tensor() for batch in loader] for _ in range(epochs)]


def _equal(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return [len(epoch) for epoch in a] == [len(epoch) for epoch in b] and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    alone, loader = _loader(), _loader(workers)
    expected = _images(alone, 3)
    assert [len(epoch) for epoch in expected] == [3, 3, 3]
    assert _equal(_images(loader, 3), expected)
    loader.close()


def test_workers_that_are_spawned_make_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on macOS and Windows: nothing is handed down by a fork.
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn")
    )
    loader = _loader(1)
    assert _equal(_images(loader, 2), _images(_loader(), 2))
    assert all("spawn" in type(worker._popen).__module__ for worker in loader._stream._workers)
    loader.close()


class Warns(Transform):
    """Warns of case d."""

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        if case["name"] == "d.png":
            warn(logging.getLogger("medseg.test"), "identity-affine", f"process {os.getpid()}", case["name"])
        return case


@pytest.mark.parametrize("workers", [0, 1])
def test_warnings_of_workers_reach_the_run_once(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    loader = _loader(workers, Warns())
    with collect() as found:
        _images(loader, 3)
    loader.close()
    (warning,) = found
    assert (warning.code, warning.file) == ("identity-affine", "d.png")
    assert (warning.text == f"process {os.getpid()}") is (workers == 0)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_warning_of_a_worker_ends_a_strict_run(workers: int) -> None:
    loader = _loader(workers, Warns())
    engine = Engine(lambda _engine, _batch: None)
    loader.attach(engine)
    with collect(strict=True), pytest.raises(CaseError, match=r"d\.png: process \d+\. Strict mode"):
        engine.run(loader, max_epochs=2, epoch_length=3)
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("step", [0, 3, 4, 8])
def test_a_loader_goes_on_where_another_one_stopped(workers: int, step: int) -> None:
    whole = [image for epoch in _images(_loader(), 3) for image in epoch]
    first, second = _loader(), _loader(workers)
    for _ in range(step // 3):
        list(first)
    for _, _batch in zip(range(step % 3), first, strict=False):
        pass
    second.load_state_dict({**first.state_dict(), "step": step})
    rest = [image for epoch in _images(second, 3 - step // 3) for image in epoch]
    assert len(rest) == 9 - step
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[step:], strict=True))
    second.close()


def test_the_state_counts_what_was_handed_out_not_what_was_made_beforehand() -> None:
    loader = _loader(2)
    stream = iter(loader)
    next(stream)
    next(stream)
    assert loader.state_dict()["step"] == 2
    loader.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2}, "seed was 1, now 2"),
        ({"batch_size": 1}, "batch_size was 2, now 1"),
        ({"cases": CASES[:-1]}, "cases was 5, now 4"),
        ({"cases": [*CASES[:-1], {"image": "/x/z.png", "name": "z.png"}]}, "their names"),
    ],
)
def test_a_run_over_other_batches_cannot_be_continued(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        _loader(**changes).load_state_dict(_loader().state_dict())


def _raise() -> None:
    raise ValueError("a strange file")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _full() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def _leave() -> None:
    os._exit(3)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_a_transform_names_the_case_also_from_a_worker(workers: int) -> None:
    loader = _loader(workers, Harms(_raise))
    with pytest.raises(CaseError, match=r"training case 'd\.png' cannot be used: ValueError: a strange file") as caught:
        _images(loader, 1)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_kill, r"killed by signal 9 \(SIGKILL\), usually because the system ran out of memory: lower num_workers"),
        (_full, r"killed by signal 7 \(SIGBUS\), because shared memory is full"),
        (_crash, r"killed by signal 11 \(SIGSEGV\), because a library crashed"),
        (_leave, "exit code 3; set num_workers=0 for a traceback"),
    ],
)
def test_the_death_of_a_worker_names_the_case_and_what_to_change(harm: Any, said: str) -> None:
    loader = _loader(2, Harms(harm))
    with pytest.raises(CaseError, match=said) as caught:
        _images(loader, 2)
    assert "while processing training case 'd.png'" in str(caught.value)


def test_a_death_while_the_network_computes_is_told_too() -> None:
    loader = _loader(1, Harms(_kill), batch_size=1)

    def step(engine: Engine, batch: Any) -> None:
        deadline = time.monotonic() + 30
        while batch["name"] != ["d.png"] and time.monotonic() < deadline:
            time.sleep(0.05)  # here the signal of the child's end arrives

    engine = Engine(step)
    engine.add_event_handler(Events.COMPLETED, lambda: None)
    loader.attach(engine)
    with pytest.raises(CaseError, match=r"while processing training case 'd\.png' .*: killed by signal 9|killed by"):
        engine.run(loader, max_epochs=2)


def test_errors_of_the_network_stay_what_they_are() -> None:
    def step(engine: Engine, batch: Any) -> None:
        raise RuntimeError("sizes do not match")

    engine, loader = Engine(step), _loader(1)
    loader.attach(engine)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        engine.run(loader, max_epochs=1)


def test_errors_of_the_order_are_raised_from_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.training.sampling.process_count", lambda: 3)
    with pytest.raises(RequestError, match="not divisible by 3 processes"):
        next(iter(_loader(1)))
