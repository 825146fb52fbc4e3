"""Reading image and label files as channel-first MetaTensors with their geometry.

A format is a module with `read` and `read_grid`, imported with its first file, and an entry in
`medseg.io.formats.FORMATS`.
"""

from __future__ import annotations

import importlib
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from medseg.errors import CaseError, RequestError
from medseg.io.dicom.detect import image_kind, split_series
from medseg.io.formats import FORMATS
from medseg.io.names import IMAGE_SUFFIXES, StrPath, absolute
from medseg.notices import warn

if TYPE_CHECKING:
    from monai.data import MetaTensor
    from numpy.typing import NDArray

    from medseg.io.geometry import Grid
    from medseg.io.memory import MemoryImage
    from medseg.io.voxels import ReadOptions

__all__ = ["Reader", "find_reader", "load", "read_grid", "to_meta_tensor"]

logger = logging.getLogger(__name__)


class Reader(Protocol):
    """Interface of a module that reads a format."""

    def read(self, path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
        """Return the voxels `(C, *spatial)` and their grid.

        The options are those of `load`. The voxels are float32, for a label int32, or with `stored` uint8, int16 or
        int32 as determined by `medseg.io.voxels.image_type`.
        """

    def read_grid(self, path: Path, *, spatial_dims: int | None = None, max_voxels: int = ...) -> Grid:
        """Return the grid from the header, without reading voxels."""


def find_reader(kind: str) -> Reader:
    """Return the reader module of a format, a key of `FORMATS`."""
    return cast("Reader", importlib.import_module(FORMATS[kind].module))


def load(
    path: StrPath | MemoryImage,
    *,
    spatial_dims: int | None = None,
    channels: int | None = None,
    index: int | None = None,
    label: bool = False,
    dtype: Literal["float32", "stored"] = "float32",
    max_voxels: int | None = None,
) -> MetaTensor:
    """Read one image or label.

    Args:
        path: Volume (NIfTI, NRRD, MetaImage, MGH) or 2D image (PNG, JPEG, TIFF, BMP), recognized by its suffix; or
            DICOM, recognized by its content: a folder, file, DICOMDIR or zip archive, with `folder::series` to select
            one of several series (see `medseg.io.dicom.open_series`). Or an image in memory (see `medseg.io.memory`).
        spatial_dims: Required number of spatial dimensions, 2 or 3; by default that of the file.
        channels: Expected number of channels. A fourth axis is read as channels only if requested here; by default
            volumes have one channel, and 2D images one or three.
        index: Index from 0 of the volume to read from a time series or other stack of volumes, along the only
            non-spatial axis longer than 1. By default such a file is refused.
        label: Read integer labels instead of intensities; a label has one channel. DICOM SEG and RT-STRUCT are read by
            `load_label`.
        dtype: "stored" keeps integers as uint8, int16 or int32 if that is lossless, which halves the memory of a CT;
            all other images become float32.
        max_voxels: Largest number of values that a header may claim; 2^31 by default.

    Returns:
        Image `(C, x, y[, z])`: float32 with scale factors applied, int32 for a label, or the type chosen by `dtype`.
        The affine is 4 x 4 float64, from voxels to RAS+ mm. The metadata are those that MONAI's transforms need:
        `filename_or_obj`, `original_affine`, `spatial_shape`, `space`, `original_channel_dim`.

    Raises:
        CaseError: The file is missing, unreadable, damaged, not of the requested kind, or has non-finite values.
        GeometryError: The image has no valid geometry (see `Grid.check`).
    """
    if dtype not in ("float32", "stored"):
        raise RequestError(f"Invalid dtype {dtype!r}: expected 'float32' or 'stored'.")
    file, read = _source(path)
    import numpy as np

    from medseg.io.geometry import MAX_VOXELS
    from medseg.io.voxels import ReadOptions, refuse_nonfinite

    options = ReadOptions(
        spatial_dims=spatial_dims,
        channels=1 if label and channels is None else channels,
        index=index,
        label=label,
        stored=dtype == "stored",
        max_voxels=MAX_VOXELS if max_voxels is None else max_voxels,
    )
    with _decoding(file):
        array, grid = read(file, options)
    if array.dtype.kind == "f":
        refuse_nonfinite(array, file)
    if len(grid.shape) == 3 and np.array_equal(np.abs(grid.affine), np.eye(4)):
        text = "suspicious identity affine (1 mm voxels, origin 0); the geometry may have been lost"
        warn(logger, "identity-affine", text, file)
    return to_meta_tensor(array, grid, file)


def to_meta_tensor(array: NDArray[Any], grid: Grid, file: Path) -> MetaTensor:
    """Return voxels `(C, *spatial)` as a MetaTensor with the affine and metadata described in `load`."""
    import numpy as np
    import torch
    from monai.data import MetaTensor

    meta = {
        "filename_or_obj": str(file),
        "original_affine": grid.affine.copy(),
        "spatial_shape": np.asarray(grid.shape),
        "space": "RAS",
        "original_channel_dim": 0,
    }
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(grid.affine.copy()), meta=meta)


def read_grid(path: StrPath, *, spatial_dims: int | None = None, max_voxels: int | None = None) -> Grid:
    """Return the grid of a file from its header alone; checks and errors as in `load`."""
    file, reader = _resolve(path)
    limit = {} if max_voxels is None else {"max_voxels": max_voxels}
    with _decoding(file):
        return reader.read_grid(file, spatial_dims=spatial_dims, **limit)


def _source(image: StrPath | MemoryImage) -> tuple[Path, Callable[[Path, ReadOptions], tuple[NDArray[Any], Grid]]]:
    """Return the file, or the name of an image in memory, and its read function."""
    if isinstance(image, str | os.PathLike):
        file, reader = _resolve(image)
        return file, reader.read
    from medseg.io.memory import MemoryImage, memory_image

    wrapped = image if isinstance(image, MemoryImage) else memory_image(image)
    return Path(wrapped.name), wrapped.read


def _resolve(path: StrPath) -> tuple[Path, Reader]:
    if not isinstance(path, str | os.PathLike):
        raise RequestError(f"Invalid path: expected a string or path, got {type(path).__name__}.")
    file = absolute(path)
    source, _ = split_series(file)
    if not source.exists():
        raise CaseError(f"{source} does not exist: check the path.", code="missing", path=source)
    if not (source.is_file() or source.is_dir()):  # opening it might never end
        text = f"{source} is a pipe or device: expected a regular file. Copy its content to one."
        raise CaseError(text, code="format", path=source)
    kind = image_kind(file)
    if kind is None:
        text = f"{file} has an unsupported format: expected {', '.join(IMAGE_SUFFIXES)}, or DICOM."
        raise CaseError(text, code="format", path=file)
    if source.is_file() and source.stat().st_size == 0:
        raise CaseError(f"{file} is empty (0 bytes): copy it again.", code="damaged", path=file)
    if not FORMATS[kind].module:
        raise CaseError(
            f"{file} is a whole-slide image, too large to be read as a whole: use `medseg predict` with a bundle for "
            "2D color images, or read regions with medseg.io.slides.open_slide.",
            code="format",
            path=file,
        )
    return file, find_reader(kind)


@contextmanager
def _decoding(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error) as error:
        text = f"{file} is damaged or truncated ({error}): copy it again."
        raise CaseError(text, code="damaged", path=file) from error
    except OSError as error:
        raise CaseError(f"{file} cannot be read ({error.strerror or error}).", path=file) from error
    except MemoryError as error:
        raise CaseError(
            f"{file} does not fit into memory: free memory, or use a machine with more.", code="memory", path=file
        ) from error
