"""MetaImage in one file (`.mha`) or with a detached data file (`.mhd`).

The header is text, one `Key = value` per line, and ends with `ElementDataFile`. World coordinates are LPS millimeters,
as in ITK; `AnatomicalOrientation` is redundant to `TransformMatrix` and is not used. See
https://itk.org/Wiki/MetaIO/Documentation. It is parsed here for the reasons given in `nrrd`.

Three axes are spatial; a fourth one holds a series of volumes, and interleaved values (`ElementNumberOfChannels`) are
channels.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from medseg.errors import CaseError, GeometryError
from medseg.io.geometry import MAX_VOXELS, Grid, check_size, spatial_grid
from medseg.io.streams import Coding, Voxels, check_capacity, detached_data_file, read_voxels, unpacked, write_voxels
from medseg.io.voxels import ReadOptions, choose_channels
from medseg.notices import warn

__all__ = ["read", "read_grid", "write"]

logger = logging.getLogger(__name__)

_MAX_HEADER = 1 << 20
_LAST = "ElementDataFile"
_PACKED_SIZE = "CompressedDataSize"  # required by ITK for decompression
# MET_LONG is not supported: it has four or eight bytes, depending on the machine that wrote it.
_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4"},
        **{"MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
    }
)
_NAMES = {"uint8": "MET_UCHAR", "uint16": "MET_USHORT", "int32": "MET_INT", "float32": "MET_FLOAT"}
# Synonyms; of several in one header ITK uses the one listed first here.
_MATRIX = ("TransformMatrix", "Rotation", "Orientation")
_OFFSET = ("Origin", "Offset", "Position")
_SPACING = ("ElementSpacing", "ElementSize")
_BIG_ENDIAN = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_LEVEL = 2
_TO_RAS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class _Header:
    """A parsed header.

    Attributes:
        fields: Header fields as text.
        affine: 4 x 4 matrix from voxels to RAS+ mm.
        voxels: Storage layout of the voxels.
        data: File of the voxels.
        offset: Offset of the voxels in that file, in bytes; -1 if they are its last bytes.
        coding: Compression of the voxels.
    """

    fields: Mapping[str, str]
    affine: NDArray[np.float64]
    voxels: Voxels
    data: Path
    offset: int
    coding: Coding


def read_grid(path: Path, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the checked grid of a file; only its header is read."""
    header = _read_header(path, max_voxels)
    return spatial_grid(header.voxels.shape, header.affine, spatial_dims, path, max_voxels)


def read(path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
    """Return the voxels `(C, x, y[, z])` and their grid; the options are those of `medseg.io.load`."""
    header = _read_header(path, options.max_voxels)
    grid = spatial_grid(header.voxels.shape, header.affine, options.spatial_dims, path, options.max_voxels)
    choose_channels((header.voxels.vector, *header.voxels.series), options.channels, options.index, path)
    with _data(header, path) as stream:
        array = read_voxels(stream, header.voxels, path, options)
    return array.reshape(len(array), *grid.shape), grid


def write(stream: BinaryIO, array: NDArray[Any], path: Path, *, grid: Grid, like: Path | None) -> None:
    """Write labels `(*spatial)` or channels `(C, *spatial)` to a stream, compressed.

    Args:
        stream: Stream to write to.
        array: Labels, or channels, which are stored interleaved.
        path: Not used; `.mha` is always compressed internally.
        grid: Geometry, written if `like` is None.
        like: MetaImage whose matrix, offset and spacing are copied verbatim.
    """
    geometry = _new_geometry(grid) if like is None else _copied_geometry(_read_header(like, sys.maxsize).fields)
    sizes = (*grid.shape, *(1,) * (3 - len(grid.shape)))
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "True",
        _PACKED_SIZE: " " * 20,
        **geometry,
        "DimSize": " ".join(str(size) for size in sizes),
        **({"ElementNumberOfChannels": str(len(array))} if array.ndim > len(grid.shape) else {}),
        "ElementType": _NAMES[array.dtype.name],
        _LAST: "LOCAL",
    }
    text = "".join(f"{name} = {value}\n" for name, value in fields.items())
    stream.write(text.encode())
    compressor = _Compressor(stream)
    write_voxels(compressor, array, array.dtype.newbyteorder("<"))
    compressor.finish()
    size = str(stream.tell() - len(text))
    stream.seek(text.index(_PACKED_SIZE) + len(f"{_PACKED_SIZE} = "))
    stream.write(size.encode())


