"""Reading: any image or label file becomes a channel-first MetaTensor with its place in space.

A format is a module with `read` and `read_grid`, imported with the first file, and an entry in
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

__all__ = ["Reader", "find_reader", "load", "placed_tensor", "read_grid"]

logger = logging.getLogger(__name__)


class Reader(Protocol):
    """What a module that reads a format offers."""

    def read(self, path: Path, options: ReadOptions) -> tuple[NDArray[Any], Grid]:
        """Return the voxels `(C, *spatial)` and their grid.

        The options are those of `load`. The voxels are float32, or of a label int32, or with `stored` the file's own
        uint8, int16 or int32 where `medseg.io.voxels.image_type` says so.
        """

    def read_grid(self, path: Path, *, spatial_dims: int | None = None, max_voxels: int = ...) -> Grid:
        """Return the grid without reading voxels."""


def find_reader(kind: str) -> Reader:
    """Import and return the module that reads a format, a key of `FORMATS`."""
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
    """Read one file.

    Args:
        path: a volume (NIfTI, NRRD, MetaImage, MGH) or a picture (PNG, JPEG, TIFF, BMP), told by its name; or DICOM,
            told by its content: a folder, one file, a DICOMDIR or a zip archive, of several series one as
            `folder::series` (see `medseg.io.dicom.open_series`). Or an image in memory (see `medseg.io.memory`).
        spatial_dims: 2 or 3 to refuse everything else; by default what the file is.
        channels: how many values per voxel are due. A fourth axis counts as channels only if asked for here; by
            default volumes have one channel, and pictures one or three.
        index: which volume of a series to take, from 0: the place on the one axis beyond space that has several
            entries. By default such a file is refused.
        label: read whole numbers instead of intensities; a label has one channel. DICOM SEG and RT-STRUCT are read by
            `load_label`.
        dtype: "stored" keeps the whole numbers of a file as uint8, int16 or int32 where that loses nothing, which
            needs half the memory for a CT; other files become float32 all the same.
        max_voxels: Largest number of values that a header may claim; 2^31 by default.

    Returns:
        `(C, x, y[, z])`; float32, with the file's scale factors applied, or int32 for a label, or as `dtype` says. The
        affine is 4 x 4 float64, from voxels to RAS+ mm. The metadata are those that MONAI's transforms need:
        `filename_or_obj`, `original_affine`, `spatial_shape`, `space`, `original_channel_dim`.

    Raises:
        CaseError: the file is missing, unreadable, damaged, of another kind than asked for, or has values that are no
            numbers.
        GeometryError: its place in space is undefined (see `Grid.check`).
    """
    if dtype not in ("float32", "stored"):
        raise RequestError(f"An image is read as 'float32' or as 'stored', got {dtype!r}.")
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
    return placed_tensor(array, grid, file)


def placed_tensor(array: NDArray[Any], grid: Grid, file: Path) -> MetaTensor:
    """Return voxels `(C, *spatial)` with their place in space and the metadata that `load` promises."""
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
    """Return where a file lies in space, from its header alone; checks and errors as in `load`."""
    file, reader = _resolve(path)
    limit = {} if max_voxels is None else {"max_voxels": max_voxels}
    with _decoding(file):
        return reader.read_grid(file, spatial_dims=spatial_dims, **limit)


def _source(image: StrPath | MemoryImage) -> tuple[Path, Callable[[Path, ReadOptions], tuple[NDArray[Any], Grid]]]:
    """Return the file, or the name of an image in memory, and what reads it."""
    if isinstance(image, str | os.PathLike):
        file, reader = _resolve(image)
        return file, reader.read
    from medseg.io.memory import MemoryImage, memory_image

    wrapped = image if isinstance(image, MemoryImage) else memory_image(image)
    return Path(wrapped.name), wrapped.read


def _resolve(path: StrPath) -> tuple[Path, Reader]:
    if not isinstance(path, str | os.PathLike):
        raise RequestError(f"A header is read from a path: expected text, got {type(path).__name__}.")
    file = absolute(path)
    source, _ = split_series(file)
    if not source.exists():
        raise CaseError(f"{source} does not exist: check the path.", code="missing", path=source)
    if not (source.is_file() or source.is_dir()):  # opening it might never end
        text = f"{source} is a pipe or device: expected a regular file. Copy what it gives to one."
        raise CaseError(text, code="format", path=source)
    kind = image_kind(file)
    if kind is None:
        text = f"{file} is in no format that medseg reads: expected {', '.join(IMAGE_SUFFIXES)}, or DICOM."
        raise CaseError(text, code="format", path=file)
    if source.is_file() and source.stat().st_size == 0:
        raise CaseError(f"{file} is empty (0 bytes): copy it again.", code="damaged", path=file)
    if not FORMATS[kind].module:
        raise CaseError(
            f"{file} is a whole-slide image, too large to be read as one picture: `medseg predict` takes it with a "
            "bundle for color pictures, and medseg.io.slides.open_slide reads it in pieces.",
            code="format",
            path=file,
        )
    return file, find_reader(kind)


@contextmanager
def _decoding(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error) as error:
        text = f"{file} is damaged or cut short ({error}): copy it again."
        raise CaseError(text, code="damaged", path=file) from error
    except OSError as error:
        raise CaseError(f"{file} cannot be read ({error.strerror or error}).", path=file) from error
    except MemoryError as error:
        raise CaseError(f"{file} does not fit into memory.", code="memory", path=file) from error
