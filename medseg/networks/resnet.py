"""Dilated ResNet with bottleneck blocks and ASPP, the encoder of BA-Net, 2D and 3D.

The modules have the names of published ResNets, so ImageNet weights can be loaded by name.
"""

from __future__ import annotations

import logging
from math import prod, sqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from monai.networks.layers import Conv, Pool, get_norm_layer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from medseg.errors import RequestError, WeightsError
from medseg.networks.blocks import activation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from medseg.networks.blocks import LayerName

__all__ = ["ASPP", "BLOCKS", "Bottleneck", "ResNetDilated", "load_pretrained", "per_axis"]

# Number of blocks per stage.
BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
_EXPANSION = 4
_NAMES_SHOWN = 12

logger = logging.getLogger(__name__)


def per_axis(option: str, value: int | Sequence[int], spatial_dims: int, *, least: int = 1) -> tuple[int, ...]:
    """Return one number per spatial axis.

    Args:
        option: Name of the option, for the message.
        value: One number, or one per axis.
        spatial_dims: Number of spatial dimensions, 2 or 3.
        least: Minimum value.

    Raises:
        RequestError: Too small a value, or a number of values that does not match the axes.
    """
    spelled = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(spelled) != spatial_dims or min(spelled) < least:
        raise RequestError(
            f"invalid value {value!r} in {option}; expected an integer of at least {least}, or {spatial_dims} of them "
            "(one per axis)."
        )
    return spelled


class Bottleneck(nn.Module):
    """Residual bottleneck block with convolutions of kernel size 1, 3 and 1.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of input channels.
        planes: Number of inner channels; the block has `4 * planes` output channels.
        stride: Stride of the middle convolution and of the shortcut, which is a 1^d convolution if the shape changes.
        dilation: Dilation of the middle convolution.
        norm: MONAI factory name or (name, arguments) of the normalization.
        act: MONAI factory name or (name, arguments) of the activation.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        planes: int,
        *,
        stride: Sequence[int],
        dilation: int = 1,
        norm: LayerName = "batch",
        act: LayerName = "relu",
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        out_channels = _EXPANSION * planes

        def normalize(channels: int) -> nn.Module:
            layer: nn.Module = get_norm_layer(norm, spatial_dims=spatial_dims, channels=channels)
            return layer

        self.conv1 = conv(in_channels, planes, kernel_size=1, bias=False)
        self.bn1 = normalize(planes)
        self.conv2 = conv(
            planes, planes, kernel_size=3, stride=tuple(stride), padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = normalize(planes)
        self.conv3 = conv(planes, out_channels, kernel_size=1, bias=False)
        self.bn3 = normalize(out_channels)
        self.act = activation(act)
        self.downsample: nn.Sequential | None = None
        if max(stride) > 1 or in_channels != out_channels:
            shortcut = conv(in_channels, out_channels, kernel_size=1, stride=tuple(stride), bias=False)
            self.downsample = nn.Sequential(shortcut, normalize(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, 4 * planes, *spatial)`, each axis divided by its stride and rounded up."""
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            x = self.downsample(x)
        result: Tensor = self.act(out + x)
        return result


