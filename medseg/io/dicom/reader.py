"""Reading a DICOM series as an array; the `Reader` of the format DICOM."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray

from medseg.errors import CaseError
from medseg.io.dicom.pixels import read_slices
from medseg.io.dicom.series import Series, open_series
from medseg.io.dicom.stacks import Slice
from medseg.io.geometry import MAX_VOXELS, Grid
from medseg.io.voxels import ReadOptions, fill_image, fill_labels

__all__ = ["read", "read_grid"]

logger = logging.getLogger(__name__)

_GRAYSCALE: Final = ("MONOCHROME1", "MONOCHROME2", "")
_FLOAT: Final = np.dtype(np.float32)
# 16 bit values with an intercept below this fit int32.
_FAR: Final = 2**30


def read_grid(path: Path, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the checked grid of a series from its headers."""
    series = open_series(path, max_voxels=max_voxels)
    return _grid(series, spatial_dims, path)


def read(path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
    """Return the voxels `(C, x, y[, z])` and their grid; the options are those of `medseg.io.load`.

    The axes are columns, rows and slices. A single slice is a volume of one slice, and with `spatial_dims=2` a 2D
    image; an image without geometry is always a 2D image. `index` selects one of several volumes of a series.
    """
    series = open_series(path, index=options.index, max_voxels=options.max_voxels)
    grid = _grid(series, options.spatial_dims, path)
    count = _channel_count(series, options.channels, len(grid.shape), path)
    columns, rows = grid.shape[:2]
    dtype = np.dtype(np.int32) if options.label else _image_type(series.slices, stored=options.stored)
    # Contiguous by slice, as it is filled; the returned view permutes the axes.
    planes = np.empty((len(series.slices), count, rows, columns), dtype=dtype)
    for number, values, slope, inter in read_slices(series.slices):
        layers = np.moveaxis(values, -1, 0) if values.ndim == 3 else values[None]
        if options.label:
            fill_labels(planes[number], layers, slope, inter, path)
            continue
        if dtype.kind in "iu" and not _fits(layers, inter, planes.dtype):
            planes = planes.astype(np.int32)
        fill_image(planes[number], layers, slope, inter, path)
    array = planes.transpose(1, 3, 2, 0)
    return (array if len(grid.shape) == 3 else array[..., 0]), grid


def _grid(series: Series, spatial_dims: int | None, path: Path) -> Grid:
    """Return the grid with the requested number of axes."""
    grid = series.grid
    if spatial_dims == 3 and len(grid.shape) == 2:
        raise CaseError(f"{path} is a 2D image without geometry: expected a volume of slices.")
    if spatial_dims == 2 and len(series.slices) > 1:
        raise CaseError(f"{path} is a volume {grid.shape}: expected a single slice or a 2D image.")
    return Grid(grid.shape[:2], grid.affine) if spatial_dims == 2 else grid


def _channel_count(series: Series, channels: int | None, dims: int, path: Path) -> int:
    """Return the number of channels to read, if that is lossless."""
    header = series.slices[0].header
    samples = header.samples
    if samples == 1 and header.photometric not in _GRAYSCALE:
        raise CaseError(
            f"{path} has the unsupported photometric interpretation {header.photometric}: expected grayscale. "
            "Convert it."
        )
    if samples == 3 and not header.photometric.startswith("RGB") and int(pydicom.__version__.split(".")[0]) < 3:
        raise CaseError(
            f"{path} has the photometric interpretation {header.photometric}, which needs pydicom 3 or later."
        )
    due = channels or (1 if series.has_geometry else samples)
    if due == 3 and samples == 1 and dims == 2:
        logger.info("%s is grayscale: its channel is repeated for a model of color images.", path)
        return 3
    if due != samples:
        kind = "grayscale" if samples == 1 else "in color"
        raise CaseError(
            f"{path} is {kind}, {samples} values per voxel: expected {due}. Convert it.",
            code="channels",
            path=path,
            found=samples,
            expected=due,
        )
    return samples


def _image_type(slices: Sequence[Slice], *, stored: bool) -> np.dtype[Any]:
    """Return the type to read images as; with `stored` a small integer type, widened later if necessary."""
    whole = all(
        item.plane.slope == 1 and item.plane.inter == int(item.plane.inter) and abs(item.plane.inter) < _FAR
        for item in slices
    )
    if not stored or not whole or any(item.header.bits_allocated > 16 for item in slices):
        return _FLOAT
    plain = all(item.plane.inter == 0 and not item.header.signed for item in slices)
    return np.dtype(np.uint8 if plain and all(item.header.bits_stored <= 8 for item in slices) else np.int16)


def _fits(values: NDArray[Any], inter: float, dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return bool(limits.min <= int(values.min()) + inter and int(values.max()) + inter <= limits.max)
