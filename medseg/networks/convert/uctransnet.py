"""Weights of the UCTransNet authors' code: their network and the U-Net of its pre-training.

All tensors of both networks are used. The authors' images are in BGR order: reverse the channels of RGB images, or of
`network.encoder[0][0].conv.weight`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from medseg.errors import WeightsError
from medseg.networks.convert.reading import Reference, deepest, shape
from medseg.networks.uctransnet import UCTransNet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = ["SOURCES"]


def _uctransnet(state: Mapping[str, Tensor]) -> Reference:
    """Read `inc`, `down{i}`, `mtc` (the CCT), `up{i}` with its `coatt` (the CCA), and `outc`; i is the level.

    The attention heads are separate linear layers in the source and fused in medseg. Position embeddings of a
    non-square grid require `img_size`; a stride other than 2 after the last level requires `strides`.
    """
    source = "uctransnet"
    arguments = _backbone_arguments(state, source)
    depth = len(arguments["features"]) - 1
    heads = deepest(state, r"mtc\.encoder\.layer\.0\.channel_attn\.key\.(\d+)\.weight") + 1
    layers = deepest(state, r"mtc\.encoder\.layer\.(\d+)\.attn_norm\.weight") + 1
    modules = _backbone_modules(depth) | _cct_modules(depth, layers)
    for level in range(1, depth + 1):
        modules[f"decoder.{depth - level}.cca.skip"] = f"up{level}.coatt.mlp_x.1"
        modules[f"decoder.{depth - level}.cca.up"] = f"up{level}.coatt.mlp_g.1"
    hidden = shape(state, source, "mtc.encoder.layer.0.ffn1.fc1.weight")
    patches = [shape(state, source, f"mtc.embeddings_{i + 1}.patch_embeddings.weight")[2:] for i in range(depth)]
    tokens = shape(state, source, "mtc.embeddings_1.position_embeddings")[1]
    arguments |= {
        "img_size": _image_size(tokens, patches[0]),
        "patch_size": patches[0],
        "strides": _strides(patches),
        "num_heads": heads,
        "num_layers": layers,
        "mlp_ratio": hidden[0] / hidden[1],
    }
    return Reference(_build, arguments, modules, _fuse_heads(state, heads))


def _unet(state: Mapping[str, Tensor]) -> Reference:
    """Read the authors' U-Net as a `UCTransNet` without CCT and CCA.

    It concatenates [up, skip], `UCTransNet` [skip, up], so the halves of the first kernels are swapped.
    """
    source = "uctransnet-unet"
    arguments = _backbone_arguments(state, source)
    depth = len(arguments["features"]) - 1
    modules = _backbone_modules(depth)
    tensors = dict(state)
    for level in range(1, depth + 1):
        modules[f"decoder.{depth - level}.up.0"] = f"up{level}.up"
        name = f"up{level}.nConvs.0.conv.weight"
        if name in tensors:
            skip = arguments["features"][level - 1]
            tensors[name] = torch.cat([tensors[name][:, -skip:], tensors[name][:, :-skip]], dim=1)
    strides = [shape(state, source, f"up{level}.up.weight")[2:] for level in range(1, depth + 1)]
    style = {"strides": strides, "use_cct": False, "use_cca": False, "upsample": "deconv"}
    return Reference(UCTransNet, arguments | style, modules, tensors)


def _backbone_arguments(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Infer dimensions and widths from the first convolution of each level and the head."""
    depth = deepest(state, r"down(\d+)\.nConvs\.0\.conv\.weight")
    names = ["inc.conv.weight", *(f"down{i}.nConvs.0.conv.weight" for i in range(1, max(depth, 1) + 1))]
    shapes = [shape(state, source, name) for name in names]
    return {
        "spatial_dims": len(shapes[0]) - 2,
        "in_channels": shapes[0][1],
        "out_channels": shape(state, source, "outc.weight")[0],
        "features": tuple(one[0] for one in shapes),
    }


