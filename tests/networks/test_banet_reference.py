"""BA-Net reproduces the stored outputs of its authors' code and of its 3D form, and reads their weights."""

from __future__ import annotations

import logging
import re
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.errors import WeightsError
from medseg.networks import BANet
from medseg.networks.banet_modules import CrossFeatureFusion, InteractiveAttention, MiniMultiTask, PyramidEdgeExtraction
from medseg.networks.convert import from_reference
from medseg.networks.convert.banet import aspp_modules, fusion_modules, stage_modules, subtraction_weight
from medseg.networks.resnet import ASPP, Bottleneck

GOLDEN = Path(__file__).parents[1] / "golden"


def small(dims: int = 2, **options: Any) -> BANet:
    torch.manual_seed(0)
    narrow = {"blocks": (1, 1, 1, 1), "base_width": 4, "reduce_dim": 6, "aspp_dim": 8, "aspp_rates": (1, 2)}
    return BANet(dims, options.pop("in_channels", 1), 2, variant="official", **{**narrow, **options})


def golden(dims: int, group: str) -> dict[str, Any]:
    """Return the arrays of one group of a reference file as tensors; the state under "state"."""
    name = f"banet{dims}d" if dims == 2 or group == "net" else "banet3d_modules"
    arrays: dict[str, Any] = {"state": {}}
    with np.load(GOLDEN / f"{name}.npz") as file:
        for key in file:
            head, _, rest = key.partition("/")
            if head != group:
                continue
            value = file[key] if file[key].dtype.kind == "U" else torch.from_numpy(file[key])
            if rest.startswith("state/"):
                arrays["state"][rest.removeprefix("state/")] = value
            else:
                arrays[rest] = value
    return arrays


def load(module: nn.Module, state: dict[str, Tensor], modules: dict[str, str]) -> Any:
    """Fill a module by a map from our names to those of the reference; every reference tensor must be used."""
    renamed = {}
    for name, own in module.state_dict().items():
        path, _, leaf = name.rpartition(".")
        theirs = f"{modules[path]}.{leaf}"
        renamed[name] = own if leaf == "num_batches_tracked" else state.pop(theirs)
    assert not state
    module.load_state_dict(renamed)
    return module.eval()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_whole_reference_network_is_reproduced(dims):
    arrays = golden(dims, "net")
    config = literal_eval(str(arrays["config"]))
    multi_grid = tuple(config["multi_dil"]) if config["multi_grid"] else None
    network = from_reference("banet", arrays["state"], aspp_rates=tuple(config["rates"]), multi_grid=multi_grid)
    with torch.no_grad():
        found = network.forward_train(arrays["in/x"])
        assert_equal(network(arrays["in/x"]), arrays["out/out"])
    outputs = {"out": found["logits"], "aspp": found["features"]["B"]}
    for i in range(4):
        outputs |= {f"seg{i + 1}": found["aux"][i], f"edge{i + 1}": found["edges"][i]}
        outputs[f"c{i + 1}"] = found["features"][f"E{i + 1}"]
    expected = {key.removeprefix("out/"): value for key, value in arrays.items() if key.startswith("out/")}
    assert len(expected) == (14 if dims == 2 else 7)
    for name, value in expected.items():
        assert_equal(outputs[name], value)


def reference_tasks(dims: int, arrays: dict[str, Any]) -> tuple[PyramidEdgeExtraction, MiniMultiTask]:
    wide, channels = arrays["state"]["reduce_conv.weight"].shape[1::-1]
    squeeze = PyramidEdgeExtraction(dims, wide, channels, arrays["pool_sizes"].tolist(), subtract=False)
    classes, edges = (len(arrays["state"][f"{kind}_supervision.bias"]) for kind in ("seg", "edge"))
    tasks = MiniMultiTask(dims, channels, classes, edges, learned_gates=True, merge="seg")
    both = nn.ModuleDict({"squeeze": squeeze, "tasks": tasks})
    load(both, dict(arrays["state"]), stage_modules("", ""))
    return squeeze, tasks