class ResNetDilated(nn.Module):
    """ResNet of bottleneck blocks with a stem and four stages, without global pooling and classifier.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of image channels.
        blocks: Number of blocks per stage.
        base_width: Channels of the stem and planes of stage 1; stage i has `4 * 2**(i - 1) * base_width` channels.
        strides: Strides of the stem convolution, the stem pooling, and stages 1 to 4, each a number or one per axis.
            Axes with pooling stride 1 are not pooled.
        dilations: Dilations of stages 3 and 4; the first block of a stage uses half, rounded down.
        multi_grid: Dilations of the blocks of stage 4, repeated cyclically, instead of `dilations[1]`; None to use
            `dilations`.
        norm: MONAI factory name or (name, arguments) of the normalization.
        act: MONAI factory name or (name, arguments) of the activation.

    Attributes:
        channels: Output channels of the four stages.
        stage_strides: Downsampling factor of each stage per axis (sizes are rounded up).

    Raises:
        RequestError: Invalid or contradictory options.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        blocks: Sequence[int] = BLOCKS["resnet50"],
        *,
        base_width: int = 64,
        strides: Sequence[int | Sequence[int]] = (2, 2, 1, 2, 1, 1),
        dilations: Sequence[int] = (2, 4),
        multi_grid: Sequence[int] | None = (4, 4, 4),
        norm: LayerName = "batch",
        act: LayerName = "relu",
    ) -> None:
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1:
            raise RequestError(
                f"invalid blocks={tuple(blocks)}; expected the number of blocks of each of the 4 stages."
            )
        if len(strides) != 6:
            raise RequestError(
                f"invalid strides={tuple(strides)}; expected 6 entries: stem convolution, pooling, and stages 1 to 4."
            )
        spelled = [per_axis("strides", stride, spatial_dims) for stride in strides]
        self.stage_strides = [
            tuple(prod(axis) for axis in zip(*spelled[: i + 3], strict=True)) for i in range(len(blocks))
        ]
        self.channels = tuple(_EXPANSION * 2**i * base_width for i in range(len(blocks)))
        conv = Conv[Conv.CONV, spatial_dims]
        self.conv1 = conv(in_channels, base_width, kernel_size=7, stride=spelled[0], padding=3, bias=False)
        self.bn1 = get_norm_layer(norm, spatial_dims=spatial_dims, channels=base_width)
        self.act = activation(act)
        self.maxpool = _stem_pool(spatial_dims, spelled[1])
        stages = [nn.Sequential() for _ in blocks]
        read = base_width
        for i, rates in enumerate(_dilations(blocks, dilations, multi_grid)):
            for n, dilation in enumerate(rates):
                stride = spelled[i + 2] if n == 0 else (1,) * spatial_dims
                options: dict[str, Any] = {"stride": stride, "dilation": dilation, "norm": norm, "act": act}
                stages[i].append(Bottleneck(spatial_dims, read, 2**i * base_width, **options))
                read = self.channels[i]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        _init(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps of the four stages, finest first, for an image `(B, in_channels, *spatial)`."""
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        c1 = self.layer1(x)
        c2 = self.layer2(c1)
        c3 = self.layer3(c2)
        return [c1, c2, c3, self.layer4(c3)]