def _backbone_modules(depth: int) -> dict[str, str]:
    blocks = {"encoder.0.0": "inc"}
    for level in range(1, depth + 1):
        for n in (0, 1):
            blocks[f"encoder.{level}.{n}"] = f"down{level}.nConvs.{n}"
            blocks[f"decoder.{depth - level}.convs.{n}"] = f"up{level}.nConvs.{n}"
    parts = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in blocks.items() for part in ("conv", "norm")}
    return parts | {"head": "outc"}


def _cct_modules(depth: int, layers: int) -> dict[str, str]:
    modules = {}
    for i in range(depth):
        modules[f"cct.embeddings.{i}"] = f"mtc.embeddings_{i + 1}"
        modules[f"cct.embeddings.{i}.patches"] = f"mtc.embeddings_{i + 1}.patch_embeddings"
        modules[f"cct.norms.{i}"] = f"mtc.encoder.encoder_norm{i + 1}"
        modules[f"cct.reconstructions.{i}.conv"] = f"mtc.reconstruct_{i + 1}.conv"
        modules[f"cct.reconstructions.{i}.norm"] = f"mtc.reconstruct_{i + 1}.norm"
    for layer in range(layers):
        ours, theirs = f"cct.layers.{layer}", f"mtc.encoder.layer.{layer}"
        modules[f"{ours}.context_norm"] = f"{theirs}.attn_norm"
        modules[f"{ours}.attention.key"] = f"{theirs}.channel_attn.key"
        modules[f"{ours}.attention.value"] = f"{theirs}.channel_attn.value"
        for i in range(depth):
            modules[f"{ours}.query_norms.{i}"] = f"{theirs}.attn_norm{i + 1}"
            modules[f"{ours}.attention.queries.{i}"] = f"{theirs}.channel_attn.query{i + 1}"
            modules[f"{ours}.attention.outputs.{i}"] = f"{theirs}.channel_attn.out{i + 1}"
            modules[f"{ours}.mlps.{i}.0"] = f"{theirs}.ffn_norm{i + 1}"
            modules[f"{ours}.mlps.{i}.1"] = f"{theirs}.ffn{i + 1}.fc1"
            modules[f"{ours}.mlps.{i}.4"] = f"{theirs}.ffn{i + 1}.fc2"
    return modules


def _fuse_heads(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Fuse the linear layers of all heads (`...query1.0.weight`, ..) into one (`...query1.weight`)."""
    tensors = dict(state)
    for name in state:
        stem, _, rest = name.partition(".channel_attn.")
        projection = rest.removesuffix(".0.weight")
        parts = [f"{stem}.channel_attn.{projection}.{head}.weight" for head in range(heads)]
        if projection != rest and all(part in tensors for part in parts):
            tensors[f"{stem}.channel_attn.{projection}.weight"] = torch.cat([tensors.pop(part) for part in parts])
    return tensors


def _strides(patches: Sequence[Sequence[int]]) -> list[Any]:
    """Infer the poolings between the levels from their patches; the last one is assumed to be 2."""
    pairs = pairwise(patches)
    return [*(tuple(max(a // b, 1) for a, b in zip(fine, coarse, strict=True)) for fine, coarse in pairs), 2]


def _image_size(tokens: int, patch: Sequence[int]) -> tuple[int, ...] | None:
    """Return the image size of a square or cubic token grid; None if `tokens` are not such a grid."""
    side = round(tokens ** (1 / len(patch)))
    return tuple(side * p for p in patch) if side ** len(patch) == tokens else None


def _build(**arguments: Any) -> UCTransNet:
    if arguments["img_size"] is None:
        raise WeightsError(
            "The position embeddings are not of a square grid, whose size cannot be inferred from the tensors: set "
            "img_size, one number per axis, to that of the trained network."
        )
    return UCTransNet(**arguments)


SOURCES: dict[str, Callable[[Mapping[str, Tensor]], Reference]] = {
    "uctransnet": _uctransnet,
    "uctransnet-unet": _unet,
}
