"""Overlap-tile inference for unpadded networks (Ronneberger, Fischer, Brox; MICCAI 2015, figure 2)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product
from math import prod
from typing import TYPE_CHECKING, Any

import monai.inferers
import torch

from medseg.errors import RequestError, SizeError, by
from medseg.inferers.results import plain, with_metadata
from medseg.networks.options import check_choice
from medseg.networks.sizes import ValidSizes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["OverlapTileInferer"]


class OverlapTileInferer(monai.inferers.Inferer):  # type: ignore[misc]
    """Run an unpadded ("valid") network on images of any size, tile by tile, with mirrored borders.

    Tiles are not blended: each voxel is predicted once, from its full context. Beyond the border of the image, tiles
    are filled by reflection (repeatedly, if the image is shorter than the margin). The logits do not depend on the tile
    size, up to rounding, unless the network normalizes over the tile, as instance norm does.

    Besides the image and the logits, memory holds one batch of tiles and the network's activations for it.

    Args:
        tile_size: Size of the network input in voxels, one number or one per axis (572 in the figure of the paper, with
            an output of 388). On axes where the image is shorter than the output of a tile, the tile is reduced.
        sw_batch_size: Tiles per forward pass, possibly from several images of a batch.
        step: Step between tiles. "aligned" is the largest multiple of the total stride of the network within the output
            of a tile (384 of 388); the voxels that two tiles share are then equal. "tile" is the full output size: no
            voxel is computed twice, but max-pooling is not aligned between tiles, so logits depend on the tile size.
        margin: Voxels lost on each side, one number or one per axis. By default `valid_sizes` of the network is used;
            set `margin` and `stride` only for networks without it.
        stride: Total stride of the network, one number or one per axis.
        sw_device: Device of the network; by default that of the image.
        device: Device of the returned logits; by default that of the image.

    Attributes:
        on_progress: Callback after each forward pass, called with (tiles done, total tiles) of the batch of images.

    Raises:
        RequestError: Unknown or contradictory options.
    """

    on_progress: Callable[[int, int], None] | None = None

    def __init__(
        self,
        tile_size: Sequence[int] | int,
        sw_batch_size: int = 1,
        *,
        step: str = "aligned",
        margin: Sequence[int] | int | None = None,
        stride: Sequence[int] | int | None = None,
        sw_device: torch.device | str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("step", step, ("aligned", "tile"))
        if sw_batch_size < 1:
            raise RequestError(f"sw_batch_size={sw_batch_size}: expected at least 1.")
        if (margin is None) != (stride is None):
            raise RequestError(f"margin={margin} and stride={stride}: set both or neither.")
        self.tile_size = tile_size
        self.sw_batch_size = sw_batch_size
        self.step = step
        self.margin = margin
        self.stride = stride
        self.sw_device = sw_device
        self.device = device

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return logits `(B, K, *spatial)` for an image `(B, C, *spatial)`.

        Raises:
            RequestError: Padded network, or an unknown margin.
            SizeError: Invalid tile size (the message names the nearest valid sizes), or an unexpected output size.
        """
        image = plain(inputs)
        tiling = self._tiling(image.shape[2:], network)
        batch = image.new_empty((self.sw_batch_size, image.shape[1], *tiling.tile), device=self.sw_device)
        total = len(image) * prod(map(len, tiling.starts))
        places = product(range(len(image)), *tiling.starts)
        logits = None
        done = 0
        while chosen := list(islice(places, self.sw_batch_size)):
            for tile, (number, *start) in zip(batch, chosen, strict=False):
                _cut(image[number], start, tiling.margin, tile)
            result = plain(network(batch[: len(chosen)], *args, **kwargs))
            tiling.check(result.shape, len(chosen))
            if logits is None:
                shape = (len(image), result.shape[1], *tiling.image)
                logits = result.new_empty(shape, device=self.device or image.device)
            for tile, (number, *start) in zip(result, chosen, strict=True):
                _paste(tile, start, logits[number])
            done += len(chosen)
            if self.on_progress is not None:
                self.on_progress(done, total)
        if logits is None:
            raise SizeError(f"empty image of shape {tuple(inputs.shape)}.")
        return with_metadata(logits, inputs)

    def _tiling(self, image: Sequence[int], network: Callable[..., Tensor]) -> _Tiling:
        """Return the tiles for an image of this spatial size."""
        dims = len(image)
        tile = _per_axis("tile_size", self.tile_size, dims)
        if self.margin is not None and self.stride is not None:
            margin = _per_axis("margin", self.margin, dims)
            stride = _per_axis("stride", self.stride, dims)
        else:
            sizes = _sizes_of(network, dims)
            margin, stride = tuple(lost // 2 for lost in sizes.shrink), sizes.step
            _check_tile(tile, sizes)
            tile = tuple(map(min, tile, _covering(image, sizes)))
        starts = [
            self._starts(axis, *sizes) for axis, sizes in enumerate(zip(image, tile, margin, stride, strict=True))
        ]
        return _Tiling(tuple(image), tile, margin, tuple(starts))

    def _starts(self, axis: int, size: int, tile: int, margin: int, stride: int) -> range:
        """Return the start of the output of each tile along one axis of the image."""
        result = tile - 2 * margin
        step = result if self.step == "tile" else result - result % stride
        if result < 1:
            raise SizeError(
                f"tile_size {tile} on axis {axis} is too small: the network removes {margin} voxels on each side. "
                f"Use {2 * margin + stride} or more."
            )
        if size <= result:
            return range(min(size, 1))
        if step == 0:
            raise SizeError(
                f"tile_size {tile} on axis {axis} has an output of {result} voxels, less than the total stride of "
                f"the network ({stride}), so tiles cannot be aligned with its pooling. "
                f'Use {tile + stride} or more, or step="tile".'
            )
        return range(0, size - result + step, step)


@dataclass(frozen=True)
class _Tiling:
    """Positions of the tiles.

    Attributes:
        image: Spatial size of the image.
        tile: Input size of a tile.
        margin: Voxels lost on each side.
        starts: Start of the outputs of the tiles in the image, per axis.
    """

    image: tuple[int, ...]
    tile: tuple[int, ...]
    margin: tuple[int, ...]
    starts: tuple[range, ...]

    def check(self, shape: Sequence[int], tiles: int) -> None:
        """Check the output size of the network."""
        expected = tuple(size - 2 * lost for size, lost in zip(self.tile, self.margin, strict=True))
        if len(shape) != len(expected) + 2 or shape[0] != tiles or tuple(shape[2:]) != expected:
            raise SizeError(
                f"unexpected output size: {tiles} tile(s) of {by(self.tile)} with a margin of {by(self.margin)} should "
                f"give {tiles} output(s) of {by(expected)}, found a tensor of shape {tuple(shape)}. Set margin to the "
                "voxels that the network loses on each side; for padded networks use SlidingWindowInferer."
            )


def _sizes_of(network: Callable[..., Tensor], dims: int) -> ValidSizes:
    sizes = getattr(network, "valid_sizes", None)
    if not isinstance(sizes, ValidSizes):
        raise RequestError(
            f"OverlapTileInferer requires an unpadded network; this {type(network).__name__} is padded or has no "
            "`valid_sizes`. For a padded network use SlidingWindowInferer; for an unpadded one set margin and stride."
        )
    if len(sizes.step) != dims:
        raise SizeError(f"dimension mismatch: the network is {len(sizes.step)}D, the image has {dims} spatial axes.")
    return sizes


def _check_tile(tile: Sequence[int], sizes: ValidSizes) -> None:
    near = sizes.nearest(tile)
    if faults := [
        f"{size} on axis {axis} (use {' or '.join(f'{n} with output {n - lost}' for n in legal)})"
        for axis, (size, legal, lost) in enumerate(zip(tile, near, sizes.shrink, strict=True))
        if size not in legal
    ]:
        raise SizeError(f"tile_size {by(tile)} does not match the pooling of this network: {', '.join(faults)}.")


def _covering(image: Sequence[int], sizes: ValidSizes) -> list[int]:
    """Return the smallest valid tile per axis whose output covers the image."""
    return [
        least + step * max(-((least - lost - size) // step), 0)
        for size, least, lost, step in zip(image, sizes.smallest, sizes.shrink, sizes.step, strict=True)
    ]


def _cut(image: Tensor, start: Sequence[int], margin: Sequence[int], out: Tensor) -> None:
    """Copy the tile whose output starts at `start` from the image `(C, *spatial)`, mirrored beyond its border."""
    mirrored: list[tuple[int, Tensor]] = []
    for axis, (first, lost, length) in enumerate(zip(start, margin, out.shape[1:], strict=True), start=1):
        low, high = first - lost, first - lost + length
        if low < 0 or high > image.shape[axis]:
            index = _reflected(low, high, image.shape[axis])
            low, high = int(index.min()), int(index.max()) + 1
            mirrored.append((axis, index - low))
        image = image.narrow(axis, low, high - low)
    # Index after cropping, so that only the tile is copied.
    for axis, index in mirrored:
        image = image.index_select(axis, index.to(image.device))
    out.copy_(image)


def _reflected(low: int, high: int, size: int) -> Tensor:
    """Return indices into an axis of `size` voxels for low .. high - 1, with repeated reflection."""
    if size == 1:
        return torch.zeros(high - low, dtype=torch.long)
    period = 2 * (size - 1)
    index = torch.arange(low, high).remainder(period)
    return torch.minimum(index, period - index)


def _paste(tile: Tensor, start: Sequence[int], logits: Tensor) -> None:
    """Copy the output of a tile into the logits `(K, *spatial)`, cropped at the end of the image."""
    for axis, first in enumerate(start, start=1):
        length = min(tile.shape[axis], logits.shape[axis] - first)
        tile, logits = tile.narrow(axis, 0, length), logits.narrow(axis, first, length)
    logits.copy_(tile)


def _per_axis(option: str, value: Sequence[int] | int, dims: int) -> tuple[int, ...]:
    given = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(given) != dims or min(given, default=0) < (option != "margin"):
        raise SizeError(f"invalid {option}={value}; expected one number, or {dims} for {dims} spatial axes.")
    return given
