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
    """Run an unpadded ("valid") network over images of any size, tile by tile, with a mirrored border.

    Tiles do not blend: each voxel is predicted once, from its full context, and where a tile reaches over the image's
    border it sees the image mirrored (the voxel at the border is not repeated; an image shorter than the margin is
    mirrored again and again). Any tile size gives the same logits up to rounding, unless the network has a
    normalization that looks at the tile, such as instance normalization.

    Besides the image and the logits, memory holds one batch of tiles and what the network needs for it.

    Args:
        tile_size: size of what the network reads, in voxels, one number or one per axis (572 in the paper's figure,
            for 388 voxels of result). On an axis where the image is shorter than a tile's result the tile shrinks to
            what the image needs.
        sw_batch_size: tiles per forward pass; they may come from several images of a batch.
        step: from tile to tile. "aligned" is the largest multiple of the network's total stride within a tile's
            result (384 of 388), and the few voxels that two tiles share are the same in both. "tile" is the whole
            result: no voxel is computed twice, but max-pooling meets the voxels of each tile in another phase, so
            logits depend on the tile size.
        margin: voxels that the network takes off each side, one number or one per axis. Read from the network's
            `valid_sizes` by default; only for networks that do not have them, together with `stride`.
        stride: total stride of the network, one number or one per axis.
        sw_device: where the network is; by default where the image is.
        device: where the logits are gathered; by default where the image is.

    Attributes:
        on_progress: called with (tiles done, tiles in all) of the current batch of images after each forward pass.

    Raises:
        RequestError: options that contradict each other or are not known.
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
            raise RequestError(f"sw_batch_size={sw_batch_size} must be 1 or more.")
        if (margin is None) != (stride is None):
            raise RequestError(f"margin={margin} and stride={stride} belong together: give both, or neither.")
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
            RequestError: the network is padded, or does not say what it takes off.
            SizeError: the network cannot use the tile size (names the nearest that it can), or gives another size
                than it promises.
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
            raise SizeError(f"an image of shape {tuple(inputs.shape)} has no voxel to predict.")
        return with_metadata(logits, inputs)

    def _tiling(self, image: Sequence[int], network: Callable[..., Tensor]) -> _Tiling:
        """Lay tiles over an image of this spatial size."""
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
        """Return where, along one axis of the image, the results of the tiles start."""
        result = tile - 2 * margin
        step = result if self.step == "tile" else result - result % stride
        if result < 1:
            raise SizeError(
                f"tile_size {tile} on axis {axis} leaves no result: the network takes {margin} voxels off each side. "
                f"Use {2 * margin + stride} or more."
            )
        if size <= result:
            return range(min(size, 1))
        if step == 0:
            raise SizeError(
                f"tile_size {tile} on axis {axis} gives {result} voxels of result, fewer than the total stride of "
                f"the network ({stride}), so tiles cannot follow each other in step with its pooling. "
                f'Use {tile + stride} or more, or step="tile".'
            )
        return range(0, size - result + step, step)


@dataclass(frozen=True)
class _Tiling:
    """Where tiles lie.

    Attributes:
        image: spatial size of the image.
        tile: size of a tile that the network reads.
        margin: voxels that it takes off each side.
        starts: per axis, where results start in the image.
    """

    image: tuple[int, ...]
    tile: tuple[int, ...]
    margin: tuple[int, ...]
    starts: tuple[range, ...]

    def check(self, shape: Sequence[int], tiles: int) -> None:
        """Refuse a result of another size than the network promised."""
        expected = tuple(size - 2 * lost for size, lost in zip(self.tile, self.margin, strict=True))
        if len(shape) != len(expected) + 2 or shape[0] != tiles or tuple(shape[2:]) != expected:
            raise SizeError(
                f"{tiles} tile(s) of {by(self.tile)} with a margin of {by(self.margin)} should become {tiles} "
                f"result(s) of {by(expected)}, and the network gave a tensor of shape {tuple(shape)}. The margin must "
                "be what the network takes off each side; for padded networks use SlidingWindowInferer."
            )


def _sizes_of(network: Callable[..., Tensor], dims: int) -> ValidSizes:
    sizes = getattr(network, "valid_sizes", None)
    if not isinstance(sizes, ValidSizes):
        raise RequestError(
            f"OverlapTileInferer is for unpadded networks; this {type(network).__name__} is padded, or has no "
            "`valid_sizes` to say what it takes off. Use SlidingWindowInferer for a padded one; give margin and "
            "stride for an unpadded one."
        )
    if len(sizes.step) != dims:
        raise SizeError(f"the network is {len(sizes.step)}D, and the image has {dims} spatial axes.")
    return sizes


def _check_tile(tile: Sequence[int], sizes: ValidSizes) -> None:
    near = sizes.nearest(tile)
    if faults := [
        f"{size} on axis {axis} (use {' or '.join(f'{n}, which gives {n - lost}' for n in legal)})"
        for axis, (size, legal, lost) in enumerate(zip(tile, near, sizes.shrink, strict=True))
        if size not in legal
    ]:
        raise SizeError(f"tile_size {by(tile)} does not fit the pooling of this network: {', '.join(faults)}.")


def _covering(image: Sequence[int], sizes: ValidSizes) -> list[int]:
    """Return per axis the smallest legal tile whose result is as long as the image."""
    return [
        least + step * max(-((least - lost - size) // step), 0)
        for size, least, lost, step in zip(image, sizes.smallest, sizes.shrink, sizes.step, strict=True)
    ]


def _cut(image: Tensor, start: Sequence[int], margin: Sequence[int], out: Tensor) -> None:
    """Copy the tile whose result starts at `start` from the image `(C, *spatial)`, mirrored beyond its border."""
    mirrored: list[tuple[int, Tensor]] = []
    for axis, (first, lost, length) in enumerate(zip(start, margin, out.shape[1:], strict=True), start=1):
        low, high = first - lost, first - lost + length
        if low < 0 or high > image.shape[axis]:
            index = _reflected(low, high, image.shape[axis])
            low, high = int(index.min()), int(index.max()) + 1
            mirrored.append((axis, index - low))
        image = image.narrow(axis, low, high - low)
    # Only now, so that no more is copied than the tile needs.
    for axis, index in mirrored:
        image = image.index_select(axis, index.to(image.device))
    out.copy_(image)


def _reflected(low: int, high: int, size: int) -> Tensor:
    """Return indices into an axis of `size` voxels for the places low .. high - 1, mirrored as often as needed."""
    if size == 1:
        return torch.zeros(high - low, dtype=torch.long)
    period = 2 * (size - 1)
    index = torch.arange(low, high).remainder(period)
    return torch.minimum(index, period - index)


def _paste(tile: Tensor, start: Sequence[int], logits: Tensor) -> None:
    """Copy a result into the logits `(K, *spatial)`, cut off at the image's end."""
    for axis, first in enumerate(start, start=1):
        length = min(tile.shape[axis], logits.shape[axis] - first)
        tile, logits = tile.narrow(axis, 0, length), logits.narrow(axis, first, length)
    logits.copy_(tile)


def _per_axis(option: str, value: Sequence[int] | int, dims: int) -> tuple[int, ...]:
    given = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(given) != dims or min(given, default=0) < (option != "margin"):
        raise SizeError(f"{option}={value} does not fit {dims} spatial axes: give one number, or {dims} of them.")
    return given
