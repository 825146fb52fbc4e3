"""How the voxels of an input lie on the model's grid."""

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

# Of a voxel; rounded headers stay far below.
_NEAR = 1e-4


@dataclass(frozen=True)
class GridMapping:
    """The native grid of an image, seen from the grid that the network works on.

    Attributes:
        native_shape: spatial shape of the input as it was loaded.
        model_shape: spatial shape of what the network saw.
        matrix: `(n + 1, n + 1)`, from native to model voxel indices.
        affine: the native affine, 4 x 4.
        rim: for each model axis the first and last coordinate of the resampled image, without later padding and with
            what was cropped; positions beyond it take the value there, as resampling has no others.
        reach: how many model voxels beyond its rim the model's grid still speaks for native voxels; farther ones are
            background. Infinite unless a step cut the image.
    """

    native_shape: tuple[int, ...]
    model_shape: tuple[int, ...]
    matrix: NDArray[np.float64]
    affine: NDArray[np.float64]
    valid_extent: tuple[tuple[float, float], ...]
    border: float = math.inf

    @classmethod
    def identity(cls, shape: tuple[int, ...]) -> GridMapping:
        """Return the placement of an image that the network sees as it is."""
        return cls(shape, shape, np.eye(len(shape) + 1), np.eye(4), _whole(shape))

    def native_axes(self) -> tuple[int, ...] | None:
        """Return for each model axis the native axis that runs along it, or None if the grids are oblique."""
        scales = self.matrix[:-1, :-1]
        axes = tuple(int(axis) for axis in np.abs(scales).argmax(axis=1))
        rest = np.abs(scales).copy()
        rest[np.arange(len(axes)), axes] = 0
        # an error of the direction counts at the far end of the image
        drift = (rest * (np.array(self.native_shape) - 1)).sum(axis=1)
        return axes if len(set(axes)) == len(axes) and bool((drift < _NEAR * 10).all()) else None

    def along(self, model_axis: int, native_axis: int) -> NDArray[np.float64]:
        """Return the model coordinate of each native index on one axis of a grid that is not oblique."""
        indices = np.arange(self.native_shape[native_axis], dtype=np.float64)
        coordinates: NDArray[np.float64] = indices * self.matrix[model_axis, native_axis] + self.matrix[model_axis, -1]
        whole = np.rint(coordinates)
        return np.clip(
            np.where(np.abs(coordinates - whole) < _NEAR, whole, coordinates), *self.valid_extent[model_axis]
        )


def find_grid_mapping(image: MetaTensor) -> GridMapping:
    """Return how the loaded image lies on the grid of the preprocessed one.

    Args:
        image: `(C, *spatial)` after the preprocessing, with `affine` and the `original_affine` and `spatial_shape` that
            the loader noted.

    Raises:
        RequestError: the metadata are missing, or a step cannot be undone by position (a zoom, a rotation by any
            angle, a deformation, one that medseg does not know).
        GeometryError: the affines cannot be inverted.
    """
    operations = _flat(image.applied_operations)
    for operation in operations:
        if traced_effect(operation) in (None, "unmapped"):
            raise RequestError(
                f"the result cannot be restored through '{operation.get('class', '')}', which may move voxels in other "
                "ways than an affine map: set output to 'logits' and invert the preprocessing with Invertd afterwards, "
                "or leave the step out"
            )
    model_shape = tuple(int(size) for size in image.shape[1:])
    dims = len(model_shape)
    if "spatial_shape" not in image.meta or "original_affine" not in image.meta:
        raise RequestError(
            "the image does not say on which grid it was loaded (no 'spatial_shape' and 'original_affine' in its "
            "metadata): load it with LoadCased or LoadImaged"
        )
    native_shape = _native_shape(image.meta["spatial_shape"], dims)
    native = np.asarray(torch.as_tensor(image.meta["original_affine"]).cpu(), dtype=np.float64)
    model = np.asarray(image.affine.cpu(), dtype=np.float64)
    try:
        matrix = np.linalg.solve(to_affine_nd(dims, model), to_affine_nd(dims, native))
    except np.linalg.LinAlgError as error:
        raise GeometryError(f"The affine of the model's grid cannot be inverted: {model.tolist()}.") from error
    return GridMapping(
        native_shape, model_shape, matrix, native, _valid_extent(operations, model_shape), _border(operations)
    )


def _native_shape(noted: Sequence[int] | torch.Tensor | NDArray[np.int64], dims: int) -> tuple[int, ...]:
    shape = tuple(int(size) for size in np.asarray(torch.as_tensor(noted).cpu()).ravel())
    if len(shape) < dims or math.prod(shape[dims:]) != 1:
        raise RequestError(f"the image was loaded with the shape {shape}, and the network works in {dims}D")
    return shape[:dims]


def _flat(operations: Sequence[Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for operation in operations or []:
        found.extend(_flat(operation) if isinstance(operation, list) else [dict(operation)])
    return found


def _whole(shape: Sequence[int]) -> tuple[tuple[float, float], ...]:
    return tuple((0.0, size - 1.0) for size in shape)


def _valid_extent(operations: Sequence[Any], shape: tuple[int, ...]) -> tuple[tuple[float, float], ...]:
    """Return where the resampled image begins and ends on the final grid, which may have been padded or cropped."""
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
    """Return how far beyond the model's grid values count, as zero padding in the inverse steps would have it."""
    effects = [traced_effect(operation) for operation in operations]
    if "cut" not in effects:
        return math.inf
    # before the resampling the rim is exact up to its rounding; after it, values fade over one model voxel
    return 1 - _NEAR if "resampled" in effects[: effects.index("cut")] else 0.5 + _NEAR


@dataclass(frozen=True)
class Axis:
    """Where the `n` native indices of an axis lie between the model's planes.

    Attributes:
        low: the plane at or before each index, `(n,)`.
        high: the plane after it; at the end of the grid the last one again.
        fraction: how far each index is from `low` to `high`, 0 to below 1, float32.
        valid: false where the model says nothing of an index, which is background then.
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
        """Return the axis of a grid that is not oblique."""
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
        """Return the axis that a 2D image lacks."""
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(zero, zero, torch.zeros(1), torch.ones(1, dtype=torch.bool))

    def to(self, device: torch.device) -> Axis:
        """Return the axis on a device."""
        return Axis(*(each.to(device) for each in (self.low, self.high, self.fraction, self.valid)))

    def indices_above(self, plane: int) -> list[tuple[int, float]]:
        """Return the valid native indices from this model plane to before the next, with their fractions."""
        found = torch.nonzero((self.low == plane) & self.valid)[:, 0].tolist()
        return [(index, float(self.fraction[index])) for index in found]
