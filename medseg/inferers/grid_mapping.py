"""Mapping between native space and model space: voxel index transform, valid extent and border."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from numpy.typing import NDArray

from medseg.errors import GeometryError, RequestError
from medseg.transforms.traits import traced_effect

__all__ = ["Axis", "GridMapping", "find_grid_mapping"]

# In voxels; far above the rounding errors of headers.
_NEAR = 1e-4


@dataclass(frozen=True)
class GridMapping:
    """Mapping from the native grid of an image to the grid of the network.

    Attributes:
        native_shape: Spatial shape of the input as loaded.
        model_shape: Spatial shape of the network input.
        matrix: Homogeneous transform `(n + 1, n + 1)` from native to model voxel indices.
        affine: Native affine, 4 x 4.
        valid_extent: First and last coordinate of the resampled image on each model axis, before later padding and
            cropping; positions beyond it take the value at the edge.
        border: Distance beyond the model grid, in model voxels, up to which native voxels take the value at the edge;
            farther voxels are background. Infinite unless the image was padded or cropped.
    """

    native_shape: tuple[int, ...]
    model_shape: tuple[int, ...]
    matrix: NDArray[np.float64]
    affine: NDArray[np.float64]
    valid_extent: tuple[tuple[float, float], ...]
    border: float = math.inf

    @classmethod
    def identity(cls, shape: tuple[int, ...]) -> GridMapping:
        """Return the mapping of an image without preprocessing."""
        return cls(shape, shape, np.eye(len(shape) + 1), np.eye(4), _whole(shape))

    def native_axes(self) -> tuple[int, ...] | None:
        """Return the parallel native axis of each model axis, or None if the grids are oblique."""
        scales = self.matrix[:-1, :-1]
        axes = tuple(int(axis) for axis in np.abs(scales).argmax(axis=1))
        rest = np.abs(scales).copy()
        rest[np.arange(len(axes)), axes] = 0
        # A direction error is largest at the far end of the image.
        drift = (rest * (np.array(self.native_shape) - 1)).sum(axis=1)
        return axes if len(set(axes)) == len(axes) and bool((drift < _NEAR * 10).all()) else None

    def along(self, model_axis: int, native_axis: int) -> NDArray[np.float64]:
        """Return the model coordinate of each native index on one axis of axis-aligned grids."""
        indices = np.arange(self.native_shape[native_axis], dtype=np.float64)
        coordinates: NDArray[np.float64] = indices * self.matrix[model_axis, native_axis] + self.matrix[model_axis, -1]
        whole = np.rint(coordinates)
        return np.clip(
            np.where(np.abs(coordinates - whole) < _NEAR, whole, coordinates), *self.valid_extent[model_axis]
        )


def find_grid_mapping(image: MetaTensor) -> GridMapping:
    """Return the mapping between the loaded image and the preprocessed image.

    Args:
        image: Preprocessed image `(C, *spatial)` with `affine`, and `original_affine` and `spatial_shape` in its
            metadata.

    Raises:
        RequestError: Missing metadata, or a transform that cannot be inverted by position (zoom, rotation by an
            arbitrary angle, deformation, or an unknown transform).
        GeometryError: Singular affine.
    """
    operations = _flat(image.applied_operations)
    for operation in operations:
        if traced_effect(operation) in (None, "unmapped"):
            raise RequestError(
                f"the result cannot be mapped back through '{operation.get('class', '')}', which may be a non-affine "
                "transform: set output to 'logits' and invert the preprocessing with Invertd afterwards, or remove the "
                "transform"
            )
    model_shape = tuple(int(size) for size in image.shape[1:])
    dims = len(model_shape)
    if "spatial_shape" not in image.meta or "original_affine" not in image.meta:
        raise RequestError(
            "the image has no native geometry ('spatial_shape' and 'original_affine' missing in its metadata): load it "
            "with LoadCased or LoadImaged"
        )
    native_shape = _native_shape(image.meta["spatial_shape"], dims)
    native = np.asarray(torch.as_tensor(image.meta["original_affine"]).cpu(), dtype=np.float64)
    model = np.asarray(image.affine.cpu(), dtype=np.float64)
    try:
        matrix = np.linalg.solve(to_affine_nd(dims, model), to_affine_nd(dims, native))
    except np.linalg.LinAlgError as error:
        raise GeometryError(f"Singular affine of the preprocessed image: {model.tolist()}.") from error
    return GridMapping(
        native_shape, model_shape, matrix, native, _valid_extent(operations, model_shape), _border(operations)
    )


def _native_shape(noted: Sequence[int] | torch.Tensor | NDArray[np.int64], dims: int) -> tuple[int, ...]:
    shape = tuple(int(size) for size in np.asarray(torch.as_tensor(noted).cpu()).ravel())
    if len(shape) < dims or math.prod(shape[dims:]) != 1:
        raise RequestError(f"dimension mismatch: the image has shape {shape}, the network is {dims}D")
    return shape[:dims]


def _flat(operations: Sequence[Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for operation in operations or []:
        found.extend(_flat(operation) if isinstance(operation, list) else [dict(operation)])
    return found


def _whole(shape: Sequence[int]) -> tuple[tuple[float, float], ...]:
    return tuple((0.0, size - 1.0) for size in shape)


def _valid_extent(operations: Sequence[Any], shape: tuple[int, ...]) -> tuple[tuple[float, float], ...]:
    """Return the extent of the resampled image on the final grid, which may be padded or cropped."""
    low, size = np.zeros(len(shape)), np.array(shape)
    for step in reversed(operations):
        if traced_effect(step) != "cut":
            break
        info = step["extra_info"]
        if "padded" in info:
            low += [before for before, _ in info["padded"][-len(shape) :]]
        if "cropped" in info:
            low -= info["cropped"][::2]
            inner = info.get("pad_info", {}).get("extra_info", {}).get("padded", ())
            low += [before for before, _ in inner[-len(shape) :]] or 0
        size = np.array(step["orig_size"])
    else:
        return tuple((-math.inf, math.inf) for _ in shape)
    return tuple((float(a), float(a + n - 1)) for a, n in zip(low, size, strict=True))


def _border(operations: Sequence[Mapping[str, Any]]) -> float:
    """Return the border, which reproduces zero padding by the inverse transforms."""
    effects = [traced_effect(operation) for operation in operations]
    if "cut" not in effects:
        return math.inf
    # Padding before resampling ends at a voxel boundary; after it, values fade over one model voxel.
    return 1 - _NEAR if "resampled" in effects[: effects.index("cut")] else 0.5 + _NEAR


@dataclass(frozen=True)
class Axis:
    """Interpolation indices and weights of the `n` native indices of one axis.

    Attributes:
        low: Model plane at or before each native index, `(n,)`.
        high: Model plane after it, `(n,)`; repeats the last plane at the end of the grid.
        fraction: Interpolation weight of `high`, in [0, 1), float32.
        valid: Mask of the native indices inside the extent and its border; the others are background.
        exact: Whether all fractions are 0, so that no interpolation is needed.
        all_valid: Whether all indices are valid.
    """

    low: torch.Tensor
    high: torch.Tensor
    fraction: torch.Tensor
    valid: torch.Tensor
    exact: bool = field(init=False)
    all_valid: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exact", not bool(self.fraction.any()))
        object.__setattr__(self, "all_valid", bool(self.valid.all()))

    def __len__(self) -> int:
        """Return the number of native indices."""
        return len(self.low)

    @classmethod
    def of(cls, mapping: GridMapping, model_axis: int, native_axis: int) -> Axis:
        """Return the interpolation of one axis of axis-aligned grids."""
        last = mapping.model_shape[model_axis] - 1
        where = mapping.along(model_axis, native_axis)
        valid = (where >= -mapping.border) & (where <= last + mapping.border)
        inside = np.clip(where, 0, last)
        low = np.floor(inside).astype(np.int64)
        fraction = torch.from_numpy((inside - low).astype(np.float32))
        return cls(
            torch.from_numpy(low), torch.from_numpy(np.minimum(low + 1, last)), fraction, torch.from_numpy(valid)
        )

    @classmethod
    def single(cls) -> Axis:
        """Return a singleton axis for 2D images."""
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(zero, zero, torch.zeros(1), torch.ones(1, dtype=torch.bool))

    def to(self, device: torch.device) -> Axis:
        """Return a copy on a device."""
        return Axis(*(each.to(device) for each in (self.low, self.high, self.fraction, self.valid)))

    def indices_above(self, plane: int) -> list[tuple[int, float]]:
        """Return the valid native indices in [plane, plane + 1), with their fractions."""
        found = torch.nonzero((self.low == plane) & self.valid)[:, 0].tolist()
        return [(index, float(self.fraction[index])) for index in found]
