"""Two processes train as one does: gradients, running statistics, whole runs through the bundle's configs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medseg.bundle.catalog import Bundle
from medseg.errors import RequestError
from medseg.jobs import launch, runner
from medseg.jobs.job import prepare
from medseg.tools.samples import write_samples
from medseg.training.distributed import (
    ValidationShare,
    distributed_network,
    is_first_process,
    process_count,
    process_device,
    start_processes,
)

CPU = torch.device("cpu")


def _together(code: str, processes: int = 2) -> list[Any]:
    """Run code in processes that train together; return what each prints, as JSON."""
    port = launch._free_port()
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return [json.loads(text) for text in printed]


_NETWORK = """
import torch
from torch import nn
torch.manual_seed(0)
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4, affine=False)
    def forward(self, x):
        y = self.first(x)
        self.norm(y.detach())
        return {"logits": self.second(y.tanh()), "aux": self.unused(y)}
network = Network()
images, labels = torch.randn(8, 3), torch.randn(8, 2)
optimizer = torch.optim.SGD(network.parameters(), 0.1)
"""

_PROCESS = (
    _NETWORK
    + """
import json
from medseg.training.distributed import *
from medseg.training.distributed import distributed_network as wrap
start_processes(torch.device("cpu"))
rank, count = process_rank(), process_count()
with torch.no_grad():
    network.first.weight += rank  # the first process decides
wrapped = wrap(network, optimizer)
losses, means = [], []
for step in range(4):
    mine = slice(rank, None, count)
    optimizer.zero_grad()
    loss = (wrapped(images[mine])["logits"] - labels[mine]).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    means.append(network.norm.running_mean.tolist())
shares = [list(ValidationShare(range(cases))) for cases in (5, 2, 1)]
state = {name: value.tolist() for name, value in network.state_dict().items()}
print(json.dumps({"state": state, "losses": losses, "means": means, "shares": shares, "first": is_first_process()}))
stop_processes()
assert process_count() == 1
"""
)


@pytest.fixture(scope="module")
def pair() -> list[Any]:
    """What two processes print that take four steps together."""
    return _together(_PROCESS)


def test_two_processes_take_the_steps_of_one_and_share_the_validation(pair: list[Any]) -> None:
    one, other = pair
    scope: dict[str, Any] = {}
    exec(_NETWORK, scope)
    network, images, labels, optimizer = (scope[name] for name in ("network", "images", "labels", "optimizer"))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (network(images)["logits"] - labels).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, value in network.state_dict().items():
        if not name.startswith("norm"):
            torch.testing.assert_close(torch.tensor(one["state"][name]), value, rtol=0, atol=1e-6)
    assert [sum(pair) / 2 for pair in zip(one["losses"], other["losses"], strict=True)] == pytest.approx(losses)
    assert one["state"] == other["state"]
    assert one["shares"] == [[0, 2, 4], [0], [0]]
    assert other["shares"] == [[1, 3], [1], [0]]
    assert (one["first"], other["first"]) == (True, False)


def test_running_statistics_are_the_mean_over_the_processes(pair: list[Any]) -> None:
    scope: dict[str, Any] = {}
    exec(_NETWORK, scope)
    with torch.no_grad():
        halves = [scope["network"].first(scope["images"][rank::2]) for rank in (0, 1)]
    expected = sum(0.1 * half.mean(0) for half in halves) / 2
    for printed in pair:
        torch.testing.assert_close(torch.tensor(printed["means"][0]), expected)


def test_a_process_alone_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    network = nn.Linear(2, 2)
    start_processes(CPU)
    assert distributed_network(network) is network
    assert process_device(CPU) == CPU
    assert list(ValidationShare(range(3))) == [0, 1, 2]
    assert len(ValidationShare(range(3))) == 3
    assert process_count() == 1
    assert is_first_process()


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("LOCAL_RANK", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RequestError, match="no CUDA device for process 8: this machine has 2 CUDA devices"):
        process_device(torch.device("cuda", 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_device(torch.device("cuda", 0)) == torch.device("cuda", 1)
    assert process_device(CPU) == CPU


@pytest.fixture(scope="module")
def shared_data(make_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training cases and three for validation, which two processes cannot share evenly."""
    from tests.conftest import TINY

    root = write_samples(tmp_path_factory.mktemp("shared"), make_bundle(TINY), cases=8)
    listing = json.loads((root / "dataset.json").read_text())
    cases = listing["training"] + listing["validation"]
    (root / "dataset.json").write_text(json.dumps({**listing, "training": cases[:5], "validation": cases[5:]}))
    return root


