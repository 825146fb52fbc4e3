"""Weights of the released code of BA-Net, and of its 3D version with the same names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from medseg.errors import WeightsError
from medseg.networks.banet import BANet
from medseg.networks.convert.reading import Reference, deepest, shape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["SOURCES", "aspp_modules", "fusion_modules", "stage_modules", "subtraction_weight"]

_SOURCE = "banet"
_BACKBONE = "pretrain_model."
# Unused modules in the checkpoints: a decoder block of stage 4 and the classifier of the ResNet.
_DEAD = ("head.up_conv4.", f"{_BACKBONE}fc.")


def stage_modules(ours: str, theirs: str) -> dict[str, str]:
    """Map the modules of PEE and mini-MTL of one stage.

    Args:
        ours: Prefix of the module names in medseg, including the dot, e.g. "stages.0.".
        theirs: Prefix of the module names in the source, e.g. "head.mtl1.".
    """
    pairs = {
        "squeeze.reduce": "reduce_conv",
        "squeeze.fuse.0": "fuse_conv.0",
        "tasks.edge_head": "edge_supervision",
        "tasks.seg_head": "seg_supervision",
        **_separable("squeeze.fuse.2", "fuse_conv", first=2),
        **_separable("tasks.edge_branch", "edge_conv"),
        **_separable("tasks.seg_branch", "seg_conv"),
        **_separable("tasks.exchange.edge_gate", "att_edge"),
        **_separable("tasks.exchange.seg_gate", "att_seg"),
    }
    return {ours + a: theirs + b for a, b in pairs.items()}


def fusion_modules(ours: str, theirs: str) -> dict[str, str]:
    """Map the gates of one CFF; prefixes as for `stage_modules`."""
    names = ("own_gate", "gates.0", "gates.1", "gates.2")
    return {ours + name: f"{theirs}att_conv{n}" for n, name in enumerate(names, start=1)}


def aspp_modules(ours: str, theirs: str, branches: int) -> dict[str, str]:
    """Map the modules of the ASPP; prefixes as for `stage_modules`.

    Args:
        ours: Prefix of the module names in medseg.
        theirs: Prefix of the module names in the source.
        branches: Number of branches without the global pooling branch.
    """
    pairs = {f"pool.{n}": f"b{branches}.{n + 1}" for n in (0, 1)}
    for n in (0, 1):
        pairs[f"project.{n}"] = f"project.{n}"
        pairs |= {f"branches.{branch}.{n}": f"b{branch}.block.{n}" for branch in range(branches)}
    return {ours + a: theirs + b for a, b in pairs.items()}


def _separable(ours: str, theirs: str, *, first: int = 0) -> dict[str, str]:
    return {f"{ours}.{n}": f"{theirs}.{first + n}" for n in range(3)}


def _decoder_modules() -> dict[str, str]:
    """Map the decoder and its head; each block starts with an activation without weights."""
    modules = {"head.0": "head.conv1.0", "head.1": "head.conv1.1", "head.3": "head.conv2"}
    blocks = {"mix": "aspp_combine", **{f"decoder.{i}": f"up_conv{3 - i}" for i in range(3)}}
    for ours, theirs in blocks.items():
        modules |= {f"{ours}.{n}": f"head.{theirs}.{n}" for n in (1, 2, 3)}
    return modules


def _banet(state: Mapping[str, Tensor]) -> Reference:
    """Read the authors' BA-Net; ASPP rates and multi-grid cannot be inferred from the tensors."""
    width, in_channels, *kernel = shape(state, _SOURCE, f"{_BACKBONE}conv1.weight")
    blocks = tuple(deepest(state, rf"pretrain_model\.layer{i}\.(\d+)\.conv1\.weight") + 1 for i in range(1, 5))
    arguments = {
        "spatial_dims": len(kernel),
        "in_channels": in_channels,
        "out_channels": shape(state, _SOURCE, "head.conv2.weight")[0],
        "blocks": blocks,
        "base_width": width,
        "reduce_dim": shape(state, _SOURCE, "head.mtl1.reduce_conv.weight")[0],
        "edge_channels": shape(state, _SOURCE, "head.mtl1.edge_supervision.weight")[0],
        "variant": "official",
        "use_aspp": "aspp.project.0.weight" in state,
    }
    modules = {f"backbone.{name}": _BACKBONE + name for name in _backbone_modules(state)} | _decoder_modules()
    for i in range(4):
        modules |= stage_modules(f"stages.{i}.", f"head.mtl{i + 1}.")
        modules |= fusion_modules(f"fusions.{i}.", f"head.cf{i + 1}.")
    if arguments["use_aspp"]:
        branches = deepest(state, r"aspp\.b(\d+)\.block\.0\.weight") + 1
        arguments["aspp_dim"] = shape(state, _SOURCE, "aspp.project.0.weight")[0]
        arguments["aspp_pool_norm"] = "batch" if f"aspp.b{branches}.2.weight" in state else None
        modules |= aspp_modules("aspp.", "aspp.", branches)
    dead = [name for name in state if name.startswith(_DEAD)]
    return Reference(BANet, arguments, modules, state, dead)


def _backbone_modules(state: Mapping[str, Tensor]) -> set[str]:
    names = (name.removeprefix(_BACKBONE) for name in state if name.startswith(_BACKBONE))
    return {name.rpartition(".")[0] for name in names}


def subtraction_weight(weight: Tensor) -> Tensor:
    """Convert the first weight of `fuse` in PEE from means to differences from the means.

    `Wx r + sum_i Wi mean_i = (Wx + sum_i Wi) r - sum_i Wi (r - mean_i)`, so both forms of PEE are equivalent.

    Args:
        weight: Weight `[Wx | W1 | W2 | ..]`, (channels, parts * channels, 1, ..), of a PEE with `subtract=False`.

    Returns:
        Weight `[Wx + W1 + W2 + .. | -W1 | -W2 | ..]` of the PEE with `subtract=True`.

    Raises:
        WeightsError: Number of input channels that is not a multiple of the output channels.
    """
    if weight.shape[1] % weight.shape[0]:
        raise WeightsError(
            f"Invalid weight shape {tuple(weight.shape)} for PEE: expected a number of input channels that is a "
            "multiple of the output channels, one part for the feature and one for each mean."
        )
    own, *means = torch.split(weight, weight.shape[0], dim=1)
    return torch.cat([own + sum(means), *(-mean for mean in means)], dim=1)


SOURCES: dict[str, Callable[[Mapping[str, Tensor]], Reference]] = {_SOURCE: _banet}
