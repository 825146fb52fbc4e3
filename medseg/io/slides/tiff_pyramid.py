"""Label images of slides as tiled, compressed, pyramidal TIFF, written in a stream.

The first level holds the labels; each further one holds every fourth pixel of its predecessor, as a SubIFD, so that
plain TIFF readers see a single image. Equal labels give equal bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
from numpy.typing import NDArray

from medseg.errors import RequestError
from medseg.extras import require
from medseg.files import replacing
from medseg.io.names import StrPath, absolute

__all__ = ["require_tifffile", "write_label_pyramid"]

_TILE: Final = 512
_STEP: Final = 4
# Levels of at most this size are not reduced further.
_SMALL: Final = 1024
# Beyond this, offsets may need more than 32 bits.
_CLASSIC_BYTES: Final = 1 << 31

Labels = NDArray[np.integer[Any]]


def require_tifffile() -> Any:
    """Return the module tifffile.

    Raises:
        RequestError: The package tifffile is not installed.
    """
    return require("tifffile", "Writing label images of slides")


def write_label_pyramid(
    strips: Iterable[Labels],
    path: StrPath,
    shape: tuple[int, int],
    *,
    microns_per_pixel: tuple[float, float] | None = None,
) -> Path:
    """Write labels that arrive in strips; the file is created atomically after the last one.

    A band of 512 rows is held in memory; smaller levels are buffered in temporary files beside `path`.

    Args:
        strips: Strips `(width, rows)` of uint8 from top to bottom, `shape` in total.
        path: File to write.
        shape: Size `(width, height)` of the label image.
        microns_per_pixel: Resolution in µm/px along x and y, written to the resolution tags.

    Raises:
        RequestError: The package tifffile is not installed, or the labels are not uint8.
        OutputError: The file cannot be written.
    """
    tifffile = require_tifffile()
    target = absolute(path)
    sizes = _sizes(shape)
    options: dict[str, Any] = {
        "dtype": np.uint8,
        "tile": (_TILE, _TILE),
        "compression": "zlib",
        "photometric": "minisblack",
        "metadata": None,
        "software": False,
        # More workers would iterate over the strips from several threads.
        "maxworkers": 1,
    }
    if microns_per_pixel is not None:
        options |= {"resolution": tuple(1e4 / side for side in microns_per_pixel), "resolutionunit": "CENTIMETER"}
    with replacing(target) as temporary, ExitStack() as exits:
        waiting = [exits.enter_context(tempfile.TemporaryFile(dir=target.parent)) for _ in sizes[1:]]
        writer = exits.enter_context(tifffile.TiffWriter(temporary, bigtiff=shape[0] * shape[1] > _CLASSIC_BYTES))
        for level, size in enumerate(sizes):
            bands = _bands(strips) if level == 0 else _read_back(cast("BinaryIO", waiting[level - 1]), size)
            smaller = cast("BinaryIO", waiting[level]) if level < len(waiting) else None
            writer.write(
                _tiles(bands, smaller),
                shape=size[::-1],
                subifds=len(sizes) - 1 if level == 0 else None,
                subfiletype=1 if level else 0,
                **options,
            )
    return target


def _sizes(shape: tuple[int, int]) -> list[tuple[int, int]]:
    sizes = [shape]
    while max(sizes[-1]) > _SMALL:
        width, height = sizes[-1]
        sizes.append((-(-width // _STEP), -(-height // _STEP)))
    return sizes


def _bands(strips: Iterable[Labels]) -> Iterator[NDArray[np.uint8]]:
    """Regroup strips of any height to bands `(rows, width)` of 512 rows, the last one shorter."""
    held: list[NDArray[np.uint8]] = []
    count = 0
    for strip in strips:
        if strip.dtype != np.uint8:
            raise RequestError(
                f"Invalid labels of type {strip.dtype}: a label image stores uint8 only. Write polygons instead."
            )
        rows = strip.T.astype(np.uint8)
        while count + len(rows) >= _TILE:
            fits = _TILE - count
            yield np.concatenate([*held, rows[:fits]])
            held, count, rows = [], 0, rows[fits:]
        if len(rows):
            held.append(rows)
            count += len(rows)
    if held:
        yield np.concatenate(held)


def _tiles(bands: Iterable[NDArray[np.uint8]], smaller: BinaryIO | None) -> Iterator[NDArray[np.uint8]]:
    """Yield the tiles of bands, and buffer every fourth pixel for the next level."""
    for band in bands:
        if smaller is not None:
            smaller.write(band[::_STEP, ::_STEP].tobytes())
        rows, width = band.shape
        padded = np.pad(band, ((0, _TILE - rows), (0, -width % _TILE)))
        for left in range(0, width, _TILE):
            yield np.ascontiguousarray(padded[:, left : left + _TILE])


def _read_back(stream: BinaryIO, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    stream.seek(0)
    width, _ = size
    while content := stream.read(width * _TILE):
        yield np.frombuffer(content, np.uint8).reshape(-1, width)