def _stem_pool(spatial_dims: int, stride: tuple[int, ...]) -> nn.Module:
    if max(stride) == 1:
        return nn.Identity()
    kernel = tuple(3 if s > 1 else 1 for s in stride)
    layer: nn.Module = Pool[Pool.MAX, spatial_dims](
        kernel_size=kernel, stride=stride, padding=tuple(k // 2 for k in kernel)
    )
    return layer


def _dilations(
    blocks: Sequence[int], dilations: Sequence[int], multi_grid: Sequence[int] | None
) -> list[tuple[int, ...]]:
    """Return the dilations of all blocks per stage."""
    if len(dilations) != 2 or min(dilations) < 1:
        raise RequestError(
            f"invalid dilations={tuple(dilations)}; expected two integers of at least 1, for stages 3 and 4."
        )
    rates = [(max(1, d // 2), *(d,) * (n - 1)) for n, d in zip(blocks, (1, 1, *dilations), strict=True)]
    if multi_grid is not None:
        # Otherwise a change of `dilations` alone would be ignored silently.
        if dilations[1] not in multi_grid or min(multi_grid) < 1:
            raise RequestError(
                f"multi_grid={tuple(multi_grid)}, which sets the dilations of stage 4, contradicts "
                f"dilations={tuple(dilations)}. Set dilations[1] to one of its values, or multi_grid=None."
            )
        rates[3] = tuple(multi_grid[n % len(multi_grid)] for n in range(blocks[3]))
    return rates


def _init(network: nn.Module) -> None:
    """Initialize all convolutions from N(0, sqrt(2/N)), N = kernel voxels * output channels."""
    for module in network.modules():
        if isinstance(module, _ConvNd):
            nn.init.normal_(module.weight, std=sqrt(2 / (prod(module.kernel_size) * module.out_channels)))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1^d branch, dilated 3^d branches, a global pooling branch and a projection.

    Args:
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of input channels.
        channels: Number of channels of each branch and of the output.
        rates: Dilations of the 3^d branches, each a number or one per axis.
        norm: MONAI factory name or (name, arguments) of the normalization.
        pool_norm: Normalization of the global pooling branch, which has one voxel per channel; None for no
            normalization (its convolution then has a bias). "auto" is `norm` in 2D unless it is an instance norm, and
            None in 3D, where batches of one image are common.
        act: MONAI factory name or (name, arguments) of the activation.

    Raises:
        RequestError: Rate below 1, or an instance norm in the global pooling branch.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int,
        rates: Sequence[int | Sequence[int]],
        *,
        norm: LayerName = "batch",
        pool_norm: LayerName | None = "auto",
        act: LayerName = "relu",
    ) -> None:
        super().__init__()
        if pool_norm == "auto":
            pool_norm = None if spatial_dims == 3 or _is_instance(norm) else norm
        if pool_norm is not None and _is_instance(pool_norm):
            raise RequestError(
                f"invalid aspp_pool_norm={pool_norm!r}: global pooling leaves one voxel without variance; choose "
                '"batch", a group norm, or None.'
            )
        style: dict[str, Any] = {"norm": norm, "act": act}
        self.rates = tuple(per_axis("aspp_rates", rate, spatial_dims) for rate in rates)
        self.branches = nn.ModuleList([_conv_unit(spatial_dims, in_channels, channels, kernel=1, **style)])
        for rate in self.rates:
            self.branches.append(_conv_unit(spatial_dims, in_channels, channels, kernel=3, dilation=rate, **style))
        self.pool = nn.Sequential(
            Conv[Conv.CONV, spatial_dims](in_channels, channels, kernel_size=1, bias=pool_norm is None)
        )
        if pool_norm is not None:
            self.pool.append(get_norm_layer(pool_norm, spatial_dims=spatial_dims, channels=channels))
        self.pool.append(activation(act))
        branches = len(self.branches) + 1
        self.project = _conv_unit(spatial_dims, branches * channels, channels, kernel=1, **style)
        self.axes = list(range(2, 2 + spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, channels, *spatial)`."""
        parts: list[Tensor] = []
        for branch in self.branches:
            parts.append(branch(x))
        pooled = self.pool(x.mean(self.axes, keepdim=True))
        parts.append(pooled.expand_as(parts[0]))
        out: Tensor = self.project(torch.cat(parts, dim=1))
        return out


def _conv_unit(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    *,
    kernel: int,
    norm: LayerName,
    act: LayerName,
    dilation: int | Sequence[int] = 1,
) -> nn.Sequential:
    """Return a size-preserving convolution without bias, followed by normalization and activation."""
    padding = dilation if kernel == 3 else 0
    return nn.Sequential(
        Conv[Conv.CONV, spatial_dims](
            in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False
        ),
        get_norm_layer(norm, spatial_dims=spatial_dims, channels=out_channels),
        activation(act),
    )


def _is_instance(norm: LayerName) -> bool:
    return str(norm if isinstance(norm, str) else norm[0]).lower().startswith("instance")


def load_pretrained(backbone: ResNetDilated, path: str | PathLike[str]) -> None:
    """Load a local weight file with the names of published ResNets (`conv1.weight`, `layer1.0.bn2.bias`, ..).

    A "module." prefix of all names and an enclosing "state_dict" are removed; tensors of other modules, such as the
    classifier, are logged and skipped. For single-channel images the three color kernels of the stem are summed, which
    equals repeating the grayscale image three times.

    Args:
        backbone: Network to initialize.
        path: File written by `torch.save`; read without executing code (`weights_only`).

    Raises:
        WeightsError: Missing or invalid file, or missing, unexpected or mismatched tensors, which are listed.
    """
    file = Path(path)
    given = _read(file)
    own = backbone.state_dict()
    stem = given.get("conv1.weight")
    if stem is not None and stem.shape[1] == 3 and own["conv1.weight"].shape[1] == 1:
        given["conv1.weight"] = stem.sum(1, keepdim=True)
    missing = [n for n in own if n not in given and not n.endswith("num_batches_tracked")]
    parts = {name.partition(".")[0] for name in own}
    surplus = [n for n in given if n not in own and n.partition(".")[0] in parts]
    misshapen = [
        f"{n} {tuple(given[n].shape)}, expected {tuple(t.shape)}"
        for n, t in own.items()
        if n in given and given[n].shape != t.shape
    ]
    if missing or surplus or misshapen:
        raise WeightsError(
            f"weights do not match the backbone: {file}: {_listed('missing', missing)}{_listed('unexpected', surplus)}"
            f"{_listed('shape mismatch', misshapen)}set backbone, base_width, in_channels (1 or 3), spatial_dims and "
            "norm to those of the weights."
        )
    unused = sorted(n for n in given if n not in own)
    logger.info("%s: %d tensors loaded; skipped: %s", file, len(own), ", ".join(unused) or "none")
    backbone.load_state_dict({name: given.get(name, tensor) for name, tensor in own.items()})


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise WeightsError(f"file not found: pretrained={str(file)!r}. Set the path of a local weight file, or None.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(f"unreadable weight file {file}: expected a file written by torch.save.") from error
    return _tensors(state, file)


def _tensors(state: Any, file: Path) -> dict[str, Tensor]:
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise WeightsError(f"no state dict in {file}: expected tensors by name.")
    return _bare(state)


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{title} ({len(names)}): {', '.join(names[:_NAMES_SHOWN])}{rest}; "