@pytest.mark.parametrize("dims", [2, 3])
def test_reference_pee_and_mini_mtl_are_reproduced(dims):
    arrays = golden(dims, "mtl")
    squeeze, tasks = reference_tasks(dims, arrays)
    with torch.no_grad():
        reduced, pee = squeeze.reduce(arrays["in/x"]), squeeze(arrays["in/x"])
        merged, edge, seg = tasks(pee)
        found = {
            "reduced": reduced,
            "pool1": squeeze.boxes[0](reduced),
            "pool2": squeeze.boxes[1](reduced),
            "pee": pee,
            "edge_branch": tasks.edge_branch(pee),
            "seg_branch": tasks.seg_branch(pee),
            "edge_feats": edge,
            "seg_feats": seg,
            "edge_logits": tasks.edge_head(edge),
            "seg_logits": tasks.seg_head(seg),
        }
    assert {f"out/{name}" for name in found} == {key for key in arrays if key.startswith("out/")}
    for name, value in found.items():
        assert_equal(value, arrays[f"out/{name}"])
    assert torch.equal(merged, seg)


@pytest.mark.parametrize("dims", [2, 3])
def test_reference_exchange_of_the_paper_is_reproduced(dims):
    arrays = golden(dims, "mtl")
    exchange = InteractiveAttention(dims, arrays["out/reduced"].shape[1])
    edge, seg = exchange(arrays["out/edge_branch"], arrays["out/seg_branch"])
    assert_equal(edge, arrays["paper/edge_feats"])
    assert_equal(seg, arrays["paper/seg_feats"])


@pytest.mark.parametrize("dims", [2, 3])
def test_reference_subtraction_maps_of_the_paper_are_read_by_pee(dims):
    arrays = golden(dims, "mtl")
    squeeze, _ = reference_tasks(dims, arrays)
    squeeze.subtract = True
    seen = []
    squeeze.fuse.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        squeeze(arrays["in/x"])
    assert_equal(seen[0], torch.cat([arrays["out/reduced"], arrays["paper/edge1"], arrays["paper/edge2"]], dim=1))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_converted_weight_makes_both_forms_of_pee_equal(dims):
    arrays = golden(dims, "mtl")
    squeeze, _ = reference_tasks(dims, arrays)
    squeeze.subtract = True
    weight = subtraction_weight(squeeze.fuse[0].weight.detach())
    torch.testing.assert_close(weight, arrays["equiv/fuse_conv.0.weight_subtract_form"])
    with torch.no_grad():
        different = squeeze(arrays["in/x"])
        squeeze.fuse[0].weight.copy_(weight)
        torch.testing.assert_close(squeeze(arrays["in/x"]), arrays["out/pee"], atol=1e-4, rtol=0)
    assert (different - arrays["out/pee"]).abs().max() > 0.1


def test_a_weight_that_is_not_of_pee_is_refused():
    with pytest.raises(WeightsError, match=r"\(4, 9, 1, 1\).*multiple"):
        subtraction_weight(torch.zeros(4, 9, 1, 1))


@pytest.mark.parametrize("learned", [True, False], ids=["official", "paper"])
@pytest.mark.parametrize("dims", [2, 3])
def test_reference_cross_feature_fusion_is_reproduced(dims, learned):
    arrays = golden(dims, "cff")
    fusion = CrossFeatureFusion(dims, arrays["in/x1"].shape[1], learned_gates=learned)
    if learned:
        load(fusion, arrays["state"], fusion_modules("", ""))
    with torch.no_grad():
        found = fusion(arrays["in/x1"], [arrays[f"in/x{i}"] for i in (2, 3, 4)])
        coarse = fusion(arrays["in_coarse/x1"], [arrays[f"in_coarse/x{i}"] for i in (2, 3, 4)])
    assert_equal(found, arrays["out/y" if learned else "paper/y"])
    if learned:
        assert_equal(coarse, arrays["out_coarse/y"])


@pytest.mark.parametrize("dims", [2, 3])
def test_reference_aspp_is_reproduced(dims):
    arrays = golden(dims, "aspp")
    channels, read = arrays["state"]["b0.block.0.weight"].shape[:2]
    aspp = ASPP(dims, read, channels, arrays["rates"].tolist(), pool_norm="batch")
    load(aspp, arrays["state"], aspp_modules("", "", branches=4))
    x = arrays["in/x"]
    with torch.no_grad():
        for i, branch in enumerate(aspp.branches):
            assert_equal(branch(x), arrays[f"out/b{i}"])
        assert_equal(aspp.pool(x.mean(aspp.axes, keepdim=True)), arrays["out/b4"])
        assert_equal(aspp(x), arrays["out/y"])


