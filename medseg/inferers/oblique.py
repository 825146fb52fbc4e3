"""Resampling to a native grid that is oblique to the model grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.inferers.grid_mapping import GridMapping
from medseg.inferers.results import Decision, Plane, empty_result, packed

__all__ = ["ObliqueGrid"]

# Native voxels processed at a time, each about a hundred bytes.
_CHUNK = 1 << 20


class ObliqueGrid:
    """Native grid in any orientation: each slab of model planes fills the native voxels within it."""

    def __init__(
        self,
        mapping: GridMapping,
        axis: int,
        classes: int,
        wanted: list[Decision],
        output: str,
        activation: str,
        device: torch.device,
    ) -> None:
        self.mapping = mapping
        self.decisions = wanted
        self.output = output
        self.device = device
        self.models = [axis, *(a for a in range(len(mapping.model_shape)) if a != axis)]
        self.valid_extent = np.array([mapping.valid_extent[a] for a in self.models]).T
        self.size = [mapping.model_shape[a] for a in self.models]
        self.matrix = mapping.matrix[[*self.models, len(self.models)]]
        # The native axis closest to the stream axis, along which the fewest voxels fall into a slab.
        self.line = int(np.abs(self.matrix[0, :-1]).argmax())
        channels = len(wanted) or classes
        self.out = empty_result((channels, *mapping.native_shape), output, classes, activation)

    def fill(self, first: int, planes: list[Plane], pool: ThreadPoolExecutor | None, *, ends: bool) -> None:
        """Fill the native voxels from model plane `first` up to the last of `planes`, and beyond it if `ends`."""
        low = -math.inf if first == 0 else float(first)
        high = math.inf if ends else float(first + len(planes) - 1)
        scores = torch.stack([plane.scores for plane in planes], 1)
        labels = [torch.stack([plane.labels[c] for plane in planes]) for c in range(len(self.decisions))]
        for voxels in self._voxels(low, high):
            self._fill(voxels, first, scores, labels)

    def result(self) -> torch.Tensor:
        """Return the result `(C, *native)`."""
        return self.out

    def _voxels(self, low: float, high: float) -> Iterator[NDArray[np.int64]]:
        """Yield native indices `(n, dims)` of voxels whose position on the stream axis is in `[low, high)`."""
        shape = self.mapping.native_shape
        others = [axis for axis in range(len(shape)) if axis != self.line]
        grid = np.meshgrid(*(np.arange(shape[a]) for a in others), indexing="ij")
        lines = np.stack(grid, -1).reshape(-1, len(others))
        step = self.matrix[0, self.line]
        # Positions beyond the valid extent are clipped to it, so they belong to the slab at its end.
        from_, to = (
            (-math.inf if low <= self.valid_extent[0, 0] else low),
            (math.inf if high > self.valid_extent[1, 0] else high),
        )
        chunk = max(1, _CHUNK // (int(min(shape[self.line], abs((to - from_) / step))) + 3))
        for start in range(0, len(lines), chunk):
            part = lines[start : start + chunk]
            base = part @ self.matrix[0, others] + self.matrix[0, -1]
            ends = np.sort(np.stack([(from_ - base) / step, (to - base) / step]), 0)
            bounds = np.clip(np.array([np.floor(ends[0]), np.ceil(ends[1]) + 1]), 0, shape[self.line]).astype(np.int64)
            counts = bounds[1] - bounds[0]
            offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            voxels = np.empty((len(offsets), len(shape)), dtype=np.int64)
            voxels[:, others] = np.repeat(part, counts, 0)
            voxels[:, self.line] = np.repeat(bounds[0], counts) + offsets
            # Computed identically for every slab, so that each voxel is filled exactly once.
            along = np.clip(voxels @ self.matrix[0, :-1] + self.matrix[0, -1], *self.valid_extent[:, 0])
            yield voxels[(along >= low) & (along < high)]

    def _fill(self, voxels: NDArray[np.int64], first: int, scores: torch.Tensor, labels: list[torch.Tensor]) -> None:
        where = voxels @ self.matrix[:-1, :-1].T + self.matrix[:-1, -1]
        where = np.clip(where, *self.valid_extent)
        last = np.array(self.size) - 1
        border = self.mapping.border
        inside = ((where >= -border) & (where <= last + border)).all(1)
        voxels, where = voxels[inside], np.clip(where[inside], 0, last)
        low = np.floor(where).astype(np.int64)
        fraction = torch.from_numpy((where - low).astype(np.float32).T.copy()).to(self.device)
        high = np.minimum(low + 1, last)
        low[:, 0] -= first
        high[:, 0] = np.minimum(high[:, 0] - first, scores.shape[1] - 1)
        if scores.ndim == 4 and len(self.size) == 2:  # a 2D image: planes of one row
            scores, labels = scores.squeeze(2), [each.squeeze(1) for each in labels]
        corners = [torch.from_numpy(np.stack(c)).to(self.device) for c in product(*zip(low.T, high.T, strict=True))]
        flat = tuple(voxels.T)
        if not self.decisions:
            values = _blend([scores[(slice(None), *corner)] for corner in corners], fraction)
            self.out[(slice(None), *flat)] = packed(values, self.output).cpu()
        for channel, decision in enumerate(self.decisions):
            tops = [labels[channel][tuple(corner)] for corner in corners]
            result = tops[0].clone()
            mixed = torch.stack([top != tops[0] for top in tops]).any(0).nonzero()[:, 0]
            own = scores[decision.classes]
            picked = [own[(slice(None), *corner[:, mixed])] for corner in corners]
            result[mixed] = decision.decide(_blend(picked, fraction[:, mixed])).to(result.dtype)
            self.out[(channel, *flat)] = result.cpu()


def _blend(values: list[torch.Tensor], fraction: torch.Tensor) -> torch.Tensor:
    """Interpolate values `(K, n)` at the corners of cells, in the order of `product`, axis by axis."""
    for weight in fraction.flip(0):
        values = [low.lerp(high, weight) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
