"""Elastic deformation on a coarse grid, as in the training of the U-Net (arXiv 1505.04597, section 3.1)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from torch.nn import functional as F

from medseg.errors import RequestError
from medseg.transforms.sampling import Sampler
from medseg.transforms.tensors import one_shape, plain_tensor, with_metadata
from medseg.transforms.traits import Traits

__all__ = ["RandElasticd", "check_elastic", "dense_field", "draw_control"]

# Voxels per block, small enough for the CPU cache.
_BLOCK = 1 << 19


class RandElasticd(RandomizableTransform, MapTransform):  # type: ignore[misc]  # MONAI publishes no types
    """Random elastic deformation by displacements of the nodes of a coarse grid.

    Nodes are spaced evenly from the first to the last voxel of each axis. Their displacements are drawn from a normal
    distribution per axis and interpolated to a dense field, bicubic with aligned corners (separably in 3D). Images are
    interpolated linearly, labels by nearest neighbor, with reflection at the image border. All keys share one field.

    Args:
        keys: Keys of images and labels `(C, *spatial)` of the same shape, in 2D or 3D.
        grid: Number of nodes along each axis, one number or one per axis, at least 2.
        sigma: Standard deviation of the displacements in voxels, one number or one per axis.
        prob: Probability of a deformation.
        label_keys: Keys among `keys` that are labels.
        allow_missing_keys: Whether to skip keys missing in a case.

    Raises:
        RequestError: Fewer than 2 nodes, a negative deviation, or a number of values that does not match the axes.
        CaseError: Different shapes within a case.
    """

    traits = Traits("unmapped")

    def __init__(
        self,
        keys: KeysCollection,
        grid: int | Sequence[int] = 3,
        sigma: float | Sequence[float] = 10.0,
        prob: float = 1.0,
        *,
        label_keys: Sequence[str] = ("label",),
        allow_missing_keys: bool = False,
    ) -> None:
        RandomizableTransform.__init__(self, prob)
        MapTransform.__init__(self, keys, allow_missing_keys)
        check_elastic(grid, sigma)
        self.grid = grid
        self.sigma = sigma
        self.label_keys = (label_keys,) if isinstance(label_keys, str) else tuple(label_keys)
        self.control: torch.Tensor | None = None

    def randomize(self, spatial_dims: int) -> None:
        """Draw whether to deform, and the displacements `control` of the nodes `(spatial_dims, *grid)`, in voxels."""
        super().randomize(None)
        self.control = draw_control(self.R, spatial_dims, self.grid, self.sigma) if self._do_transform else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with deformed images (float32) and labels (unchanged type), with unchanged metadata."""
        case = dict(data)
        images = {key: plain_tensor(case[key]) for key in self.key_iterator(case)}
        if not images:
            return case
        shape = one_shape(images)
        self.randomize(len(shape))
        warped = images if self.control is None else self._warped(images, shape, self.control)
        for key, image in warped.items():
            case[key] = with_metadata(image if key in self.label_keys else image.float(), case[key])
        return case

    def _warped(
        self, images: dict[Hashable, torch.Tensor], shape: tuple[int, ...], control: torch.Tensor
    ) -> dict[Hashable, torch.Tensor]:
        types = {key: image.dtype if key in self.label_keys else torch.float32 for key, image in images.items()}
        warped = {key: torch.empty(image.shape, dtype=types[key]) for key, image in images.items()}
        step = max(1, _BLOCK * shape[0] // int(np.prod(shape)))
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            sampler = _block_sampler(control, shape, first, count)
            for key, image in images.items():
                sample = sampler.nearest if key in self.label_keys else sampler.linear
                warped[key].narrow(1, first, count).copy_(sample(image))
        return warped


def dense_field(
    control: torch.Tensor, size: Sequence[int], *, first: int = 0, count: int | None = None
) -> torch.Tensor:
    """Interpolate displacements from a coarse grid to all voxels, bicubic with aligned corners.

    Args:
        control: Displacements `(C, *grid)`, at least 2 nodes along each axis.
        size: Number of voxels along each axis.
        first: First plane of the first axis to return.
        count: Number of planes to return; by default all from `first` on.

    Returns:
        Dense field `(C, count, *size[1:])`, float32.
    """
    field = control.float()
    for axis, voxels in enumerate(size):
        weights = _cubic_weights(control.shape[axis + 1], voxels)
        if axis == 0:
            weights = weights[first:] if count is None else weights[first : first + count]
        # tensordot moves the interpolated axis to the end, so each axis is first in turn.
        field = torch.tensordot(field, weights, dims=([1], [1]))
    return field


def check_elastic(grid: int | Sequence[int], sigma: float | Sequence[float]) -> None:
    """Check the settings of a deformation.

    Raises:
        RequestError: Fewer than 2 nodes along an axis, or a negative deviation.
    """
    if np.min(grid) < 2:
        raise RequestError(f"grid={grid!r}: expected at least 2 nodes along each axis (3 in the paper).")
    if not np.min(sigma) >= 0:
        raise RequestError(f"sigma={sigma!r}: expected a standard deviation of at least 0 voxels.")


def draw_control(
    random: np.random.RandomState, dims: int, grid: int | Sequence[int], sigma: float | Sequence[float]
) -> torch.Tensor:
    """Draw displacements `(dims, *grid)` in voxels, float32 (see `RandElasticd`).

    Raises:
        RequestError: A number of values that does not match the axes.
    """
    nodes = (grid,) * dims if isinstance(grid, int) else tuple(grid)
    deviations = np.broadcast_to(np.asarray(sigma, dtype=float), dims) if np.size(sigma) in (1, dims) else None
    if len(nodes) != dims or deviations is None:
        raise RequestError(f"grid={grid!r} and sigma={sigma!r}: expected one number, or {dims} for {dims} axes.")
    drawn = random.normal(size=(dims, *nodes)) * deviations.reshape(-1, *[1] * dims)
    return torch.from_numpy(drawn.astype(np.float32))


def _block_sampler(control: torch.Tensor, shape: tuple[int, ...], first: int, count: int) -> Sampler:
    """Return the sampler of a block of planes along the first axis."""
    size = (count, *shape[1:])
    places = dense_field(control, shape, first=first, count=count)
    for axis, voxels in enumerate(size):
        places[axis] += torch.arange(float(voxels)).reshape(-1, *[1] * (len(size) - 1 - axis))
    return Sampler(list(places), size, shape, origin=(first, *[0] * (len(shape) - 1)), padding="reflect")


@lru_cache(maxsize=64)
def _cubic_weights(nodes: int, voxels: int) -> torch.Tensor:
    """Return the bicubic weights `(voxels, nodes)` of one axis, computed by interpolating unit displacements."""
    alone = torch.eye(nodes)[None, :, :, None]
    return F.interpolate(alone, (voxels, 1), mode="bicubic", align_corners=True)[0, :, :, 0].T
