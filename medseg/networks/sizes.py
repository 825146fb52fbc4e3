"""Size checks of the network inputs, with the nearest valid size."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from medseg.errors import SizeError, by

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["ValidSizes", "check_bottom", "check_image", "check_minimum", "total_stride"]

# Voxels that the two unpadded 3^d convolutions of a block remove per axis.
_BLOCK_SHRINK = 4


def total_stride(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the product of all pooling strides per axis, the downsampling factor of the deepest feature map."""
    return tuple(prod(axis) for axis in zip(*strides, strict=True))


def check_image(x: Tensor, name: str, spatial_dims: int, in_channels: int) -> None:
    """Check that a tensor is a batch `(B, in_channels, *spatial)`.

    Args:
        x: Input of the network.
        name: Class name of the network, for the message.
        spatial_dims: Number of spatial dimensions, 2 or 3.
        in_channels: Number of input channels.

    Raises:
        SizeError: Wrong number of dimensions or channels.
    """
    if x.dim() != spatial_dims + 2:
        axes = ", ".join(
            ["batch", "channel", "depth", "height", "width"][i] for i in (0, 1, *range(5 - spatial_dims, 5))
        )
        raise SizeError(
            f"Dimension mismatch: this {name} is {spatial_dims}D and expects ({axes}), found {x.dim()} dimensions, "
            f"shape {tuple(x.shape)}. {_dimension_advice(x, spatial_dims)}"
        )
    if x.shape[1] != in_channels:
        raise SizeError(
            f"Channel mismatch: this {name} expects {in_channels} channel(s), found {x.shape[1]} (shape "
            f"{tuple(x.shape)}). Use an image with {in_channels} channel(s), or in_channels={x.shape[1]}."
        )


def _dimension_advice(x: Tensor, spatial_dims: int) -> str:
    if x.dim() == spatial_dims + 1:
        return "Add the missing batch or channel axis, e.g. image.unsqueeze(0)."
    return f"For images with {max(x.dim() - 2, 1)} spatial axes set spatial_dims accordingly."


def check_minimum(size: Sequence[int], minimum: Sequence[int], name: str) -> None:
    """Check that an image is large enough for all poolings of a padded network.

    Args:
        size: Spatial size in voxels.
        minimum: Minimum size per axis.
        name: Class name of the network, for the message.

    Raises:
        SizeError: Axis shorter than its minimum; the message names the nearest valid size.
    """
    if any(n < least for n, least in zip(size, minimum, strict=True)):
        nearest = [max(n, least) for n, least in zip(size, minimum, strict=True)]
        raise SizeError(
            f"Image too small: this {name} downsamples by {by(minimum)} and needs at least that many voxels, found "
            f"{by(size)}. The nearest valid size is {by(nearest)}: pad the image, or use fewer levels."
        )


def check_bottom(x: Tensor, stride: Sequence[int], layers: Iterable[nn.Module], name: str) -> None:
    """Check that a normalization layer does not operate on a deepest feature map of a single voxel.

    Args:
        x: Input `(B, C, *spatial)`.
        stride: Total stride per axis, see `total_stride`.
        layers: Layers of the deepest level.
        name: Class name of the network, for the message.

    Raises:
        SizeError: Normalization over a single voxel; the message names the nearest valid sizes.
    """
    if prod(n // s for n, s in zip(x.shape[2:], stride, strict=True)) != 1:
        return
    layer = next((layer for layer in layers if _needs_two_values(layer, x.shape[0])), None)
    if layer is None:
        return
    size = tuple(x.shape[2:])
    fits = [
        by([2 * s if i == axis else n for i, (n, s) in enumerate(zip(size, stride, strict=True))])
        for axis in range(len(size))
    ]
    ways = "" if isinstance(layer, _InstanceNorm) else ", or use a batch size of at least 2"
    raise SizeError(
        f"Image too small: for an input of {by(size)} the deepest level of this {name} has a single voxel, over which "
        f"{type(layer).__name__} has no variance (batch of {x.shape[0]}). The nearest valid sizes are "
        f"{' or '.join(fits)}: pad the image, use fewer levels{ways}."
    )


def _needs_two_values(layer: nn.Module, batch: int) -> bool:
    """Return whether a normalization layer fails for `batch` feature maps of a single voxel."""
    if isinstance(layer, nn.GroupNorm):
        return batch * layer.num_channels == layer.num_groups
    if isinstance(layer, _InstanceNorm | _BatchNorm):
        live = layer.training or not layer.track_running_stats
        return live and (batch == 1 or isinstance(layer, _InstanceNorm))
    return False


@dataclass(frozen=True)
class ValidSizes:
    """Valid input sizes of an unpadded ("valid") U-Net, per axis.

    With s voxels on the deepest feature map before its convolutions, total stride P and 3^d kernels, an input of
    `P*s + base` has an output of `input - shrink`. For four poolings by 2: `16s + 60` and `shrink` 184.

    Attributes:
        strides: Strides of each pooling per axis, finest first.
    """

    strides: tuple[tuple[int, ...], ...]

    @property
    def step(self) -> tuple[int, ...]:
        """Step between valid sizes per axis."""
        return total_stride(self.strides)

    @property
    def base(self) -> tuple[int, ...]:
        """Offset of the valid sizes per axis: they are multiples of `step` plus this offset."""
        sizes = [0] * len(self.strides[0])
        for stride in reversed(self.strides):
            sizes = [s * n + _BLOCK_SHRINK for s, n in zip(stride, sizes, strict=True)]
        return tuple(sizes)

    @property
    def shrink(self) -> tuple[int, ...]:
        """Difference between input size and output size per axis, always even."""
        lost = [_BLOCK_SHRINK] * len(self.strides[0])
        for stride in reversed(self.strides):
            lost = [s * n + 2 * _BLOCK_SHRINK for s, n in zip(stride, lost, strict=True)]
        return tuple(lost)

    @property
    def smallest(self) -> tuple[int, ...]:
        """Smallest valid input size per axis, with at least one output voxel."""
        return tuple(
            step * max(-((base - shrink - 1) // step), _BLOCK_SHRINK + 1) + base
            for step, base, shrink in zip(self.step, self.base, self.shrink, strict=True)
        )

    def nearest(self, size: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the nearest valid sizes per axis, below and above `size`, or `size` itself if valid."""
        found: list[tuple[int, ...]] = []
        for n, step, least in zip(size, self.step, self.smallest, strict=True):
            below = max(least, n - (n - least) % step)
            found.append((below,) if below >= n else (below, below + step))
        return found

    def check(self, size: Sequence[int], name: str) -> None:
        """Check that a size is valid.

        Raises:
            SizeError: Invalid size; the message names the nearest valid sizes on each invalid axis.
        """
        near = self.nearest(size)
        if all(n in legal for n, legal in zip(size, near, strict=True)):
            return
        rules = "; ".join(
            f"axis {axis} ({n} voxels): use {' or '.join(map(str, legal))} ({step}*s + {least % step}, from {least})"
            for axis, (n, legal, step, least) in enumerate(zip(size, near, self.step, self.smallest, strict=True))
            if n not in legal
        )
        raise SizeError(
            f'Invalid image size {by(size)} for this {name} with padding="valid": {rules}. Pad or crop the image to '
            f'one of these sizes, use tiles, or build the network with padding="same".'
        )
