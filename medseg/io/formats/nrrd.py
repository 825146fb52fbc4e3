"""NRRD in one file (`.nrrd`) or with a detached data file (`.nhdr`).

The header is text: magic, `field: value` lines, `key:=value` lines, an empty line. See the NRRD definition at
https://teem.sourceforge.net/nrrd/format.html. It is parsed here because sizes, offsets and file names of a header must
be checked before anything is opened or allocated for them.

Three axes are spatial; one more, before or after them, holds channels or a series of volumes. Segmentations of 3D
Slicer (`.seg.nrrd`) are label maps, or a series of them if segments overlap.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

import numpy as np

from medseg.errors import CaseError, GeometryError
from medseg.io.geometry import MAX_VOXELS, Grid, check_size, spatial_grid
from medseg.io.streams import (
    Coding,
    Voxels,
    check_capacity,
    detached_data_file,
    gzip_writer,
    read_voxels,
    unpacked,
    write_voxels,
)
from medseg.io.voxels import ReadOptions, choose_channels
from medseg.notices import warn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["read", "read_grid", "write"]

logger = logging.getLogger(__name__)

_MAX_HEADER = 1 << 22
# Sign of each axis of a space relative to RAS+.
_SPACES: Final[Mapping[str, tuple[int, int, int]]] = MappingProxyType(
    {
        "left-posterior-superior": (-1, -1, 1),
        "right-anterior-superior": (1, 1, 1),
        "left-anterior-superior": (-1, 1, 1),
        "lps": (-1, -1, 1),
        "ras": (1, 1, 1),
        "las": (-1, 1, 1),
    }
)
_ALIKE = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_TYPES: Final[Mapping[str, str]] = MappingProxyType({name: kind for kind, names in _ALIKE.items() for name in names})
_NAMES = {"uint8": "uint8", "uint16": "uint16", "int32": "int32", "float32": "float"}
_CODINGS: Final[Mapping[str, Coding]] = MappingProxyType(
    {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
)
_ENDIAN: Final[Mapping[str, Literal["<", ">"]]] = MappingProxyType({"little": "<", "big": ">"})
_ALIASES = {"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"}
_MILLIMETERS = ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "")
_VECTOR = re.compile(r"none|\([^()]*\)")


@dataclass(frozen=True)
class _Header:
    """A parsed header.

    Attributes:
        fields: Header fields as text, by lower-case name.
        shape: Number of voxels along the three spatial axes.
        affine: 4 x 4 matrix from voxels to RAS+ mm.
        voxels: Storage layout of the voxels.
        data: File of the voxels.
        offset: Size of the header if the voxels follow it, else 0.
        coding: Compression of the voxels.
    """

    fields: Mapping[str, str]
    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    voxels: Voxels
    data: Path
    offset: int
    coding: Coding


def read_grid(path: Path, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the checked grid of a file; only its header is read."""
    header = _read_header(path, max_voxels)
    return spatial_grid(header.shape, header.affine, spatial_dims, path, max_voxels)


