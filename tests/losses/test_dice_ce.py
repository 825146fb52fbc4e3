"""Dice and cross-entropy: equal to MONAI's, over several processes, ignored labels, and what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss

from medseg.errors import RequestError, SizeError
from medseg.losses import dice_ce as module
from medseg.losses.boundary import BoundaryMultiTaskLoss
from medseg.losses.deep_supervision import DeepSupervision
from medseg.losses.dice_ce import SoftDiceCELoss
from medseg.losses.selfreg import SelfRegLoss, SelfRegularizedLoss
from medseg.losses.training import TrainingLoss


def batch(channels: int, *size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, channels, *size, generator=generator, dtype=dtype) * 3
    return logits, torch.randint(0, max(channels, 2), (3, 1, *size), generator=generator)


def value_and_gradient(loss: Any, logits: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, label)
    value.backward()
    return value.detach(), leaf.grad


def monai_loss(channels: int, **options: Any) -> DiceCELoss:
    kind = {"sigmoid": True} if channels == 1 else {"softmax": True, "to_onehot_y": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DiceCELoss(**kind, **options)


@pytest.mark.filterwarnings("ignore:single channel prediction")
@pytest.mark.parametrize("size", [(9, 7), (6, 5, 7)])
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"include_background": False, "batch": True},
        {"include_background": True, "batch": True, "lambda_dice": 0.6, "lambda_ce": 0.4},
        {"include_background": False, "batch": False, "smooth_nr": 1.0, "smooth_dr": 1.0},
        {"include_background": False, "batch": True, "squared_pred": True},
        {"include_background": True, "batch": False, "squared_pred": True, "lambda_ce": 0.0},
    ],
)
def test_values_and_gradients_are_those_of_monai(options, channels, size, monkeypatch):
    # Several blocks for each image, the last one shorter.
    monkeypatch.setattr(module, "_BLOCK", 101)
    logits, label = batch(channels, *size)
    expected = value_and_gradient(monai_loss(channels, **options), logits.double(), label.double())
    # MONAI's one-hot labels are float32, which its norms for squared_pred round to.
    exact = 1e-6 if "squared_pred" in options else 1e-12
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, exact)):
        found = value_and_gradient(SoftDiceCELoss(**options), logits.to(dtype), label)
        assert found[0].dtype == found[1].dtype == dtype
        torch.testing.assert_close(found[0].double(), expected[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found[1].double(), expected[1], atol=tolerance * 0.1, rtol=tolerance)


def test_the_gradient_is_the_slope_of_the_value():
    logits, label = batch(3, 4, 3, dtype=torch.float64)
    label[0, 0, 0, 0] = 9
    for options in ({}, {"squared_pred": True, "batch": False}):
        loss = SoftDiceCELoss(ignore_label=9, **options)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, label), logits.clone().requires_grad_())
    single = SoftDiceCELoss(squared_pred=True)
    assert torch.autograd.gradcheck(lambda x: single(x, (label > 0).long()), logits[:, :1].clone().requires_grad_())


def test_large_logits_have_finite_values_and_gradients():
    for channels in (1, 3):
        logits, label = batch(channels, 8, 8)
        value, gradient = value_and_gradient(SoftDiceCELoss(), logits * 1e4, label)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batched", [False, True])
def test_ignored_voxels_do_not_count(batched, channels):
    logits, label = batch(channels, 10, 6)
    loss = SoftDiceCELoss(batch=batched, ignore_label=255)
    value, gradient = value_and_gradient(loss, logits[:, :, :7], label[:, :, :7])
    label[:, :, 7:] = 255
    found, slope = value_and_gradient(loss, logits, label)
    torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slope[:, :, :7], gradient, atol=1e-8, rtol=1e-5)
    assert not slope[:, :, 7:].any()
    nothing, flat = value_and_gradient(loss, logits, torch.full_like(label, 255))
    assert torch.isfinite(nothing)
    assert not flat.any()


def test_labels_of_any_type_are_taken():
    logits, label = batch(3, 6, 6)
    expected = SoftDiceCELoss()(logits, label)
    for dtype in (torch.uint8, torch.int32, torch.float32):
        assert torch.equal(SoftDiceCELoss()(logits, label.to(dtype)), expected)
    half = SoftDiceCELoss()(logits.bfloat16(), label)
    assert half.dtype == torch.float32
    assert half == pytest.approx(float(expected), rel=0.01)


def test_every_other_loss_takes_it():
    logits, label = batch(2, 8, 8)
    inner = SoftDiceCELoss()
    expected = inner(logits, label)
    heads = {"logits": logits, "aux": [logits, logits]}
    torch.testing.assert_close(DeepSupervision(inner)(heads, MetaTensor(label)), expected)
    features = {name: torch.randn(3, 4, 8, 8) for name in ("E2", "D2", "D1")}
    whole = SelfRegularizedLoss(TrainingLoss(inner), SelfRegLoss(0.0, 0.0))
    torch.testing.assert_close(whole({"logits": logits, "features": features}, label), expected)
    stages = {**heads, "aux": [logits], "edges": [torch.randn(3, 2, 8, 8)]}
    plain, own = BoundaryMultiTaskLoss(), BoundaryMultiTaskLoss(main_loss=inner)
    found = own(stages, label) - plain(stages, label) + plain.main_loss(logits, label)
    torch.testing.assert_close(found, expected)


def test_what_does_not_fit_is_refused():
    logits, label = batch(3, 5, 5)
    with pytest.raises(SizeError, match=r"\(3, 2, 5, 5\).*\(3, 1, 5, 5\)"):
        SoftDiceCELoss()(logits, torch.cat([label, label], 1))
    with pytest.raises(RequestError, match="lambda_ce=-1"):
        SoftDiceCELoss(lambda_ce=-1)
    for value in (-1, 3, 255):
        with pytest.raises(RequestError, match=f"value {value},"):
            SoftDiceCELoss()(logits, torch.full_like(label, value))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [1, 4])
def test_a_gpu_gives_the_same(channels):
    logits, label = batch(channels, 9, 7)
    label[:, :, :2] = 255
    loss = SoftDiceCELoss(ignore_label=255)
    expected = value_and_gradient(loss, logits, label)
    found = value_and_gradient(loss, logits.cuda(), label.cuda())
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1].cpu(), expected[1], atol=1e-7, rtol=1e-5)


# Several processes

_PROCESS = """
import json, sys
import torch
from torch import distributed, nn
from medseg.losses import DeepSupervision, SoftDiceCELoss

place, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
image, label = torch.randn(5, 1, 8, 8), torch.randint(0, 3, (5, 1, 8, 8))
label[:, :, :2] = 7
network = nn.Conv2d(1, 3, 3, padding=1)
if world > 1:
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    network = nn.parallel.DistributedDataParallel(network)
# Unequal shares, the labels of which are ignored to a different part.
part = slice(0, 5) if world == 1 else (slice(0, 2), slice(2, 5))[rank]
results = {}
for name, options in {"plain": {}, "squared": {"squared_pred": True, "include_background": True}}.items():
    network.zero_grad()
    loss = DeepSupervision(SoftDiceCELoss(ignore_label=7, **options))
    logits = network(image[part])
    value = loss({"logits": logits, "aux": [logits, logits * 2]}, label[part])
    value.backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    results[name] = [value.item(), gradient.tolist()]
with torch.no_grad():
    # One process alone may evaluate.
    if rank == 0:
        results["alone"] = [SoftDiceCELoss(ignore_label=7)(network(image[:2]), label[:2]).item(), []]
print(json.dumps(results))
"""


def run_processes(folder: Path, world: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_PROCESS), str(folder / f"store{world}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen([*command, str(rank), str(world)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * world
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
def test_two_processes_give_the_loss_and_the_gradient_of_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alone", "", "0", "1"])
    exec(_PROCESS, {})
    one = json.loads(capsys.readouterr().out)
    two = run_processes(tmp_path, 2)
    for name in ("plain", "squared"):
        for found in two:
            assert found[name][0] == pytest.approx(one[name][0], abs=1e-6)
            torch.testing.assert_close(torch.tensor(found[name][1]), torch.tensor(one[name][1]), atol=1e-6, rtol=1e-5)
    assert two[0]["alone"][0] == pytest.approx(one["alone"][0], abs=1e-6)
