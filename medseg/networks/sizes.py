"""Size rules of the networks: what fits, what does not, and the nearest size that would."""

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

# What the two unpadded 3^d convolutions of one block take off each axis.
_BLOCK_SHRINK = 4


def total_stride(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the product of all pooling strides per axis: how much smaller the deepest map is."""
    return tuple(prod(axis) for axis in zip(*strides, strict=True))


def check_image(x: Tensor, name: str, spatial_dims: int, in_channels: int) -> None:
    """Refuse a tensor that is no `(B, in_channels, *spatial)` batch.

    Args:
        x: the tensor given to the network.
        name: class name of the network, for the message.
        spatial_dims: 2 or 3.
        in_channels: channels that the network reads.

    Raises:
        SizeError: wrong number of dimensions, or of channels.
    """
    if x.dim() != spatial_dims + 2:
        axes = ", ".join(
            ["batch", "channel", "depth", "height", "width"][i] for i in (0, 1, *range(5 - spatial_dims, 5))
        )
        raise SizeError(
            f"This {name} is {spatial_dims}D and reads tensors ({axes}); it got {x.dim()} dimensions, shape "
            f"{tuple(x.shape)}. {_dimension_advice(x, spatial_dims)}"
        )
    if x.shape[1] != in_channels:
        raise SizeError(
            f"This {name} reads {in_channels} channel(s) and got {x.shape[1]} (shape {tuple(x.shape)}). "
            f"Give an image of {in_channels} channel(s), or build the network with in_channels={x.shape[1]}."
        )


def _dimension_advice(x: Tensor, spatial_dims: int) -> str:
    if x.dim() == spatial_dims + 1:
        return "Add the missing batch or channel axis, e.g. image.unsqueeze(0)."
    return f"For images of {max(x.dim() - 2, 1)} spatial axes build it with another spatial_dims."


def check_minimum(size: Sequence[int], minimum: Sequence[int], name: str) -> None:
    """Refuse an image on which some pooling of a padded network would find nothing left.

    Args:
        size: spatial size in voxels.
        minimum: smallest size per axis.
        name: class name of the network, for the message.

    Raises:
        SizeError: an axis is shorter than its minimum; names the nearest size that fits.
    """
    if any(n < least for n, least in zip(size, minimum, strict=True)):
        nearest = [max(n, least) for n, least in zip(size, minimum, strict=True)]
        raise SizeError(
            f"This {name} divides each axis down by {by(minimum)} and therefore needs at least that many voxels; "
            f"it got {by(size)}. The nearest size that fits is {by(nearest)}: pad the image, or use fewer levels."
        )


def check_bottom(x: Tensor, stride: Sequence[int], layers: Iterable[nn.Module], name: str) -> None:
    """Refuse an input whose deepest map is one voxel, where a normalization there has no variance to divide by.

    Args:
        x: input `(B, C, *spatial)`.
        stride: total stride per axis, see `total_stride`.
        layers: modules that work on the deepest map.
        name: class name of the network, for the message.

    Raises:
        SizeError: one voxel meets a normalization that needs two; names the nearest sizes that fit.
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
    ways = "" if isinstance(layer, _InstanceNorm) else ", or give a batch of two or more"
    raise SizeError(
        f"An input of {by(size)} leaves this {name} a single voxel at its deepest level, over which "
        f"{type(layer).__name__} has no variance (batch of {x.shape[0]}). The nearest sizes that fit are "
        f"{' or '.join(fits)}: pad the image, use fewer levels{ways}."
    )


def _needs_two_values(layer: nn.Module, batch: int) -> bool:
    """Tell whether torch's normalization refuses `batch` maps of one voxel each."""
    if isinstance(layer, nn.GroupNorm):
        return batch * layer.num_channels == layer.num_groups
    if isinstance(layer, _InstanceNorm | _BatchNorm):
        live = layer.training or not layer.track_running_stats
        return live and (batch == 1 or isinstance(layer, _InstanceNorm))
    return False


@dataclass(frozen=True)
class ValidSizes:
    """Sizes of an unpadded ("valid") U-Net, each axis by itself.

    With s voxels on the deepest map before its convolutions, P the total stride and 3^d kernels, an input of
    `P*s + base` gives an output of `input - shrink`. For four poolings by 2: `16s + 60` and `shrink` 184.

    Attributes:
        strides: one tuple of strides per pooling, finest first.
    """

    strides: tuple[tuple[int, ...], ...]

    @property
    def step(self) -> tuple[int, ...]:
        """Distance between two legal sizes per axis."""
        return total_stride(self.strides)

    @property
    def base(self) -> tuple[int, ...]:
        """What a legal size exceeds a multiple of `step` by, before reduction."""
        sizes = [0] * len(self.strides[0])
        for stride in reversed(self.strides):
            sizes = [s * n + _BLOCK_SHRINK for s, n in zip(stride, sizes, strict=True)]
        return tuple(sizes)

    @property
    def shrink(self) -> tuple[int, ...]:
        """Input size minus output size per axis; always even."""
        lost = [_BLOCK_SHRINK] * len(self.strides[0])
        for stride in reversed(self.strides):
            lost = [s * n + 2 * _BLOCK_SHRINK for s, n in zip(stride, lost, strict=True)]
        return tuple(lost)

    @property
    def smallest(self) -> tuple[int, ...]:
        """Smallest legal input per axis: one output voxel at least."""
        return tuple(
            step * max(-((base - shrink - 1) // step), _BLOCK_SHRINK + 1) + base
            for step, base, shrink in zip(self.step, self.base, self.shrink, strict=True)
        )

    def nearest(self, size: Sequence[int]) -> list[tuple[int, ...]]:
        """Return per axis the legal sizes just below and above, or the one that `size` already is."""
        found: list[tuple[int, ...]] = []
        for n, step, least in zip(size, self.step, self.smallest, strict=True):
            below = max(least, n - (n - least) % step)
            found.append((below,) if below >= n else (below, below + step))
        return found

    def check(self, size: Sequence[int], name: str) -> None:
        """Refuse a size at which some pooling would meet a remainder, or nothing would be left.

        Raises:
            SizeError: names the legal sizes below and above on every axis that does not fit.
        """
        near = self.nearest(size)
        if all(n in legal for n, legal in zip(size, near, strict=True)):
            return
        rules = "; ".join(
            f"axis {axis} ({n} voxels) fits at {' or '.join(map(str, legal))} ({step}*s + {least % step}, from {least})"
            for axis, (n, legal, step, least) in enumerate(zip(size, near, self.step, self.smallest, strict=True))
            if n not in legal
        )
        raise SizeError(
            f'This {name} has padding="valid" and cannot use {by(size)}: {rules}. Pad or crop the image to one of '
            f'these sizes, run it in tiles, or build the network with padding="same".'
        )