class _Compressor:
    """Compresses to a zlib stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._deflater = isal_zlib.compressobj(_LEVEL)

    def write(self, data: memoryview) -> int:
        """Compress some bytes; return their number."""
        self._stream.write(self._deflater.compress(data))
        return len(data)

    def finish(self) -> None:
        """Flush the end of the stream."""
        self._stream.write(self._deflater.flush())


def _read_header(path: Path, max_voxels: int) -> _Header:
    with path.open("rb") as file:
        fields = _fields(file, path)
        offset = file.tell()
    dims = _whole_number(fields, "NDims", path)
    if fields.get("ObjectType", "Image") != "Image" or dims not in (3, 4):
        raise CaseError(
            f"{path} is a MetaIO {fields.get('ObjectType', 'Image')} with {dims} axes: expected an Image with 3 or 4."
        )
    if not _true(fields.get("BinaryData", "True")):
        raise CaseError(f"{path} has text voxels (BinaryData = False), which are not supported: convert it.")
    sizes = tuple(int(size) for size in _numbers(fields, ("DimSize",), dims, path))
    vector = _whole_number({"ElementNumberOfChannels": "1", **fields}, "ElementNumberOfChannels", path)
    check_size((*sizes, vector), path, max_voxels)
    voxels = Voxels(sizes[:3], _dtype(fields, path), series=sizes[3:], vector=vector)
    data = path
    if fields[_LAST] not in ("LOCAL", "Local", "local"):
        data, offset = (
            detached_data_file(path, fields[_LAST]),
            _whole_number({"HeaderSize": "0", **fields}, "HeaderSize", path),
        )
    coding: Coding = "zlib" if _true(fields.get("CompressedData", "False")) else "raw"
    return _Header(fields, _affine(fields, dims, path), voxels, data, offset, coding)


def _fields(file: BinaryIO, path: Path) -> dict[str, str]:
    """Read the header up to the line that names the data file."""
    fields: dict[str, str] = {}
    while _LAST not in fields:
        line = file.readline(_MAX_HEADER)
        text = line.decode("utf-8", "replace").strip()
        name, equals, value = (part.strip() for part in text.partition("="))
        if not line or (text and not equals) or name in fields or file.tell() > _MAX_HEADER:
            raise CaseError(
                f"{path} is not a MetaImage, or its header is damaged: expected lines 'Key = value' up to {_LAST}, "
                f"found {text[:40] if line else 'end of file'!r}."
            )
        if text:
            fields[name] = value
    return fields


def _true(text: str) -> bool:
    return text[:1] in ("T", "t", "1")


def _text(fields: Mapping[str, str], names: tuple[str, ...], path: Path) -> str:
    for name in names:
        if fields.get(name):
            return fields[name]
    if names in (_MATRIX, _SPACING):
        raise GeometryError(
            f"{path} has no valid geometry: its header has no {names[0]}, which readers interpret differently. Add it; "
            "the matrix of an axis-aligned image is 1 0 0 0 1 0 0 0 1."
        )
    raise CaseError(f"{path} is damaged: its MetaImage header has no {names[0]}.")


def _whole_number(fields: Mapping[str, str], name: str, path: Path) -> int:
    text = _text(fields, (name,), path)
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise CaseError(f"{path} has a corrupt MetaImage header: {name} is {text[:80]!r}.")
    return int(text)


def _numbers(fields: Mapping[str, str], names: tuple[str, ...], count: int, path: Path) -> NDArray[np.float64]:
    words = _text(fields, names, path).split()
    try:
        numbers: NDArray[np.float64] = np.array([float(word) for word in words])
    except ValueError:
        numbers = np.empty(0)
    if len(numbers) != count or (names == ("DimSize",) and not all(word.isdecimal() for word in words)):
        raise CaseError(
            f"{path} has a corrupt MetaImage header: {names[0]} is {' '.join(words)[:80]!r}, expected {count} numbers."
        )
    return numbers


def _affine(fields: Mapping[str, str], dims: int, path: Path) -> NDArray[np.float64]:
    units = fields.get("DistanceUnits", "mm")
    if units not in ("mm", "?", ""):
        raise GeometryError(f"{path} has the unsupported DistanceUnits {units!r}: expected mm. Convert it.")
    # Each row is the direction of one voxel axis.
    rows = _numbers(fields, _MATRIX, dims * dims, path).reshape(dims, dims)
    if dims == 4 and (rows[3, :3].any() or rows[:3, 3].any()):
        raise GeometryError(
            f"{path} has a fourth axis that is not independent of the spatial axes: {rows.tolist()}. Split it."
        )
    spacing = _numbers(fields, _SPACING, dims, path)
    given = any(name in fields for name in _OFFSET)
    if not given:
        warn(logger, "origin-assumed", "no Offset (origin) in the header; 0 0 0 is assumed", path)
    offset = _numbers(fields, _OFFSET, dims, path) if given else np.zeros(dims)
    affine: NDArray[np.float64] = np.eye(4)
    with np.errstate(invalid="ignore", over="ignore"):
        affine[:3, :3] = (rows[:3, :3] * spacing[:3, None]).T
    affine[:3, 3] = offset[:3]
    affine[:3] *= _TO_RAS[:, None]
    return affine


def _dtype(fields: Mapping[str, str], path: Path) -> np.dtype[Any]:
    kind = _text(fields, ("ElementType",), path)
    if kind not in _TYPES:
        raise CaseError(f"{path} has the unsupported ElementType {kind!r}: expected {', '.join(_TYPES)}.")
    if "ElementToIntensityFunctionSlope" in fields or "ElementToIntensityFunctionOffset" in fields:
        raise CaseError(f"{path} has an ElementToIntensityFunction, which readers treat differently: convert it.")
    big = any(_true(fields.get(name, "False")) for name in _BIG_ENDIAN)
    return np.dtype(_TYPES[kind]).newbyteorder(">" if big else "<")


@contextmanager
def _data(header: _Header, path: Path) -> Iterator[BinaryIO]:
    """Open the data file at the first voxel."""
    size, needed = header.data.stat().st_size, header.voxels.nbytes
    offset = size - needed if header.offset == -1 and header.coding == "raw" else header.offset
    check_capacity(header.data, header.coding, needed, skipped=max(offset, 0))
    if offset < 0:
        raise CaseError(
            f"{path} has the invalid HeaderSize {header.offset}: it is damaged, or its data file is the wrong one."
        )
    with header.data.open("rb") as file:
        file.seek(offset)
        with unpacked(file, header.coding) as stream:
            yield stream


def _new_geometry(grid: Grid) -> dict[str, str]:
    affine = grid.affine[:3] * _TO_RAS[:, None] + 0.0
    spacing = np.sqrt((affine[:, :3] ** 2).sum(axis=0))
    numbers = {_MATRIX[0]: (affine[:, :3] / spacing).T.ravel(), "Offset": affine[:, 3], _SPACING[0]: spacing}
    return {name: " ".join(repr(float(value)) for value in values) for name, values in numbers.items()}


def _copied_geometry(fields: Mapping[str, str]) -> dict[str, str]:
    """Return the geometry fields verbatim; for four axes, their spatial part."""
    dims = int(fields["NDims"])
    geometry: dict[str, str] = {}
    for written, names in ((_MATRIX[0], _MATRIX), ("Offset", _OFFSET), (_SPACING[0], _SPACING)):
        words = next((fields[name] for name in names if fields.get(name)), "0 " * dims).split()
        rows = [words[start : start + 3] for start in range(0, len(words), dims)][:3]
        geometry[written] = " ".join(word for row in rows for word in row)
    return geometry
