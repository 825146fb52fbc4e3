"""The small forms: what they are, that they learn, and that documentation and record say today's figures."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss

from medseg.errors import RequestError
from medseg.losses.training import TrainingLoss
from medseg.networks import NETWORKS, small
from medseg.training.wrapper import TrainingWrapper

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "networks.py"
NAMES = list(NETWORKS)
RECORD = json.loads((ROOT / "benchmarks" / "results" / "networks.json").read_text(encoding="utf-8"))
RECORDED = list(dict.fromkeys(row["network"] for row in RECORD["rows"]))
every_preset = pytest.mark.parametrize(("name", "dims"), [(name, dims) for name in NAMES for dims in (2, 3)])


def _network_def(name: str, dims: int) -> dict[str, Any]:
    shape = {"spatial_dims": dims, "in_channels": 1, "out_channels": 2}
    return {"_target_": f"medseg.components.{name}", **shape, **small(name, dims)}


def _build(name: str, dims: int) -> Any:
    parser = ConfigParser({"network_def": _network_def(name, dims)})
    return parser.get_parsed_content("network_def")


@every_preset
def test_a_network_def_survives_json_and_builds_through_monai(name: str, dims: int) -> None:
    definition = _network_def(name, dims)
    assert json.loads(json.dumps(definition)) == definition
    with torch.device("meta"):
        network = _build(name, dims)
    assert type(network).__name__ == name
    assert network.spatial_dims == dims


@pytest.mark.parametrize(("name", "dims"), [(name, dims) for name in RECORDED for dims in (2, 3)])
def test_the_record_holds_todays_parameters_and_arguments(name: str, dims: int) -> None:
    (row,) = (
        row for row in RECORD["rows"] if (row["network"], row["form"], row["spatial_dims"]) == (name, "small", dims)
    )
    with torch.device("meta"):
        network = _build(name, dims)
    assert row["parameters"] == sum(p.numel() for p in network.parameters())
    assert {"_target_": f"medseg.components.{name}", **row["arguments"]} == _network_def(name, dims)


@pytest.mark.parametrize("name", RECORDED)
def test_the_documentation_shows_the_recorded_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    cells = runpy.run_path(str(SCRIPT))["cells"]
    lines = (ROOT / "docs" / "reference" / "networks.md").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("|") and f"`medseg.components.{name}`" in line)
    assert line.endswith(f" | {cells(RECORD['rows'], name, 'small')} |")


@every_preset
def test_the_loss_falls(name: str, dims: int) -> None:
    torch.manual_seed(0)
    network = _build(name, dims).train()
    size = (64, 48) if dims == 2 else (16, 24, 16)
    label = torch.zeros(2, 1, *size)
    label[..., size[-1] // 2 :] = 1
    image = label + 0.1 * torch.randn(label.shape)
    training, loss = TrainingWrapper(network), TrainingLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        value = loss(training(image), label)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


def test_a_preset_may_be_changed_without_harm() -> None:
    small("UNet", 2)["features"].append(512)
    small("UNet", 3)["norm"][1]["affine"] = False
    assert small("UNet", 2)["features"] == [16, 32, 64, 128, 256]
    assert small("UNet", 3)["norm"] == ["instance", {"affine": True}]


def test_an_unknown_network_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match=re.escape("Unknown network 'UnetPlusPlus'. Did you mean 'UNetP")):
        small("UnetPlusPlus", 2)
    with pytest.raises(RequestError, match=r"'xyz'\. Choose one of UNet, UNetPlusPlus, UCTransNet, BANet"):
        small("xyz", 2)
    with pytest.raises(RequestError, match="spatial_dims=4; expected 2 or 3"):
        small("UNet", 4)


# Measures each network in a fork of a process that has imported everything and computed nothing.
_MEASURE = """
import json, os, runpy, sys
import monai.losses, torch._subclasses.fake_tensor, torch.utils.flop_counter
import medseg.losses, medseg.networks, medseg.training
measure = runpy.run_path(sys.argv[1])["measure"]
for name in sys.argv[2:]:
    if not (child := os.fork()):
        print(json.dumps(measure(name, "small", 3, limit=50.0)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Memory of each small form in 3D, by name."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from /proc, which this system has not")
    command = [sys.executable, "-W", "ignore", "-c", _MEASURE, str(SCRIPT), *NAMES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["network"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_of_two_cubes_of_64_voxels_fits_in_4_gib(name: str, measured: dict[str, Any]) -> None:
    row = measured[name]
    assert row["spatial_dims"] == 3
    assert row["inference_mib"] < row["training_mib"] < 4096