@pytest.fixture
def plain_source(tiny_source: dict[str, Any]) -> dict[str, Any]:
    """The tiny bundle with an optimizer that does not blow up rounding, as those of Adam's kind do."""
    tiny_source["blocks"] = {
        "loss": {"_target_": "medseg.components.SoftDiceCELoss"},
        "optimizer": {
            "_target_": "torch.optim.SGD",
            "params": {"_target_": "medseg.components.parameters", "network": "@network"},
            "lr": "@learning_rate",
            "momentum": 0.9,
        },
    }
    tiny_source["knobs"].update(batch_size=2, max_epochs=3, val_interval=1, gradient_clip=1.0)
    return tiny_source


def _last(bundle: Bundle) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(bundle.root / "runs" / "train" / "last.pt", weights_only=True)
    return state


@pytest.mark.slow
def test_two_processes_that_are_interrupted_end_where_one_does_and_torchrun_ends_there_too(
    make_bundle: Any, plain_source: dict[str, Any], shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # so that each of two processes has one
    paths = {"dataset_dir": str(shared_data), "resume": False}
    one, two, third = (make_bundle(plain_source) for _ in range(3))
    single = runner.train(prepare("train", one, {}, paths=paths))
    told: list[tuple[float, int, str]] = []

    def tell(*progress: Any) -> None:
        told.append(progress)
        if len(told) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.train(launch.prepare(two, {}, paths=paths), 2, report=tell)
    double = launch.train(launch.prepare(two, {}, paths={**paths, "resume": True}), 2, report=tell)
    alone, shared = _last(one), _last(two)
    assert alone["progress"]["iteration"] == shared["progress"]["iteration"] >= 9
    for name, tensor in alone["network"].items():
        torch.testing.assert_close(shared["network"][name], tensor, rtol=0, atol=1e-5, msg=name)
    for before, after in zip(single.validations, double.validations, strict=True):
        assert after["val_mean_dice"] == pytest.approx(before["val_mean_dice"], abs=1e-4)
    assert told[5][0] < told[4][0] + 1
    assert told[-1][:2] == (3.0, 3)
    assert "loss" in told[0][2]

    configs = [str(third.config_path(name)) for name in ("train", "multi_gpu_train")]
    command = [shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun", "--standalone"]
    command += ["--nproc_per_node=2", "-m", "monai.bundle", "run", "--config_file", str(configs)]
    command += ["--bundle_root", str(third.root), "--dataset_dir", str(shared_data)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, tensor in shared["network"].items():
        assert torch.equal(_last(third)["network"][name], tensor), name


@pytest.mark.slow
def test_a_broken_case_ends_all_processes_with_its_name(
    make_bundle: Any, plain_source: dict[str, Any], shared_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(shared_data, tmp_path / "data"))
    broken = sorted((data / "imagesTr").glob("*.nii.gz"))[1]
    broken.write_bytes(broken.read_bytes()[:100])
    bundle = make_bundle(plain_source)
    job = launch.prepare(bundle, {}, paths={"dataset_dir": str(data), "resume": False})
    with pytest.raises(Exception, match=broken.name) as caught:
        launch.train(job, 2)
    assert caught.value.exit_code == 1
    assert "Traceback" not in str(caught.value)
