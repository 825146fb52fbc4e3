"""Reading: any image or label file becomes a channel-first MetaTensor with its place in space.

A format is a module with `read`, `read_grid` and `write`; a new one is a line in `FORMATS` and its suffixes in
`medseg.io.names`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import numpy as np
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray

from medseg.errors import CaseError, RequestError
from medseg.io import nifti, pictures
from medseg.io.geometry import MAX_VOXELS, Grid
from medseg.io.names import IMAGE_SUFFIXES, StrPath, absolute, file_kind
from medseg.io.voxels import refuse_nonfinite

__all__ = ["Format", "load", "read_grid"]


class Format(Protocol):
    """What a module of a format offers."""

    def read(
        self, path: Path, *, spatial_dims: int | None, channels: int | None, label: bool, max_voxels: int
    ) -> tuple[NDArray[Any], Grid]:
        """Return the voxels `(C, *spatial)`, float32 or as a label int32, and their grid."""

    def read_grid(self, path: Path, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
        """Return the grid without reading voxels."""

    def write(self, stream: Any, mask: NDArray[Any], path: Path, *, like: Path) -> None:
        """Write a checked label map on the grid of `like` into a binary stream."""


FORMATS = MappingProxyType({"nifti": cast("Format", nifti), "picture": cast("Format", pictures)})


def load(
    path: StrPath,
    *,
    spatial_dims: int | None = None,
    channels: int | None = None,
    label: bool = False,
    max_voxels: int = MAX_VOXELS,
) -> MetaTensor:
    """Read one file.

    Args:
        path: a NIfTI file (`.nii`, `.nii.gz`) or a picture (PNG, JPEG, TIFF, BMP).
        spatial_dims: 2 or 3 to refuse everything else; by default what the file is.
        channels: how many values per voxel are due. A fourth NIfTI axis counts as channels only if asked for here; by
            default volumes have one channel, and pictures one or three.
        label: read whole numbers instead of intensities; a label has one channel.
        max_voxels: the largest number of values that a header may claim.

    Returns:
        `(C, x, y[, z])`; float32, with the file's scale factors applied, or int32 for a label. The affine is 4 x 4
        float64, from voxels to RAS+ mm. The metadata are those that MONAI's transforms need: `filename_or_obj`,
        `original_affine`, `spatial_shape`, `space`, `original_channel_dim`.

    Raises:
        CaseError: the file is missing, unreadable, damaged, of another kind than asked for, or has values that are no
            numbers.
        GeometryError: its place in space is undefined (see `Grid.check`).
    """
    file, reader = _door(path)
    with _decoding(file):
        array, grid = reader.read(
            file,
            spatial_dims=spatial_dims,
            channels=1 if label and channels is None else channels,
            label=label,
            max_voxels=max_voxels,
        )
    if not label:
        refuse_nonfinite(array, file)
    meta = {
        "filename_or_obj": str(file),
        "original_affine": grid.affine.copy(),
        "spatial_shape": np.asarray(grid.shape),
        "space": "RAS",
        "original_channel_dim": 0,
    }
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(grid.affine.copy()), meta=meta)


def read_grid(path: StrPath, *, spatial_dims: int | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return where a file lies in space, from its header alone; checks and errors as in `load`."""
    file, reader = _door(path)
    with _decoding(file):
        return reader.read_grid(file, spatial_dims=spatial_dims, max_voxels=max_voxels)


def _door(path: StrPath) -> tuple[Path, Format]:
    if not isinstance(path, str | os.PathLike):
        raise RequestError(f"An image is read from a path: expected text, got {type(path).__name__}.")
    file = absolute(path)
    if not file.exists():
        raise CaseError(f"{file} does not exist: check the path.")
    if file.is_dir():
        raise CaseError(f"{file} is a folder: expected a file.")
    kind = file_kind(file)
    if kind is None:
        raise CaseError(f"{file} is in no format that medseg reads: expected {', '.join(IMAGE_SUFFIXES)}.")
    if file.stat().st_size == 0:
        raise CaseError(f"{file} is empty (0 bytes): copy it again.")
    return file, FORMATS[kind]


@contextmanager
def _decoding(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise CaseError(f"{file} is damaged or cut short ({error}): copy it again.") from error
    except OSError as error:
        raise CaseError(f"{file} cannot be read ({error.strerror or error}).") from error
    except MemoryError as error:
        raise CaseError(f"{file} does not fit into memory.") from error
