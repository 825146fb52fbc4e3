"""Voxel streams, compressed or raw, read slab by slab: no more memory than the image and a few slices.

The volume formats share this layout: a header, then the voxels of one real type with the first axis fastest. The
compression is detected by the first bytes, not by the file name. ISA-L is about three times as fast as zlib.
"""

from __future__ import annotations

import bz2
import io
import math
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias, cast

import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from medseg.errors import CaseError
from medseg.io.voxels import ReadOptions, choose_channels, fill_image, fill_labels, image_type

__all__ = [
    "Coding",
    "Sink",
    "Voxels",
    "check_capacity",
    "coding_of",
    "detached_data_file",
    "gzip_writer",
    "opened",
    "read_voxels",
    "unpacked",
    "write_voxels",
]

Coding: TypeAlias = Literal["raw", "gzip", "zlib", "bzip2"]

# Maximum compression ratio of deflate; a header that claims more is wrong. The bound of bzip2 is too high to be useful.
_MAX_PACKING = {"raw": 1, "gzip": 1032, "zlib": 1032}
_SLAB_BYTES = 24 << 20
# Keeps equal pixels of neighboring slices out of one cache set, which makes transposing twice as fast.
_PADDING_BYTES = 192
_PADDED_FROM = 1 << 12
# Rows transposed at a time when writing, so that what is read once is used while it is in the cache.
_BLOCK = 16
# ISA-L has levels 0 to 3; label maps become as small as with zlib's level 4, in a fraction of the time.
_LEVEL = 2
_ISAL_ERROR = cast("type[Exception]", isal_zlib.error)
_ANY_DEFLATE = 47  # zlib or gzip, detected by the first bytes


@dataclass(frozen=True)
class Voxels:
    """Storage layout of the voxels of a file, the first axis fastest.

    Attributes:
        shape: Number of voxels along each spatial axis.
        dtype: Type of the stored values, with byte order.
        series: Sizes of the axes after the spatial ones.
        vector: Number of interleaved values per voxel.
        slope: Scale factor of the stored values.
        inter: Offset added after scaling.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    series: tuple[int, ...] = ()
    vector: int = 1
    slope: float = 1.0
    inter: float = 0.0

    @property
    def nbytes(self) -> int:
        """Uncompressed size of all voxels in bytes."""
        return math.prod((*self.shape, *self.series)) * self.vector * self.dtype.itemsize


def coding_of(path: Path) -> Coding:
    """Return "gzip" if the file is gzipped as a whole, else "raw"."""
    with path.open("rb") as file:
        return "gzip" if file.read(2) == b"\x1f\x8b" else "raw"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressing it if its content is gzipped."""
    with path.open("rb") as file, unpacked(file, coding_of(path)) as stream:
        yield stream


@contextmanager
def unpacked(file: BinaryIO, coding: Coding) -> Iterator[BinaryIO]:
    """Decompress the rest of `file`; `file` stays open.

    Damaged content raises EOFError, OSError or zlib.error, which `medseg.io.readers.load` converts.
    """
    try:
        if coding == "raw":
            yield file
        elif coding == "gzip":
            with _gzip_file(fileobj=file, mode="rb") as stream:
                yield stream
        elif coding == "zlib":
            yield cast("BinaryIO", io.BufferedReader(_Inflated(file), 1 << 16))
        else:
            with bz2.BZ2File(file) as unpacker:
                yield cast("BinaryIO", unpacker)
    except _ISAL_ERROR as error:
        raise zlib.error(str(error)) from error


def _gzip_file(**options: Any) -> BinaryIO:
    return cast("BinaryIO", cast("Any", igzip.IGzipFile)(**options))


