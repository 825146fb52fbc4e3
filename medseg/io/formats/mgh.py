"""FreeSurfer's MGH, plain (`.mgh`) or gzipped (`.mgz`).

Headers are parsed by nibabel, voxels are read by `medseg.io.streams`. The format is big-endian; its fourth axis holds
frames. The footer (acquisition parameters, command history) is neither read nor copied.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from nibabel.freesurfer import mghformat
from numpy.typing import NDArray

from medseg.errors import CaseError, GeometryError
from medseg.io.geometry import MAX_VOXELS, Grid, check_size, spatial_grid
from medseg.io.streams import Voxels, check_capacity, coding_of, gzip_writer, opened, read_voxels, write_voxels
from medseg.io.voxels import ReadOptions, choose_channels

__all__ = ["read", "read_grid", "write"]

_OFFSET = 284
_TYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype(">i4"),
    3: np.dtype(">f4"),
    4: np.dtype(">i2"),
    10: np.dtype(">u2"),
}
_GEOMETRY_FIELDS = ("goodRASFlag", "delta", "Mdc", "Pxyz_c")


@dataclass(frozen=True)
class _Header:
    """A header as stored in the file, and its interpretation.

    Attributes:
        raw: Header fields, bit for bit.
        affine: 4 x 4 matrix from voxels to RAS+ mm.
        voxels: Storage layout of the voxels.
    """

    raw: Any
    affine: NDArray[np.float64]
    voxels: Voxels


def read_grid(path: Path, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the checked grid of a file; only its header is read."""
    with opened(path) as stream:
        header = _read_header(stream, path, max_voxels)
    return spatial_grid(header.voxels.shape, header.affine, spatial_dims, path, max_voxels)


def read(path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
    """Return the voxels `(C, x, y[, z])` and their grid; the options are those of `medseg.io.load`."""
    with opened(path) as stream:
        header = _read_header(stream, path, options.max_voxels)
        grid = spatial_grid(header.voxels.shape, header.affine, options.spatial_dims, path, options.max_voxels)
        choose_channels(header.voxels.series, options.channels, options.index, path)
        check_capacity(path, coding_of(path), _OFFSET + header.voxels.nbytes)
        stream.seek(_OFFSET)
        array = read_voxels(stream, header.voxels, path, options)
    return array.reshape(len(array), *grid.shape), grid


def write(stream: BinaryIO, array: NDArray[Any], path: Path, *, grid: Grid, like: Path | None) -> None:
    """Write labels `(*spatial)` to a stream; uint16, which FreeSurfer lacks, becomes int32.

    Args:
        stream: Stream to write to.
        array: Label map.
        path: File name, which determines whether the file is gzipped.
        grid: Geometry, written in float32 if `like` is None.
        like: MGH file whose geometry fields are copied bit for bit.
    """
    header = mghformat.MGHHeader()
    if like is None:
        _set_geometry(header, grid)
    else:
        with opened(like) as source:
            raw = _read_header(source, like, sys.maxsize).raw
        for field in _GEOMETRY_FIELDS:
            header[field] = raw[field]
    dtype = np.dtype("u1") if array.dtype == np.uint8 else np.dtype(">i4")
    header["dims"] = (*grid.shape, *(1,) * (4 - len(grid.shape)))
    header["type"] = next(code for code, kind in _TYPES.items() if kind == dtype)
    start = header.binaryblock[: mghformat.header_dtype.itemsize].ljust(_OFFSET, b"\0")
    if not path.name.lower().endswith((".mgz", ".gz")):
        _write_plain(stream, start, array, dtype)
        return
    with gzip_writer(stream) as packed:
        _write_plain(packed, start, array, dtype)


def _read_header(stream: BinaryIO, path: Path, max_voxels: int) -> _Header:
    block = stream.read(_OFFSET)
    if len(block) < _OFFSET or block[:4] != b"\0\0\0\1":
        raise CaseError(f"{path} is not an MGH file: it does not start with an MGH header of version 1.")
    has_orientation = block[28:30] != b"\0\0"
    raw = mghformat.MGHHeader(block, check=False)
    sizes = tuple(int(size) for size in raw["dims"])
    check_size(sizes, path, max_voxels)
    if int(raw["type"]) not in _TYPES:
        raise CaseError(f"{path} has the unsupported MGH type {int(raw['type'])}: expected one of {list(_TYPES)}.")
    if not has_orientation:
        raise GeometryError(
            f"{path} has no valid orientation: its goodRASFlag is 0, which readers interpret differently, left and "
            "right included. Set it, with mri_convert for instance."
        )
    return _Header(raw, _affine(raw), Voxels(sizes[:3], _TYPES[int(raw["type"])], series=sizes[3:]))


def _affine(raw: Any) -> NDArray[np.float64]:
    """Return the affine from the directions, spacings and center of the volume in a header."""
    affine: NDArray[np.float64] = np.eye(4)
    with np.errstate(invalid="ignore", over="ignore"):
        affine[:3, :3] = raw["Mdc"].astype(np.float64).T * raw["delta"].astype(np.float64)
        affine[:3, 3] = raw["Pxyz_c"].astype(np.float64) - affine[:3, :3] @ (raw["dims"][:3].astype(np.float64) / 2)
    return affine


def _set_geometry(header: Any, grid: Grid) -> None:
    axes, sizes = grid.affine[:3, :3], np.array([*grid.shape, *(1,) * (3 - len(grid.shape))])
    spacing = np.sqrt((axes**2).sum(axis=0))
    header["goodRASFlag"] = 1
    header["delta"] = spacing
    header["Mdc"] = (axes / spacing).T
    header["Pxyz_c"] = grid.affine[:3, 3] + axes @ (sizes / 2)


def _write_plain(stream: BinaryIO, start: bytes, array: NDArray[Any], dtype: np.dtype[Any]) -> None:
    stream.write(start)
    write_voxels(stream, array, dtype)
