"""Public U-Net weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medseg.networks.convert.reading import Reference, deepest, shape
from medseg.networks.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

__all__ = ["SOURCES"]


def _unet_arguments(state: Mapping[str, Tensor], source: str, encoder: list[str], head: str) -> dict[str, Any]:
    """Infer dimensions and widths of a U-Net from the first convolution of each level and the head."""
    shapes = [shape(state, source, f"{name}.weight") for name in encoder]
    return {
        "spatial_dims": len(shapes[0]) - 2,
        "in_channels": shapes[0][1],
        "out_channels": shape(state, source, f"{head}.weight")[0],
        "features": tuple(one[0] for one in shapes),
    }


def _unet_blocks(depth: int) -> Iterator[tuple[str, int, bool]]:
    """Yield name, level and whether it is in the decoder, for each convolution pair of a `UNet`."""
    for level in range(depth):
        yield f"encoder.{level}", level, False
    yield "bottleneck", depth, False
    for place in range(depth):
        yield f"decoder.{place}.convs", depth - 1 - place, True


def _unet_port(state: Mapping[str, Tensor]) -> Reference:
    """Read the U-Net of the common PyTorch port of UNet++: batch norm, linear interpolation, `conv{row}_{column}`."""
    source = "unet-port"
    depth = deepest(state, r"conv(\d+)_0\.conv1\.weight")
    arguments = _unet_arguments(state, source, [f"conv{i}_0.conv1" for i in range(depth + 1)], "final")
    modules = {"head": "final"}
    for ours, level, up in _unet_blocks(depth):
        for n in (0, 1):
            theirs = f"conv{level}_{depth - level if up else 0}"
            modules[f"{ours}.{n}.conv"] = f"{theirs}.conv{n + 1}"
            modules[f"{ours}.{n}.norm"] = f"{theirs}.bn{n + 1}"
    style = {"norm": "batch", "upsample": "interp", "cat_order": "skip_first"}
    return Reference(UNet, arguments | style, modules, state)


def _unet_2018(state: Mapping[str, Tensor]) -> Reference:
    """Read the U-Net baseline of the UNet++ papers: no norm, up-convolutions, 1-based `conv{row}{column}_{n}`."""
    source = "unet-2018"
    depth = deepest(state, r"conv(\d+)1_1\.weight") - 1
    arguments = _unet_arguments(state, source, [f"conv{i + 1}1_1" for i in range(max(depth, 0) + 1)], "output")
    modules = {"head": "output"}
    for ours, level, up in _unet_blocks(depth):
        theirs = f"{level + 1}{depth - level + 1 if up else 1}"
        for n in (0, 1):
            modules[f"{ours}.{n}.conv"] = f"conv{theirs}_{n + 1}"
        if up:
            modules[ours.replace("convs", "up.0")] = f"up{theirs}"
    return Reference(UNet, arguments, modules, state)


def _unet_2015(state: Mapping[str, Tensor]) -> Reference:
    """Read the unpadded U-Net of 2015: `down{level}_conv{n}`, `up{level}_deconv`, `up{level}_conv{n}`, `score`."""
    source = "unet-2015"
    depth = deepest(state, r"down(\d+)_conv1\.weight")
    arguments = _unet_arguments(state, source, [f"down{i}_conv1" for i in range(depth + 1)], "score")
    last = shape(state, source, "up0_deconv.weight")[1]
    modules = {"head": "score"}
    for ours, level, up in _unet_blocks(depth):
        theirs = f"{'up' if up else 'down'}{level}"
        for n in (0, 1):
            modules[f"{ours}.{n}.conv"] = f"{theirs}_conv{n + 1}"
        if up:
            modules[ours.replace("convs", "up.0")] = f"{theirs}_deconv"
    return Reference(UNet, arguments | {"padding": "valid", "last_upconv_channels": last}, modules, state)


SOURCES: dict[str, Callable[[Mapping[str, Tensor]], Reference]] = {
    "unet-port": _unet_port,
    "unet-2018": _unet_2018,
    "unet-2015": _unet_2015,
}
