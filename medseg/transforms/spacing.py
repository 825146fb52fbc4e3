"""Fast resampling to the voxel spacing of a model, axis by axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import Spacingd, SpatialResample
from monai.transforms.inverse import TraceableTransform
from numpy.typing import NDArray

from medseg.errors import GeometryError, by
from medseg.io.geometry import MAX_VOXELS
from medseg.transforms.traits import Traits

__all__ = ["SeparableResample", "SeparableSpacingd"]

# In voxels, at the far end of an axis.
_NEAR = 1e-4
# Tolerance below which MONAI treats two affines as equal.
_MONAI_NEAR = 1e-3


class SeparableSpacingd(Spacingd):  # type: ignore[misc]  # MONAI publishes no types
    """MONAI's `Spacingd` for images, several times faster and without copies of the whole volume.

    If the axes keep their direction, linear interpolation runs separably along each axis, plane by plane in float32,
    with positions in float64. The image may have any numeric type, so a CT can stay int16 until here. The result equals
    that of `Spacingd` in float64 up to rounding, and is inverted in the same way.

    Args:
        keys: Keys of the images.
        pixdim: Voxel spacing in mm along each axis.
        diagonal: Whether to resample to a diagonal affine (world axes), which is done by MONAI.
        allow_missing_keys: Whether to skip keys missing in a case.

    Raises:
        GeometryError: Result of more than 2^31 voxels.
    """

    traits = Traits("resampled")

    def __init__(
        self,
        keys: KeysCollection,
        pixdim: Sequence[float] | float,
        diagonal: bool = False,
        *,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys,
            pixdim,
            diagonal,
            mode="bilinear",
            padding_mode="border",
            dtype=np.float32,
            allow_missing_keys=allow_missing_keys,
        )
        self.spacing_transform.sp_resample = SeparableResample(
            mode="bilinear", padding_mode="border", align_corners=False, dtype=np.float32
        )


class SeparableResample(SpatialResample):  # type: ignore[misc]
    """MONAI's `SpatialResample` with separable linear interpolation; other cases are passed to MONAI."""

    traits = Traits("resampled")

    def get_transform_info(self) -> dict[str, Any]:
        """Return the entry of `applied_operations`, with the effect on the grid."""
        return {**super().get_transform_info(), "grid": self.traits.grid}

    def __call__(self, img: torch.Tensor, dst_affine: Any = None, spatial_size: Any = None, **options: Any) -> Any:
        """Return the resampled image `(C, *spatial)`, float32; arguments as for `SpatialResample`."""
        lazy = options.get("lazy") or (isinstance(img, MetaTensor) and img.pending_operations)
        modes = (options.get("mode") or self.mode, options.get("padding_mode") or self.padding_mode)
        if dst_affine is None or lazy or not isinstance(img, MetaTensor) or modes != ("bilinear", "border"):
            return super().__call__(img, dst_affine, spatial_size, **options)
        dims = img.ndim - 1
        source = np.asarray(to_affine_nd(dims, img.affine.cpu().numpy()))
        matrix = np.linalg.solve(source, np.asarray(to_affine_nd(dims, torch.as_tensor(dst_affine).cpu().numpy())))
        size = tuple(int(each) for each in spatial_size)
        _refuse_large(size, img)
        unchanged = size == tuple(img.shape[1:]) and np.allclose(matrix, np.eye(dims + 1), atol=_MONAI_NEAR)
        if unchanged or not _straight(matrix, size):
            return super().__call__(img, dst_affine, spatial_size, **options)
        noted = TraceableTransform.track_transform_meta(
            img,
            sp_size=size,
            affine=torch.from_numpy(matrix),
            extra_info={
                "dtype": "float32",
                "mode": "bilinear",
                "padding_mode": "border",
                "align_corners": False,
                "src_affine": torch.from_numpy(source),
            },
            orig_size=tuple(img.shape[1:]),
            transform_info=self.get_transform_info(),
            lazy=False,
        )
        resampled = _resampled(img.as_tensor(), size, matrix)
        return MetaTensor(resampled).copy_meta_from(noted)


def _refuse_large(size: tuple[int, ...], image: MetaTensor) -> None:
    """Check the size of the result, which a wrong unit in a header makes a thousand times longer.

    Raises:
        GeometryError: More than 2^31 voxels.
    """
    if math.prod(size) > MAX_VOXELS:
        raise GeometryError(
            f"Resampled image too large: {image.meta.get('filename_or_obj', 'an image')} has {by(image.shape[1:])} "
            f"voxels and would have {by(size)} after resampling, the limit is {MAX_VOXELS:,}. Check the voxel spacing "
            "in its header, or use a coarser spacing."
        )


def _straight(matrix: NDArray[np.float64], size: Sequence[int]) -> bool:
    scales = matrix[:-1, :-1]
    drift = (np.abs(scales - np.diag(np.diag(scales))) * (np.array(size) - 1)).sum(1)
    return bool((drift < _NEAR).all()) and bool((np.diag(scales) > 0).all())


def _resampled(image: torch.Tensor, size: tuple[int, ...], matrix: NDArray[np.float64]) -> torch.Tensor:
    """Return the image `(C, *size)`, interpolated along the slowest axis in memory first."""
    axes = sorted(range(len(size)), key=lambda axis: -image.stride(axis + 1))
    steps = [_Step(axis, image.shape[axis + 1], size[axis], matrix[axis, axis], matrix[axis, -1]) for axis in axes]
    result = torch.empty((len(image), *size), dtype=torch.float32, device=image.device)
    first, rest = steps[0], steps[1:]

    def plane(index: int) -> None:
        low, high, fraction = int(first.low[index]), int(first.high[index]), float(first.fraction[index])
        values = image.select(first.axis + 1, low).float()
        if fraction:
            values = values.lerp(image.select(first.axis + 1, high).float(), fraction)
        for step in rest:
            values = step(values, step.axis + 1 - (step.axis > first.axis))
        result.select(first.axis + 1, index).copy_(values)

    threads = torch.get_num_threads() if image.device.type == "cpu" else 1
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(plane, range(size[first.axis])))
    return result


class _Step:
    """Linear interpolation along one axis, with edge padding."""

    def __init__(self, axis: int, old: int, new: int, scale: float, offset: float) -> None:
        where = np.arange(new) * scale + offset
        whole = np.rint(where)
        where = np.clip(np.where(np.abs(where - whole) < _NEAR, whole, where), 0, old - 1)
        low = np.floor(where).astype(np.int64)
        self.axis = axis
        self.low = torch.from_numpy(low)
        self.high = torch.from_numpy(np.minimum(low + 1, old - 1))
        self.fraction = torch.from_numpy((where - low).astype(np.float32))

    def __call__(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        low = values.index_select(dim, self.low.to(values.device))
        if not bool(self.fraction.any()):
            return low
        high = values.index_select(dim, self.high.to(values.device))
        fraction = self.fraction.to(values.device).reshape(-1, *[1] * (values.ndim - 1 - dim))
        return low.lerp(high, fraction)
