"""Single-file NIfTI-1 and NIfTI-2, plain or gzipped.

Headers are parsed by nibabel, voxels are read by `medseg.io.streams`.
"""

from __future__ import annotations

import logging
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medseg.errors import CaseError, GeometryError
from medseg.io.geometry import GRID_TOLERANCE, MAX_VOXELS, Grid, check_size, corner_distance, spatial_grid
from medseg.io.streams import Voxels, check_capacity, coding_of, gzip_writer, opened, read_voxels, write_voxels
from medseg.io.voxels import ReadOptions, choose_channels
from medseg.notices import warn

__all__ = ["affine_of", "image_like", "read", "read_grid", "write"]

logger = logging.getLogger(__name__)
# nibabel logs its corrections of headers; this module decides which of them to report.
_quiet = logging.Logger("nibabel header", level=logging.CRITICAL + 1)

# The first four bytes are the header's size, which determines the version and the byte order.
_KINDS = {
    struct.pack(f"{order}i", kind.sizeof_hdr): (kind, order)
    for kind in (nib.Nifti1Header, nib.Nifti2Header)
    for order in "<>"
}
_MILLIMETERS = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
_INTENT_LABEL = 1002
_SCANNER = 1
# The geometry fields; nothing else of a header is copied to a mask, since it may identify the patient.
_GEOMETRY_FIELDS = (
    *("dim", "pixdim", "xyzt_units", "dim_info", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@dataclass(frozen=True)
class _Header:
    """A header as stored in the file, and its interpretation.

    Attributes:
        raw: Header fields, bit for bit.
        shape: Size of every axis, `(x, y[, z[, t[, ...]]])`.
        affine: 4 x 4 matrix from voxels to RAS+ mm.
        dtype: Type of the stored values.
        offset: Offset of the voxels in the file, in bytes.
        slope: Scale factor of the stored values.
        inter: Offset added after scaling.
    """

    raw: Any
    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float


def read_grid(path: Path, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the checked grid of a file; only its header is read."""
    with opened(path) as stream:
        header = _read_header(stream, path, max_voxels)
    return spatial_grid(header.shape, header.affine, spatial_dims, path, max_voxels)


def read(path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
    """Return the voxels `(C, x, y[, z])` and their grid; the options are those of `medseg.io.load`.

    A fourth axis, or the fifth axis of a NIfTI vector image, is read as channels only if `channels` is its size, and as
    a series of volumes only if `index` selects one of them.
    """
    with opened(path) as stream:
        header = _read_header(stream, path, options.max_voxels)
        grid = spatial_grid(header.shape, header.affine, options.spatial_dims, path, options.max_voxels)
        rest = header.shape[len(grid.shape) :]
        voxels = Voxels(grid.shape, header.dtype, series=rest, slope=header.slope, inter=header.inter)
        choose_channels(rest, options.channels, options.index, path)
        check_capacity(path, coding_of(path), header.offset + voxels.nbytes)
        stream.seek(header.offset)
        array = read_voxels(stream, voxels, path, options)
    return array, grid


def write(stream: BinaryIO, array: NDArray[Any], path: Path, *, grid: Grid, like: Path | None) -> None:
    """Write labels `(*spatial)` or channels `(C, *spatial)` to a stream.

    Args:
        stream: Stream to write to.
        array: Labels or channels of a type that NIfTI supports.
        path: File name, which determines whether the file is gzipped.
        grid: Geometry; written as sform and qform, in float32 for NIfTI-1, if `like` is None.
        like: NIfTI file whose version, byte order and geometry fields are copied bit for bit.
    """
    if like is None:
        header = _new_header(grid)
    else:
        with opened(like) as source:
            header = _like_header(_read_header(source, like, sys.maxsize), len(grid.shape))
    _describe_values(header, array, grid)
    if not path.name.lower().endswith(".gz"):
        _write_plain(stream, header, array, grid)
        return
    with gzip_writer(stream) as packed:
        _write_plain(packed, header, array, grid)


def affine_of(header: Any, shape: tuple[int, ...], path: Path) -> NDArray[np.float64]:
    """Return the affine of a nibabel NIfTI header, voxels to RAS+ mm, with the same checks as for files.

    Raises:
        GeometryError: Neither sform nor qform is set, or the qform is invalid.
    """
    return _affine(header, header, shape, path)


def image_like(image: Any, values: NDArray[Any]) -> Any:
    """Return results `(C, *spatial)` as a nibabel image with the geometry fields of `image`, and no other fields."""
    source = image.header
    header = type(source)(endianness=source.endianness)
    for field in _GEOMETRY_FIELDS:
        header[field] = source[field]
    array = values[0] if len(values) == 1 else np.moveaxis(values, 0, -1).reshape(*_three(values.shape[1:]), -1)
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    header["intent_code"] = _INTENT_LABEL if len(values) == 1 else 0
    return type(image)(array, image.affine, header)


def _three(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, *(1,) * (3 - len(shape)))


def _read_header(stream: BinaryIO, path: Path, max_voxels: int) -> _Header:
    raw = _raw_header(stream, path)
    fixed = raw.copy()
    try:
        fixed.check_fix(logger=_quiet, error_level=40)
        slope, inter = fixed.get_slope_inter()
        dtype, offset = fixed.get_data_dtype(), int(fixed.get_data_offset())
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise CaseError(f"{path} has a corrupt NIfTI header: {error}.") from error
    if offset < raw.sizeof_hdr + 4:
        raise CaseError(
            f"{path} has an invalid vox_offset of {offset}, within the NIfTI header, which readers interpret "
            f"differently: expected {raw.sizeof_hdr + 4} or more. Repair its header."
        )
    count = int(raw["dim"][0])
    if not 2 <= count <= 7:
        raise CaseError(f"{path} has a corrupt NIfTI header: dim[0] is {count}, expected 2 to 7 axes.")
    shape = tuple(int(size) for size in raw["dim"][1 : count + 1])
    check_size(shape, path, max_voxels)
    if dtype.kind not in "iuf":
        kind = "color (RGB)" if dtype.names else "complex"
        raise CaseError(f"{path} has {kind} values: expected real numbers. Convert it to one number per voxel.")
    _warn_of_codes(raw, fixed, path)
    affine = _affine(raw, fixed, shape, path)
    return _Header(raw, shape, affine, dtype, offset, 1.0 if slope is None else slope, 0.0 if inter is None else inter)


def _raw_header(stream: BinaryIO, path: Path) -> Any:
    start = stream.read(4)
    kind, order = _KINDS.get(start, (nib.Nifti1Header, "="))
    block = start + stream.read(kind.sizeof_hdr - 4)
    if start not in _KINDS or len(block) < kind.sizeof_hdr:
        raise CaseError(f"{path} is not a NIfTI file: it does not start with a NIfTI header.")
    raw = kind(block, endianness=order, check=False)
    magic = bytes(raw["magic"].item())
    if magic[:2] == b"ni":
        raise CaseError(f"{path} is the header of a NIfTI pair (.hdr, .img): convert it to one .nii.gz file.")
    if magic[:2] != b"n+":
        raise CaseError(
            f"{path} is not a NIfTI file: its magic is {magic!r} (Analyze files have no orientation). Convert it."
        )
    return raw


def _warn_of_codes(raw: Any, fixed: Any, path: Path) -> None:
    """Warn of sform and qform codes that NIfTI does not define, which nibabel treats as 0."""
    for name in ("sform_code", "qform_code"):
        if raw[name] != fixed[name]:
            warn(logger, "header-repaired", f"{name} {int(raw[name])} is undefined; 0 is assumed", path)


def _warn_of_pixdim(raw: Any, path: Path) -> None:
    """Warn of voxel sizes and a qfac that nibabel replaces in the qform."""
    factor, *sizes = (float(value) for value in raw["pixdim"][: min(4, int(raw["dim"][0]) + 1)])
    if factor not in (-1, 0, 1):
        warn(logger, "header-repaired", f"pixdim[0] (qfac) is {factor:g}; 1 is assumed", path)
    zero = ", ".join(str(axis) for axis, size in enumerate(sizes, start=1) if size == 0)
    if zero:
        warn(logger, "spacing-assumed", f"pixdim (voxel size) is 0 along axis {zero}; 1 mm is assumed", path)
    if min(sizes) < 0:
        shown = ", ".join(f"{size:g}" for size in sizes)
        warn(logger, "header-repaired", f"pixdim (voxel size) is {shown}; its absolute value is used", path)


def _affine(raw: Any, header: Any, shape: tuple[int, ...], path: Path) -> NDArray[np.float64]:
    """Return the sform, or without one the qform, in mm."""
    if not header["sform_code"] and not header["qform_code"]:
        raise GeometryError(
            f"{path} has no valid orientation: sform_code and qform_code are 0, which readers interpret differently, "
            "left and right included. Set an sform with a code of 1 or more."
        )
    sform = header.get_sform() if header["sform_code"] else None
    qform = _qform(header, path, needed=sform is None) if header["qform_code"] else None
    if sform is not None and qform is not None and np.isfinite([sform, qform]).all():
        apart = corner_distance(Grid(shape[:3], sform), Grid(shape[:3], qform))
        if apart > GRID_TOLERANCE * min(Grid(shape[:3], sform).spacing):
            apart *= _MILLIMETERS.get(int(header["xyzt_units"]) & 7, 1.0)
            text = f"sform and qform differ by up to {apart:.3g} mm; the sform is used"
            warn(logger, "sform-qform-conflict", text, path)
    if sform is None:
        _warn_of_pixdim(raw, path)
    best: NDArray[np.float64] = np.array(qform if sform is None else sform, dtype=np.float64)
    best[:3] *= _MILLIMETERS.get(int(header["xyzt_units"]) & 7, 1.0)
    return best


def _qform(header: Any, path: Path, *, needed: bool) -> NDArray[np.float64] | None:
    try:
        return cast("NDArray[np.float64]", header.get_qform())
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        if needed:
            raise GeometryError(f"{path} has an invalid qform: {error}. Repair its header.") from error
    return None


def _new_header(grid: Grid) -> Any:
    kind = nib.Nifti1Header if max(grid.shape) < 1 << 15 else nib.Nifti2Header
    header = kind(endianness="<")
    header.set_data_shape(grid.shape)
    header.set_zooms(grid.spacing)
    header.set_xyzt_units("mm")
    header.set_qform(grid.affine, _SCANNER, strip_shears=True)
    header.set_sform(grid.affine, _SCANNER)
    return header


def _like_header(source: _Header, dims: int) -> Any:
    """Return a header with the geometry of `source`, and its non-spatial axes if they are singleton dimensions."""
    raw = source.raw
    header = type(raw)(endianness=raw.endianness)
    for field in _GEOMETRY_FIELDS:
        header[field] = raw[field]
    if any(size > 1 for size in source.shape[dims:]):
        header["dim"][0] = dims
        header["dim"][dims + 1 :] = 1
    return header


def _describe_values(header: Any, array: NDArray[Any], grid: Grid) -> None:
    """Set the fields about the values: labels, or channels along the fourth axis."""
    if array.ndim == len(grid.shape):
        header["intent_code"] = _INTENT_LABEL
    else:
        header["dim"] = (4, *grid.shape, *(1,) * (3 - len(grid.shape)), len(array), 1, 1, 1)
    header.set_data_dtype(array.dtype)
    header["vox_offset"] = header.sizeof_hdr + 4
    header["scl_slope"], header["scl_inter"] = 1, 0


def _write_plain(stream: BinaryIO, header: Any, array: NDArray[Any], grid: Grid) -> None:
    stream.write(header.binaryblock + b"\0\0\0\0")
    for volume in [array] if array.ndim == len(grid.shape) else array:
        write_voxels(stream, volume, array.dtype.newbyteorder(header.endianness))
