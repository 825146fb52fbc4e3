"""Public UNet++ weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medseg.networks.convert.reading import Reference, deepest, shape
from medseg.networks.unetplusplus import UNetPlusPlus, preset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

__all__ = ["SOURCES"]


def _nodes(depth: int) -> Iterator[tuple[str, int, int]]:
    """Yield module name, row and column of each node."""
    for diagonal in range(depth + 1):
        yield f"diagonals.{diagonal}.encoder", diagonal, 0
        for column in range(1, diagonal + 1):
            yield f"diagonals.{diagonal}.nodes.{column - 1}.convs", diagonal - column, column


def _sizes(state: Mapping[str, Tensor], source: str, encoder: list[str], heads: dict[int, str]) -> dict[str, Any]:
    """Infer dimensions, widths and heads from the first convolution of each row and the names of all heads."""
    shapes = [shape(state, source, f"{name}.weight") for name in encoder]
    last = max(heads)
    return {
        "spatial_dims": len(shapes[0]) - 2,
        "in_channels": shapes[0][1],
        "out_channels": shape(state, source, f"{heads[last]}.weight")[0],
        "features": tuple(one[0] for one in shapes),
        "deep_supervision": sum(f"{name}.weight" in state for name in heads.values()) == last,
    }


def _strides(state: Mapping[str, Tensor], source: str, ups: list[str]) -> dict[str, Any]:
    """Infer the strides from the kernel sizes of the transposed convolutions."""
    return {"strides": tuple(shape(state, source, f"{name}.weight")[2:] for name in ups)}


def _unetpp_port(state: Mapping[str, Tensor]) -> Reference:
    """Read the common PyTorch port: batch norm, linear interpolation, `conv{row}_{column}`, `final{j}` or `final`."""
    source = "unetpp-port"
    depth = max(deepest(state, r"conv(\d+)_0\.conv1\.weight"), 1)
    heads = {depth: "final"} if "final.weight" in state else {j: f"final{j}" for j in range(1, depth + 1)}
    arguments = _sizes(state, source, [f"conv{i}_0.conv1" for i in range(depth + 1)], heads)
    modules = {f"heads.{j}": name for j, name in heads.items()}
    for ours, i, j in _nodes(depth):
        for n in (0, 1):
            modules[f"{ours}.{n}.conv"] = f"conv{i}_{j}.conv{n + 1}"
            modules[f"{ours}.{n}.norm"] = f"conv{i}_{j}.bn{n + 1}"
    return Reference(UNetPlusPlus, arguments | preset("bn_interp", arguments["spatial_dims"]), modules, state)


def _unetpp_2018(state: Mapping[str, Tensor]) -> Reference:
    """Read the network of the 2018 paper: no norm, transposed convolutions, 1-based `conv{r}{c}_{n}`, `output_{j}`."""
    source = "unetpp-2018"
    depth = max(deepest(state, r"conv(\d+)1_1\.weight") - 1, 1)
    heads = {j: f"output_{j}" for j in range(1, depth + 1)}
    arguments = _sizes(state, source, [f"conv{i + 1}1_1" for i in range(depth + 1)], heads)
    arguments |= _strides(state, source, [f"up{i + 1}2" for i in range(depth)])
    modules = {f"heads.{j}": name for j, name in heads.items()}
    for ours, i, j in _nodes(depth):
        for n in (0, 1):
            modules[f"{ours}.{n}.conv"] = f"conv{i + 1}{j + 1}_{n + 1}"
        modules[ours.replace("convs", "up.0")] = f"up{i + 1}{j + 1}"
    return Reference(UNetPlusPlus, arguments | {"cat_order": "up_first"}, modules, state)


def _unetpp_nnunet(state: Mapping[str, Tensor]) -> Reference:
    """Read the authors' version in nnU-Net: instance norm, strided convolutions.

    `conv_blocks_context.{row}` is the encoder, `loc{z}.{u}` and `up{z}.{u}` are X(depth-z-u-1, u+1), `seg_outputs.{z}`
    is head depth-z.
    """
    source = "unetpp-nnunet"
    depth = max(deepest(state, r"conv_blocks_context\.(\d+)\..*weight"), 1)
    heads = {depth - z: f"seg_outputs.{z}" for z in range(depth)}
    first = [f"conv_blocks_context.{i}.blocks.0.conv" for i in range(depth)]
    first.append(f"conv_blocks_context.{depth}.0.blocks.0.conv")
    arguments = _sizes(state, source, first, heads)
    arguments |= _strides(state, source, [f"up{depth - i - 1}.0" for i in range(depth)])
    modules = {f"heads.{j}": name for j, name in heads.items()}
    for ours, i, j in _nodes(depth):
        theirs = f"loc{depth - i - j}.{j - 1}" if j else f"conv_blocks_context.{i}"
        for n in (0, 1):
            unit = f"{theirs}.{n}.blocks.0" if j or i == depth else f"{theirs}.blocks.{n}"
            modules[f"{ours}.{n}.conv"] = f"{unit}.conv"
            modules[f"{ours}.{n}.norm"] = f"{unit}.instnorm"
        modules[ours.replace("convs", "up.0")] = f"up{depth - i - j}.{j - 1}"
    return Reference(UNetPlusPlus, preset("nnunet", arguments["spatial_dims"]) | arguments, modules, state)


SOURCES: dict[str, Callable[[Mapping[str, Tensor]], Reference]] = {
    "unetpp-port": _unetpp_port,
    "unetpp-2018": _unetpp_2018,
    "unetpp-nnunet": _unetpp_nnunet,
}