class _Inflated(io.RawIOBase):
    """The content of one zlib stream."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._inflater = isal_zlib.decompressobj(_ANY_DEFLATE)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._inflater.eof:
            packed = self._inflater.unconsumed_tail or self._file.read(1 << 16)
            data = self._inflater.decompress(packed, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            if not packed:
                raise EOFError("its compressed data end too early")
        return 0


def check_capacity(path: Path, coding: Coding, needed: int, *, skipped: int = 0) -> None:
    """Refuse a file that is too short for its header, before memory is allocated.

    Args:
        path: File of the voxels.
        coding: Compression of the voxels.
        needed: Uncompressed size in bytes according to the header.
        skipped: Number of bytes in the file before the voxels.

    Raises:
        CaseError: The file is too short.
    """
    size = path.stat().st_size - skipped
    if coding in _MAX_PACKING and needed > size * _MAX_PACKING[coding]:
        raise CaseError(
            f"{path} is truncated or has a wrong header: its voxels need {needed:,} bytes, but the file has "
            f"{max(size, 0):,}{'' if coding == 'raw' else ' (compressed)'}. Copy it again."
        )


def detached_data_file(header: Path, name: str) -> Path:
    """Return the detached data file that a header names.

    Raises:
        CaseError: The file is outside the folder of the header, does not exist, or is the header itself.
    """
    folder = header.parent.resolve()
    if not name or "\0" in name or not (folder / name).resolve().is_relative_to(folder):
        raise CaseError(f"{header} has an invalid data file {name!r}: expected a file in its own folder or below.")
    path = header.parent / name
    if not path.is_file():
        raise CaseError(f"{header} has no data file: {name!r} is missing. Copy it beside the header.")
    if path.samefile(header):
        raise CaseError(f"{header} is damaged: it names itself as its data file.")
    return path


def read_voxels(
    stream: BinaryIO,
    voxels: Voxels,
    source: Path,
    options: ReadOptions,
) -> NDArray[Any]:
    """Read the voxels `(C, *spatial)` from a stream; the options are those of `medseg.io.load`."""
    chosen = choose_channels((voxels.vector, *voxels.series), options.channels, options.index, source)
    dtype = image_type(voxels.dtype, slope=voxels.slope, inter=voxels.inter, stored=options.stored)
    array = np.empty((len(chosen), *voxels.shape), dtype=np.int32 if options.label else dtype)
    interleaved = voxels.vector > 1
    if not interleaved:
        _skip(stream, chosen.start * math.prod(voxels.shape) * voxels.dtype.itemsize)
    parts = _vector_slabs if interleaved else _planar_slabs
    with closing(_prefetched(parts(stream, voxels, array, chosen, source))) as slabs:
        for out, raw in slabs:
            if options.label:
                fill_labels(out, raw, voxels.slope, voxels.inter, source)
            else:
                fill_image(out, raw, voxels.slope, voxels.inter, source)
    stream.read(1 << 20)  # the checksum is verified only at the end of the stream
    return array


_Slabs: TypeAlias = Generator[tuple[NDArray[Any], NDArray[Any]], None, None]


def _planar_slabs(stream: BinaryIO, voxels: Voxels, array: NDArray[Any], chosen: range, source: Path) -> _Slabs:
    """Yield views of `array` with the stored values for them, in the order of the file."""
    for channel in array:
        for start, stop in _steps(channel.shape, voxels.dtype.itemsize):
            out = channel[..., start:stop]
            yield out, _stored(stream, voxels.dtype, out.shape, source)


def _vector_slabs(stream: BinaryIO, voxels: Voxels, array: NDArray[Any], chosen: range, source: Path) -> _Slabs:
    for start, stop in _steps((voxels.vector, *voxels.shape), voxels.dtype.itemsize):
        out = array[..., start:stop]
        raw = _stored(stream, voxels.dtype, (voxels.vector, *out.shape[1:]), source)
        yield out, raw[chosen.start : chosen.stop]


def _steps(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Split the last axis of a shape into slabs of about `_SLAB_BYTES`."""
    step = max(1, _SLAB_BYTES // (math.prod(shape[:-1]) * itemsize))
    for start in range(0, shape[-1], step):
        yield start, min(start + step, shape[-1])


def _stored(stream: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...], source: Path) -> NDArray[Any]:
    """Read an array with its first axis fastest, one slice of the last axis after the other."""
    raw = _slices(shape, dtype)
    for part in [raw.reshape(-1)] if raw.flags.c_contiguous else raw:
        _fill(stream, part.view(np.uint8).data, source)
    return raw.reshape(shape[::-1]).T


def _slices(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Allocate an array with its first axis fastest: one row for each slice of the last axis."""
    size = math.prod(shape[:-1])
    padding = _PADDING_BYTES // dtype.itemsize if size * dtype.itemsize >= _PADDED_FROM else 0
    return np.empty((shape[-1], size + padding), dtype=dtype)[:, :size]


def _fill(stream: BinaryIO, part: memoryview, source: Path) -> None:
    filled = 0
    while filled < len(part):
        count = cast("Any", stream).readinto(part[filled:])
        if not count:
            raise CaseError(f"{source} is truncated: its voxels end earlier than its header says. Copy it again.")
        filled += count


def _skip(stream: BinaryIO, count: int) -> None:
    """Skip `count` uncompressed bytes."""
    while count > 0:
        passed = len(stream.read(min(count, 1 << 20)))
        if not passed:
            raise EOFError("it ends before its voxels start")
        count -= passed


def _prefetched(parts: _Slabs) -> _Slabs:
    """Yield the slabs of `parts` while a thread prefetches the next one."""
    with ThreadPoolExecutor(1) as worker:
        upcoming = worker.submit(next, parts, None)
        while (part := upcoming.result()) is not None:
            upcoming = worker.submit(next, parts, None)
            yield part


@contextmanager
def gzip_writer(stream: BinaryIO) -> Iterator[BinaryIO]:
    """Compress into `stream` with gzip; without time stamp and name, so that equal content gives equal bytes."""
    with _gzip_file(filename="", mode="wb", compresslevel=_LEVEL, fileobj=stream, mtime=0) as packed:
        yield packed


class Sink(Protocol):
    """A target that bytes are written to."""

    def write(self, data: memoryview, /) -> Any:
        """Write some bytes."""


def write_voxels(stream: Sink, array: NDArray[Any], dtype: np.dtype[Any]) -> None:
    """Write an array with its first axis fastest, converted to `dtype`."""
    for start, stop in _steps(array.shape, dtype.itemsize):
        part = array[..., start:stop]
        raw = _slices(part.shape, dtype)
        transposed = raw.reshape(part.shape[::-1])
        for block in range(0, len(part), _BLOCK):
            transposed[..., block : block + _BLOCK] = part[block : block + _BLOCK].T
        for row in [raw.reshape(-1)] if raw.flags.c_contiguous else raw:
            stream.write(row.view(np.uint8).data)
