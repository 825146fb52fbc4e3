"""A run that is killed at any moment and resumed ends with the weights of one that never was, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.bundle.catalog import Bundle
from medseg.files import sha256_file
from medseg.tools.samples import write_samples

pytestmark = pytest.mark.slow

SOURCE: dict[str, Any] = {
    "name": "balls_grey_unet",
    "template": "grey_image",
    "version": "0.1.0",
    "changelog": {"0.1.0": "first release"},
    "description": "Balls in pictures. For tests.",
    "authors": "The medseg authors",
    "channels": {"0": "grey"},
    "labels": {"0": "background", "1": "ball"},
    "network_def": {
        "_target_": "medseg.components.UNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 2,
        "features": [4, 8],
        "norm": "batch",
        "dropout": 0.2,
    },
    "knobs": {
        "patch_size": [32, 32],
        "roi_size": [64, 64],
        "batch_size": 2,
        "accumulate": 2,
        "max_epochs": 5,
        "val_interval": 2,
        "pictures": 0,
        "ema_decay": 0.9,
        "precision": "bfloat16",
    },
}
STEPS, EPOCHS = 4, 5
KILLED = -9


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., int]]:
    """Return a function that trains in a process of its own and gives the exit code, or the signal below zero."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("mortal_runs.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **threads},
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def send(**order: Any) -> int:
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield send
        server.stdin.close()


@pytest.fixture(scope="module")
def data(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data"), make_bundle(SOURCE), cases=8)


@pytest.fixture(scope="module")
def whole(run: Callable[..., int], make_bundle: Any, data: Path) -> Bundle:
    """The bundle after a training that nothing interrupted."""
    bundle = make_bundle(SOURCE)
    settings = {"num_workers": 0, "save_minutes": 0.0}
    assert run(bundle=str(bundle.root), data=str(data), resume=False, settings=settings) == 0
    return bundle


def _files(bundle: Bundle) -> Path:
    return bundle.root / "runs" / "train"


def _assert_equal_runs(bundle: Bundle, whole: Bundle) -> None:
    assert sha256_file(bundle.weights) == sha256_file(whole.weights)
    ours, theirs = (torch.load(_files(each) / "last.pt", weights_only=True) for each in (bundle, whole))
    assert ours["progress"] == theirs["progress"]
    assert ours["progress"]["iteration"] == STEPS * EPOCHS
    # weights, averages and optimizer, and also schedule, history, generators: not a bit differs
    assert set(ours) == set(theirs) > {"network", "weight_average", "optimizer", "generators"}
    for part in ours:
        assert json.dumps(ours[part], default=_exact) == json.dumps(theirs[part], default=_exact), part


def _exact(value: Any) -> Any:
    return value.view(torch.uint8).tolist() if isinstance(value, torch.Tensor) and value.ndim else value.item()


def _deaths() -> list[dict[str, float]]:
    """Ten moments at which a run is killed; the first ones are many steps before its end."""
    rng = random.Random(7)
    deaths: list[dict[str, float]] = [
        {"seconds": random.Random(0).uniform(0.1, 0.5)},
        {"step": rng.randint(1, 3)},
        {"write": rng.randint(2, 3), "bytes": rng.randint(1, 9000)},
        {"step": rng.randint(2, 5)},
        {"write": 2, "bytes": rng.randint(1, 9000)},
        {"rename": rng.randint(2, 7), "after": False},
        {"step": rng.randint(2, 4)},
        {"rename": rng.randint(2, 7), "after": True},
        {"seen": True},
        {"write": rng.randint(1, 2), "bytes": 1},
    ]
    return deaths


def test_ten_deaths_change_no_bit_of_the_weights(
    run: Callable[..., int], make_bundle: Any, data: Path, whole: Bundle
) -> None:
    bundle = make_bundle(SOURCE)
    order = {"bundle": str(bundle.root), "data": str(data)}
    ends = []
    for number, death in enumerate(_deaths()):
        # other workers and other moments of saving change nothing either
        settings = {"num_workers": number % 2, "save_minutes": 1e-9 if number % 3 else 0.0}
        resume = (_files(bundle) / "last.json").is_file()
        ends.append(run(**order, resume=resume, settings=settings, death=death))
    assert ends == [KILLED] * len(ends)
    assert not _is_done(bundle)
    assert run(**order, resume=True, settings={"num_workers": 1}) == 0
    _assert_equal_runs(bundle, whole)


def test_a_damaged_state_is_passed_over_for_the_one_before(
    run: Callable[..., int], make_bundle: Any, data: Path, whole: Bundle
) -> None:
    bundle = make_bundle(SOURCE)
    order = {"bundle": str(bundle.root), "data": str(data), "settings": {"num_workers": 0, "save_minutes": 1e-9}}
    assert run(**order, resume=False, death={"step": 9}) == KILLED
    last = _files(bundle) / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    assert run(**order, resume=True) == 0
    _assert_equal_runs(bundle, whole)


def test_a_finished_run_that_is_resumed_stays_as_it_is(run: Callable[..., int], data: Path, whole: Bundle) -> None:
    before = sha256_file(whole.weights), sha256_file(_files(whole) / "last.pt")
    assert run(bundle=str(whole.root), data=str(data), resume=True, settings={"num_workers": 0}) == 0
    assert (sha256_file(whole.weights), sha256_file(_files(whole) / "last.pt")) == before


def _is_done(bundle: Bundle) -> bool:
    state = torch.load(_files(bundle) / "last.pt", weights_only=True) if (_files(bundle) / "last.pt").is_file() else {}
    return bool(state) and state["progress"]["iteration"] == STEPS * EPOCHS
