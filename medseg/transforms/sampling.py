"""Interpolation of images and labels at arbitrary positions, using only the required region of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn import functional as F

from medseg.errors import RequestError

__all__ = ["PADDINGS", "Sampler", "check_padding", "cut"]

# Padding outside an image: edge value, reflection without repeating the edge, or a constant.
PADDINGS = ("border", "reflect", "constant")
# Integers up to here are exact in float32.
_EXACT = 1 << 24


class _Axis(NamedTuple):
    """Positions along one axis, relative to `shift`, and the required range of voxels."""

    places: torch.Tensor
    shift: int
    low: int
    length: int


class Sampler:
    """Sample images and labels with the same grid at arbitrary positions.

    Args:
        places: Positions along each axis in voxels relative to `origin`, float32, broadcastable to `size`.
        size: Spatial size of the result.
        shape: Spatial shape of the images.
        origin: Reference voxel of the positions; a nearby one preserves float32 precision in large volumes.
        padding: Padding outside the image, one of `PADDINGS`.

    Raises:
        RequestError: Unknown padding.
    """

    def __init__(
        self,
        places: Sequence[torch.Tensor],
        size: Sequence[int],
        shape: Sequence[int],
        *,
        origin: Sequence[int] | None = None,
        padding: str = "border",
    ) -> None:
        check_padding(padding)
        self.size = tuple(size)
        self.constant = padding == "constant"
        origins = [0] * len(size) if origin is None else origin
        self._axes = [_axis(*each, padding) for each in zip(places, origins, shape, strict=True)]

    def linear(self, image: torch.Tensor, *, outside: float = 0.0) -> torch.Tensor:
        """Return linearly interpolated values `(C, *size)`, float32, of an image `(C, *shape)`.

        Args:
            image: Image `(C, *shape)`.
            outside: Value outside the image for "constant" padding.
        """
        return self._interpolated(self._needed(image).float(), outside)

    def nearest(self, label: torch.Tensor, *, outside: float = 0) -> torch.Tensor:
        """Return nearest-neighbor values `(C, *size)` of a label `(C, *shape)`, of the same data type."""
        needed = self._needed(label)
        found = needed.reshape(len(needed), -1)[:, self._nearest].reshape(len(needed), *self.size)
        return found.masked_fill_(self._is_outside, outside) if self._is_outside is not None else found

    def votes(self, label: torch.Tensor, *, outside: float = 0) -> torch.Tensor:
        """Return the label whose linearly interpolated mask is largest at each position.

        Boundaries are smoother than with `nearest`. Ties go to the smaller label.
        """
        needed = self._needed(label)
        found = torch.zeros((len(needed), *self.size), dtype=label.dtype)
        best = torch.full(found.shape, -1.0)
        known = torch.unique(needed)
        if self.constant:
            known = torch.unique(torch.cat([known, known.new_tensor([outside])]))
        for value in known:
            share = self._interpolated((needed == value).float(), float(self.constant and value == outside))
            # Differences within rounding count as ties.
            better = share > best + 1e-6
            best = torch.where(better, share, best)
            found = torch.where(better, value, found)
        return found

    def _needed(self, image: torch.Tensor) -> torch.Tensor:
        for dim, axis in enumerate(self._axes, 1):
            image = image.narrow(dim, axis.low, axis.length)
        return image

    def _interpolated(self, values: torch.Tensor, outside: float) -> torch.Tensor:
        shifted = self.constant and outside != 0
        source = (values - outside if shifted else values)[None]
        # grid_sample runs in parallel over the batch, so the result is split into a batch.
        batch = math.gcd(self.size[0], torch.get_num_threads())
        grid = self._grid.view(batch, self.size[0] // batch, *self._grid.shape[1:])
        padding = "zeros" if self.constant else "border"
        found = F.grid_sample(source.expand(batch, *values.shape), grid, padding_mode=padding, align_corners=False)
        found = found.transpose(0, 1).reshape(len(values), *self.size)
        return found.add_(outside) if shifted else found

    @cached_property
    def _grid(self) -> torch.Tensor:
        """Positions in the convention of `grid_sample`: last axis first, -1 to 1 over the required region."""
        grid = torch.empty(*self.size, len(self.size))
        for dim, axis in enumerate(reversed(self._axes)):
            first = torch.tensor((2 * axis.shift + 1) / axis.length - 1)
            torch.add(first, axis.places.broadcast_to(self.size), alpha=2 / axis.length, out=grid[..., dim])
        return grid

    @cached_property
    def _nearest(self) -> torch.Tensor:
        """Flat indices of the nearest voxels in the required region."""
        exact = torch.float32 if math.prod(axis.length for axis in self._axes) < _EXACT else torch.float64
        flat, step = torch.zeros((), dtype=exact), 1
        for axis in reversed(self._axes):
            index = axis.places.round().to(exact)
            if self.constant:
                index = index.clamp_(-axis.shift, axis.length - 1 - axis.shift)
            flat = torch.add(flat, index, alpha=step)
            step *= axis.length
        return (flat + self._first).broadcast_to(self.size).long().flatten()

    @property
    def _first(self) -> int:
        """Flat index of the origin of the positions in the required region."""
        number = 0
        for axis in self._axes:
            number = number * axis.length + axis.shift
        return number

    @cached_property
    def _is_outside(self) -> torch.Tensor | None:
        if not self.constant:
            return None
        found = torch.zeros((), dtype=torch.bool)
        for axis in self._axes:
            index = axis.places.round() + axis.shift
            found = found | (index < 0) | (index > axis.length - 1)
        return found if bool(found.any()) else None


def cut(
    image: torch.Tensor,
    start: Sequence[int],
    size: Sequence[int],
    *,
    flips: Sequence[bool] | None = None,
    padding: str = "border",
    outside: float = 0.0,
) -> torch.Tensor:
    """Return a copy of a cropped box, without interpolation.

    Args:
        image: Image `(C, *spatial)`.
        start: First voxel on each axis; may be outside the image.
        size: Spatial size of the box.
        flips: Whether to flip the box, per axis.
        padding: Padding outside the image, one of `PADDINGS`.
        outside: Value outside the image for "constant" padding.

    Returns:
        Contiguous tensor `(C, *size)` of the same data type.
    """
    check_padding(padding)
    padded = []
    for axis, (first, count) in enumerate(zip(start, size, strict=True)):
        if first >= 0 and first + count <= image.shape[axis + 1]:
            image = image.narrow(axis + 1, first, count)
        else:
            padded.append(axis)
    for axis in padded:
        index = torch.arange(start[axis], start[axis] + size[axis])
        length = image.shape[axis + 1]
        folded = _folded(index, length) if padding == "reflect" else index.clamp(0, length - 1)
        image = image.index_select(axis + 1, folded)
        if padding == "constant":
            image.index_fill_(axis + 1, torch.nonzero(index != folded)[:, 0], outside)
    dims = [axis + 1 for axis, flip in enumerate(flips or ()) if flip]
    if dims:
        return image.flip(dims).contiguous()
    return image.contiguous() if padded else image.clone(memory_format=torch.contiguous_format)


def check_padding(padding: str) -> None:
    """Check that a padding is one of `PADDINGS`.

    Raises:
        RequestError: Unknown padding.
    """
    if padding not in PADDINGS:
        raise RequestError(f"invalid padding={padding!r}; choose one of {', '.join(map(repr, PADDINGS))}.")


def _axis(places: torch.Tensor, origin: int, length: int, padding: str) -> _Axis:
    least, most = _range(places, origin)
    if padding != "constant" and (least < 0 or most > length - 1):
        if padding == "border":
            places = places.clamp(-origin, length - 1 - origin)
        else:
            places = _folded(places + origin, length) - origin
        least, most = _range(places, origin)
    low = min(max(math.floor(least), 0), length - 1)
    high = min(max(math.floor(most) + 1, low), length - 1)
    return _Axis(places, origin - low, low, high - low + 1)


def _range(places: torch.Tensor, origin: int) -> tuple[float, float]:
    least, most = torch.aminmax(places)
    return float(least) + origin, float(most) + origin


def _folded(places: torch.Tensor, length: int) -> torch.Tensor:
    """Reflect positions at the first and the last voxel, repeatedly if needed."""
    last = length - 1
    if not last:
        return torch.zeros_like(places)
    return last - (torch.remainder(places, 2 * last) - last).abs()