def read(path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
    """Return the voxels `(C, x, y[, z])` and their grid; the options are those of `medseg.io.load`."""
    header = _read_header(path, options.max_voxels)
    grid = spatial_grid(header.shape, header.affine, options.spatial_dims, path, options.max_voxels)
    choose_channels((header.voxels.vector, *header.voxels.series), options.channels, options.index, path)
    with _data(header, path) as stream:
        array = read_voxels(stream, header.voxels, path, options)
    return array.reshape(len(array), *grid.shape), grid


def write(stream: BinaryIO, array: NDArray[Any], path: Path, *, grid: Grid, like: Path | None) -> None:
    """Write labels `(*spatial)` or channels `(C, *spatial)` to a stream, with gzip encoding.

    Args:
        stream: Stream to write to.
        array: Labels, or channels, which are stored interleaved.
        path: Not used; `.nrrd` is always compressed internally.
        grid: Geometry; written in LPS if `like` is None.
        like: NRRD file whose space, directions, origin and units are copied verbatim.
    """
    geometry = _new_geometry(grid) if like is None else _copied_geometry(_read_header(like, sys.maxsize).fields)
    sizes = (*grid.shape, *(1,) * (3 - len(grid.shape)))
    vector = array.ndim > len(grid.shape)
    fields: dict[str, str] = {
        "type": _NAMES[array.dtype.name],
        "dimension": str(3 + vector),
        "space": geometry["space"],
        "sizes": " ".join(str(size) for size in ((len(array), *sizes) if vector else sizes)),
        "space directions": ("none " if vector else "") + geometry["space directions"],
        "kinds": ("vector " if vector else "") + "domain domain domain",
        "endian": "little",
        "encoding": "gzip",
    }
    fields |= {name: geometry[name] for name in ("space origin", "space units") if name in geometry}
    text = "".join(f"{name}: {value}\n" for name, value in fields.items())
    stream.write(f"NRRD0004\n{text}\n".encode())
    with gzip_writer(stream) as packed:
        write_voxels(packed, array, array.dtype.newbyteorder("<"))


def _read_header(path: Path, max_voxels: int) -> _Header:
    with path.open("rb") as file:
        fields = _fields(file, path)
        offset = file.tell()
    sizes = _whole_numbers(fields, "sizes", path)
    check_size(sizes, path, max_voxels)
    vectors = _VECTOR.findall(_needed(fields, "space directions", path).lower())
    if len(sizes) != _whole_numbers(fields, "dimension", path)[0] or len(vectors) != len(sizes):
        raise CaseError(
            f"{path} has an inconsistent NRRD header: its dimension, sizes and space directions do not match."
        )
    spatial = [axis for axis, vector in enumerate(vectors) if vector != "none"]
    if len(spatial) != 3 or spatial[2] - spatial[0] != 2:
        raise CaseError(f"{path} has {len(spatial)} spatial axes, {spatial}: expected three consecutive ones.")
    before, shape, after = sizes[: spatial[0]], sizes[spatial[0] : spatial[2] + 1], sizes[spatial[2] + 1 :]
    affine = _affine(fields, [vectors[axis] for axis in spatial], path)
    voxels = Voxels(shape, _dtype(fields, path), series=after, vector=math.prod(before))
    data = path
    if "data file" in fields:
        data, offset = detached_data_file(path, fields["data file"]), 0
    return _Header(fields, shape, affine, voxels, data, offset, _coding(fields, path))


def _fields(file: BinaryIO, path: Path) -> dict[str, str]:
    """Read the header up to the empty line."""
    if not re.fullmatch(rb"NRRD000[1-5]\r?\n", file.readline(16)):
        raise CaseError(f"{path} is not an NRRD file: it does not start with NRRD0001 to NRRD0005.")
    fields: dict[str, str] = {}
    while line := file.readline(_MAX_HEADER):
        text = line.decode("utf-8", "replace").strip()
        if not text:
            break
        if file.tell() > _MAX_HEADER:
            raise CaseError(f"{path} is damaged: its NRRD header has more than {_MAX_HEADER:,} bytes.")
        if text.startswith("#") or _is_key(text):
            continue
        name, colon, value = text.partition(":")
        name = _ALIASES.get(name.strip().lower(), name.strip().lower())
        if not colon or name in fields:
            raise CaseError(f"{path} has a corrupt NRRD header: {'duplicate field ' if colon else ''}{text[:80]!r}.")
        fields[name] = value.strip()
    return fields


def _is_key(text: str) -> bool:
    """Return whether a line is a key/value pair, whose key may contain colons, such as `dicom:0010,0010:=A`."""
    return ":=" in text.partition(": ")[0]


def _needed(fields: Mapping[str, str], name: str, path: Path) -> str:
    if fields.get(name):
        return fields[name]
    if name in ("space", "space directions"):
        raise GeometryError(
            f"{path} has no valid orientation: its NRRD header has no '{name}', which readers interpret differently, "
            "left and right included. Write it again with a space and its directions."
        )
    raise CaseError(f"{path} is damaged: its NRRD header has no '{name}'.")


def _whole_numbers(fields: Mapping[str, str], name: str, path: Path) -> tuple[int, ...]:
    words = _needed(fields, name, path).split()
    if not all(re.fullmatch(r"[+-]?\d{1,18}", word) for word in words) or len(words) > 16:
        raise CaseError(f"{path} has a corrupt NRRD header: {name!r} is {fields[name][:80]!r}.")
    return tuple(int(word) for word in words)


def _affine(fields: Mapping[str, str], vectors: list[str], path: Path) -> NDArray[np.float64]:
    space = _needed(fields, "space", path)
    if space.lower() not in _SPACES:
        raise GeometryError(f"{path} has no valid orientation: its space is {space!r}, expected {', '.join(_SPACES)}.")
    units = re.findall(r'"([^"]*)"', fields.get("space units", ""))
    if any(unit.strip().lower() not in _MILLIMETERS for unit in units):
        raise GeometryError(f"{path} has the unsupported space units {units}: expected mm. Convert it.")
    if "space origin" not in fields:
        warn(logger, "origin-assumed", "no 'space origin' in the header; (0,0,0) is assumed", path)
    affine: NDArray[np.float64] = np.eye(4)
    columns = [*vectors, fields.get("space origin", "(0,0,0)")]
    for axis, vector in enumerate(columns):
        affine[:3, axis] = _numbers(vector, path)
    affine[:3] *= np.array(_SPACES[space.lower()])[:, None]
    return affine


def _numbers(vector: str, path: Path) -> list[float]:
    try:
        numbers = [float(word) for word in vector.strip("() \t").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3:
        raise GeometryError(
            f"{path} has the invalid vector {vector[:80]!r} in its NRRD header: expected three numbers."
        )
    return numbers


def _dtype(fields: Mapping[str, str], path: Path) -> np.dtype[Any]:
    kind = _needed(fields, "type", path).lower()
    if kind not in _TYPES:
        raise CaseError(f"{path} has the unsupported type {kind!r}: expected numbers, such as short or float.")
    dtype = np.dtype(_TYPES[kind])
    if dtype.itemsize == 1:
        return dtype
    endian = _needed(fields, "endian", path).lower()
    if endian not in _ENDIAN:
        raise CaseError(f"{path} has the invalid byte order {endian!r}: expected little or big.")
    return dtype.newbyteorder(_ENDIAN[endian])


def _coding(fields: Mapping[str, str], path: Path) -> Coding:
    encoding = _needed(fields, "encoding", path).lower()
    if encoding not in _CODINGS:
        raise CaseError(f"{path} has the unsupported encoding {encoding!r}: expected raw, gzip or bzip2. Convert it.")
    if fields.get("line skip", "0") != "0":
        raise CaseError(f"{path} has an unsupported 'line skip' of {fields['line skip']}: expected 0. Convert it.")
    return _CODINGS[encoding]


@contextmanager
def _data(header: _Header, path: Path) -> Iterator[BinaryIO]:
    """Open the data file at the first voxel."""
    skip = _whole_numbers({"byte skip": "0", **header.fields}, "byte skip", path)[0]
    needed = header.voxels.nbytes + max(skip, 0)
    check_capacity(header.data, header.coding, needed, skipped=header.offset)
    if skip < -1 or (header.coding != "raw" and not 0 <= skip <= _MAX_HEADER):
        raise CaseError(f"{path} is damaged: its 'byte skip' is {skip}.")
    with header.data.open("rb") as file:
        file.seek(header.data.stat().st_size - header.voxels.nbytes if skip < 0 else header.offset)
        with unpacked(file, header.coding) as stream:
            stream.seek(max(skip, 0), 1)
            yield stream


def _new_geometry(grid: Grid) -> dict[str, str]:
    columns = (grid.affine[:3] * np.array(_SPACES["lps"])[:, None] + 0.0).T
    vectors = [f"({','.join(repr(float(number)) for number in column)})" for column in columns]
    return {
        "space": "left-posterior-superior",
        "space directions": " ".join(vectors[:3]),
        "space origin": vectors[3],
        "space units": '"mm" "mm" "mm"',
    }


def _copied_geometry(fields: Mapping[str, str]) -> dict[str, str]:
    geometry = {name: fields[name] for name in ("space", "space origin", "space units") if name in fields}
    vectors = re.sub(r"\bnone\b", "", fields["space directions"], flags=re.IGNORECASE)
    return geometry | {"space directions": " ".join(vectors.split())}