@pytest.mark.parametrize("dims", [2, 3])
def test_reference_dilated_bottleneck_is_reproduced(dims):
    arrays = golden(dims, "bottleneck_d2")
    planes, read = arrays["state"]["conv1.weight"].shape[:2]
    block = Bottleneck(dims, read, planes, stride=(1,) * dims, dilation=2)
    names = {name: name for name, _ in block.named_modules()}
    load(block, arrays["state"], names)
    with torch.no_grad():
        assert_equal(block(arrays["in/x"]), arrays["out/y"])


def foreign_state(network: BANet) -> dict[str, Tensor]:
    """Rename our tensors as the authors' code names them, by the rule that its documents give."""
    rules = [
        (r"backbone\.", "pretrain_model."),
        (r"stages\.(\d)\.(squeeze|tasks)\.(exchange\.)?", lambda m: f"head.mtl{int(m[1]) + 1}."),
        (r"(?<=mtl\d\.)reduce", "reduce_conv"),
        (r"(?<=mtl\d\.)fuse\.0", "fuse_conv.0"),
        (r"(?<=mtl\d\.)fuse\.2\.(\d)", lambda m: f"fuse_conv.{int(m[1]) + 2}"),
        (r"(edge|seg)_branch", r"\1_conv"),
        (r"(edge|seg)_gate", r"att_\1"),
        (r"(edge|seg)_head", r"\1_supervision"),
        (r"fusions\.(\d)\.own_gate", lambda m: f"head.cf{int(m[1]) + 1}.att_conv1"),
        (r"fusions\.(\d)\.gates\.(\d)", lambda m: f"head.cf{int(m[1]) + 1}.att_conv{int(m[2]) + 2}"),
        (r"aspp\.branches\.(\d)", r"aspp.b\1.block"),
        (r"aspp\.pool\.(\d)", lambda m: f"aspp.b{len(network.aspp.branches)}.{int(m[1]) + 1}"),
        (r"^mix\.", "head.aspp_combine."),
        (r"decoder\.(\d)", lambda m: f"head.up_conv{3 - int(m[1])}"),
        (r"^head\.0\.", "head.conv1.0."),
        (r"^head\.1\.", "head.conv1.1."),
        (r"^head\.3\.", "head.conv2."),
    ]
    state = {}
    for name, tensor in network.state_dict().items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        state[name] = tensor
    return state


@pytest.mark.parametrize(
    ("dims", "options", "config"),
    [
        (2, {"blocks": (1, 2, 1, 3), "base_width": 3, "edge_channels": 1}, {"aspp_rates": (1, 2)}),
        (2, {"multi_grid": None, "aspp_rates": None}, {"multi_grid": None, "aspp_rates": None}),
        (2, {"use_aspp": False, "in_channels": 4}, {}),
        (3, {"reduce_dim": 3, "aspp_dim": 5, "blocks": (2, 1, 1, 1)}, {"aspp_rates": (1, 2)}),
        (3, {"aspp_pool_norm": "batch", "aspp_rates": (1, 2, 3), "dilations": (1, 1), "multi_grid": (1,)}, {}),
    ],
)
def test_other_widths_depths_classes_and_3d_are_read_off_the_tensors(dims, options, config):
    original = small(dims, **options).eval()
    if "multi_grid" in options:
        config = {**config, **{k: options[k] for k in ("multi_grid", "dilations") if k in options}}
    found = from_reference("banet", foreign_state(original), **config)
    assert {n: t.shape for n, t in found.state_dict().items()} == {n: t.shape for n, t in original.state_dict().items()}
    image = torch.randn(1, options.get("in_channels", 1), *(32, 40, 24)[:dims])
    with torch.no_grad():
        torch.testing.assert_close(found(image), original(image))


def test_dead_weights_of_the_authors_are_left_out_with_a_word(caplog):
    state = foreign_state(small())
    dead = {"head.up_conv4.1.weight": torch.zeros(12, 1, 3, 3), "pretrain_model.fc.bias": torch.zeros(1000)}
    with caplog.at_level(logging.INFO, "medseg"):
        from_reference("banet", {**state, **dead}, aspp_rates=(1, 2))
    assert "head.up_conv4.1.weight, pretrain_model.fc.bias" in caplog.text
    with pytest.raises(WeightsError, match=r"Unexpected \(1\): head.up_conv5.1.weight"):
        from_reference("banet", {**state, "head.up_conv5.1.weight": torch.zeros(1)}, aspp_rates=(1, 2))
