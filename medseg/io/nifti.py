"""NIfTI-1 and NIfTI-2 in one file, plain or gzipped.

Headers go through nibabel. Voxels are streamed from the file in slabs, so that reading a volume never needs more
memory than its float32 array and a few slices.
"""

from __future__ import annotations

import gzip
import logging
import math
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medseg.errors import CaseError, GeometryError
from medseg.io.geometry import GRID_TOLERANCE, MAX_VOXELS, Grid, check_size, corner_distance
from medseg.io.voxels import choose_channels, fill_image, fill_labels, image_type

__all__ = ["read", "read_grid", "write"]

logger = logging.getLogger(__name__)
# nibabel reports what it corrects in a header to a logger; what matters here is decided by this module.
_quiet = logging.Logger("nibabel header", level=logging.CRITICAL + 1)

# The first four bytes are the header's size, which tells the version and the byte order.
_KINDS = {
    struct.pack(f"{order}i", kind.sizeof_hdr): (kind, order)
    for kind in (nib.Nifti1Header, nib.Nifti2Header)
    for order in "<>"
}
_MILLIMETERS = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
# Deflate cannot pack tighter than this, so a header that asks for more lies.
_MAX_PACKING = 1032
_INTENT_LABEL = 1002
_SLAB_BYTES = 1 << 23
# Everything that says where the voxels lie; nothing else of a header goes into a mask (it may name the patient).
_PLACE = (
    *("dim", "pixdim", "xyzt_units", "dim_info", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@dataclass(frozen=True)
class _Header:
    """A header as it stands in the file, and what it means.

    Attributes:
        raw: the fields, bit for bit.
        shape: all axes, `(x, y[, z[, t[, ...]]])`.
        affine: voxels to RAS+ mm.
        dtype: type of the stored values.
        offset: where the voxels start, in bytes.
        slope: factor from stored values to values.
        inter: what is added after the factor.
    """

    raw: Any
    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float

    def spatial_shape(self, spatial_dims: int) -> tuple[int, ...]:
        return self.shape[:spatial_dims]


def read_grid(path: Path, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the checked grid of a file; only its header is read."""
    with _stream(path) as stream:
        header = _read_header(stream, path, max_voxels)
    dims = _spatial_dims(header.shape, spatial_dims, path)
    return Grid(header.spatial_shape(dims), header.affine).check(path, max_voxels=max_voxels)


def read(
    path: Path,
    *,
    spatial_dims: int | None,
    channels: int | None,
    index: int | None,
    label: bool,
    stored: bool,
    max_voxels: int,
) -> tuple[NDArray[Any], Grid]:
    """Return the voxels `(C, x, y[, z])` and their grid; the arguments are those of `medseg.io.load`.

    A fourth axis, or the fifth axis of a NIfTI vector image, counts as channels only if `channels` asks for as many,
    and as a series only if `index` picks a volume of it.
    """
    with _stream(path) as stream:
        header = _read_header(stream, path, max_voxels)
        dims = _spatial_dims(header.shape, spatial_dims, path)
        grid = Grid(header.spatial_shape(dims), header.affine).check(path, max_voxels=max_voxels)
        chosen = choose_channels(header.shape[dims:], channels, index, path)
        _check_capacity(header, path)
        dtype = image_type(header.dtype, slope=header.slope, inter=header.inter, stored=stored)
        array = np.empty((len(chosen), *grid.shape), dtype=np.int32 if label else dtype)
        stream.seek(header.offset + chosen.start * math.prod(grid.shape) * header.dtype.itemsize)
        for out, raw in _slabs(stream, header, array, path):
            if label:
                fill_labels(out, raw, header.slope, header.inter, path)
            else:
                fill_image(out, raw, header.slope, header.inter)
        stream.read(1 << 20)  # a gzip checksum is verified at the end of the stream only
    return array, grid


def write(stream: BinaryIO, mask: NDArray[Any], path: Path, *, like: Path) -> None:
    """Write a label map of shape `(x, y[, z])` into a stream, with the place in space of the file `like`.

    The name `path` decides whether it is gzipped. Gzip output carries no time and no name: equal masks, equal bytes.
    """
    with _stream(like) as source:
        header = _mask_header(_read_header(source, like, sys.maxsize), mask)
    if not path.name.lower().endswith(".gz"):
        _write_plain(stream, header, mask)
        return
    with gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=stream, mtime=0) as packed:
        _write_plain(cast("BinaryIO", packed), header, mask)


@contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file
            return
        with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
            yield cast("BinaryIO", unpacked)


def _read_header(stream: BinaryIO, path: Path, max_voxels: int) -> _Header:
    raw = _raw_header(stream, path)
    fixed = raw.copy()
    try:
        fixed.check_fix(logger=_quiet, error_level=40)
        slope, inter = fixed.get_slope_inter()
        dtype, offset = fixed.get_data_dtype(), int(fixed.get_data_offset())
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise CaseError(f"{path} has a corrupt NIfTI header: {error}.") from error
    count = int(raw["dim"][0])
    if not 2 <= count <= 7:
        raise CaseError(f"{path} has a NIfTI header with {count} axes: expected 2 to 7.")
    shape = tuple(int(size) for size in raw["dim"][1 : count + 1])
    check_size(shape, path, max_voxels)
    if dtype.kind not in "iuf":
        kind = "color (RGB)" if dtype.names else "complex"
        raise CaseError(f"{path} holds {kind} values: expected real numbers. Convert it, one number per voxel.")
    affine = _affine(fixed, shape, path)
    return _Header(raw, shape, affine, dtype, offset, 1.0 if slope is None else slope, 0.0 if inter is None else inter)


def _raw_header(stream: BinaryIO, path: Path) -> Any:
    start = stream.read(4)
    kind, order = _KINDS.get(start, (nib.Nifti1Header, "="))
    block = start + stream.read(kind.sizeof_hdr - 4)
    if start not in _KINDS or len(block) < kind.sizeof_hdr:
        raise CaseError(f"{path} is no NIfTI file: it does not start with a NIfTI header.")
    raw = kind(block, endianness=order, check=False)
    magic = bytes(raw["magic"].item())
    if magic[:2] == b"ni":
        raise CaseError(f"{path} is the header of a NIfTI pair (.hdr, .img): convert it to one .nii.gz file.")
    if magic[:2] != b"n+":
        raise CaseError(f"{path} has no NIfTI mark (found {magic!r}; Analyze files have no orientation): convert it.")
    return raw


def _affine(header: Any, shape: tuple[int, ...], path: Path) -> NDArray[np.float64]:
    """Return the sform, or without one the qform, in millimeters."""
    if not header["sform_code"] and not header["qform_code"]:
        raise GeometryError(
            f"{path} does not say how it lies in space: sform_code and qform_code are 0, and programs disagree on what "
            "that means, left and right included. Set an sform with a code of 1 or more."
        )
    sform = header.get_sform() if header["sform_code"] else None
    qform = _qform(header, path, needed=sform is None) if header["qform_code"] else None
    if sform is not None and qform is not None and np.isfinite([sform, qform]).all():
        apart = corner_distance(Grid(shape[:3], sform), Grid(shape[:3], qform))
        if apart > GRID_TOLERANCE * min(Grid(shape[:3], sform).spacing):
            logger.warning("%s: its sform and qform lie up to %.3g units apart; the sform is used.", path, apart)
    best: NDArray[np.float64] = np.array(qform if sform is None else sform, dtype=np.float64)
    best[:3] *= _MILLIMETERS.get(int(header["xyzt_units"]) & 7, 1.0)
    return best


def _qform(header: Any, path: Path, *, needed: bool) -> NDArray[np.float64] | None:
    try:
        return cast("NDArray[np.float64]", header.get_qform())
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        if needed:
            raise GeometryError(f"{path} has a qform that cannot be used: {error}. Repair its header.") from error
    return None


def _spatial_dims(shape: tuple[int, ...], asked: int | None, path: Path) -> int:
    flat = len(shape) == 2
    if asked == 3 and flat:
        raise CaseError(f"{path} is 2D {shape}: expected a volume with three axes.")
    if asked == 2 and not flat and shape[2] != 1:
        raise CaseError(f"{path} is a volume {shape}: expected one slice or a picture with two axes.")
    return asked or (2 if flat else 3)


def _check_capacity(header: _Header, path: Path) -> None:
    """Refuse a file that is too short for its header, before memory is taken."""
    needed = header.offset + math.prod(header.shape) * header.dtype.itemsize
    size = path.stat().st_size
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if needed > size * (_MAX_PACKING if packed else 1):
        raise CaseError(
            f"{path} is cut short or has a wrong header: {header.shape} voxels need {needed:,} bytes, and the file has "
            f"{size:,}{' (gzipped)' if packed else ''}."
        )


def _slabs(
    stream: BinaryIO, header: _Header, array: NDArray[Any], path: Path
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield a part of `array` and the stored values for it, in the order of the file."""
    for channel in array:
        volume = channel if channel.ndim == 3 else channel[..., None]
        plane = volume[..., 0].size * header.dtype.itemsize
        step = max(1, _SLAB_BYTES // plane)
        for start in range(0, volume.shape[2], step):
            out = volume[..., start : start + step]
            wanted = plane * out.shape[2]
            data = stream.read(wanted)
            if len(data) < wanted:
                raise CaseError(f"{path} is cut short: its voxels end before the header says. Copy it again.")
            yield out, np.frombuffer(data, dtype=header.dtype).reshape(out.shape, order="F")


def _mask_header(source: _Header, mask: NDArray[Any]) -> Any:
    raw = source.raw
    header = type(raw)(endianness=raw.endianness)
    for field in _PLACE:
        header[field] = raw[field]
    if any(size > 1 for size in source.shape[mask.ndim :]):
        header["dim"][0] = mask.ndim
        header["dim"][mask.ndim + 1 :] = 1
    header.set_data_dtype(mask.dtype)
    header["vox_offset"] = header.sizeof_hdr + 4
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["intent_code"] = _INTENT_LABEL
    return header


def _write_plain(stream: BinaryIO, header: Any, mask: NDArray[Any]) -> None:
    stream.write(header.binaryblock + b"\0\0\0\0")
    dtype = mask.dtype.newbyteorder(header.endianness)
    planes = mask if mask.ndim == 3 else mask[..., None]
    step = max(1, _SLAB_BYTES // (planes[..., 0].size * dtype.itemsize))
    for start in range(0, planes.shape[2], step):
        stream.write(planes[..., start : start + step].astype(dtype, copy=False).tobytes(order="F"))
