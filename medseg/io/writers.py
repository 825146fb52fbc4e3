"""Writing: a label map goes onto exactly the grid of the image it was made from, completely or not at all."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.errors import GeometryError, OutputError
from medseg.files import replacing
from medseg.io.names import KINDS, StrPath, absolute, file_kind
from medseg.io.readers import read_grid
from medseg.io.voxels import smallest_label_type

__all__ = ["WRITERS", "Writer", "write_mask"]


class Writer(Protocol):
    """What a module that writes a format offers."""

    def write(self, stream: BinaryIO, mask: NDArray[Any], path: Path, *, like: Path) -> None:
        """Write a checked label map on the grid of `like` into a stream."""


# Kind of file -> the module that writes it.
WRITERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "nifti": "medseg.io.nifti",
        "picture": "medseg.io.pictures",
    }
)


def write_mask(mask: torch.Tensor | NDArray[Any], path: StrPath, *, like: StrPath) -> None:
    """Write a label map on the grid of its source image.

    The mask of a NIfTI file is a NIfTI file of the same version and byte order. Its dimensions, spacings, units, sform
    and qform with their codes are the source's bit for bit; scale factors, display range, texts and extensions, which
    may name the patient, are not taken over. The mask of a 4D file of several channels or times is 3D. The mask of a
    picture is a grey PNG of 8 or 16 bits, also for a JPEG, whose compression would change labels.

    The type is uint8, uint16 or int32, the first that holds the largest label. The file appears under its name when it
    is complete; an older one is replaced. Equal masks give equal bytes.

    Args:
        mask: whole numbers of 0 or more, of any type, shape `(x, y)` or `(x, y, z)`.
        path: where to write; `.nii` or `.nii.gz` for a volume, `.png` for a picture. Its folder is made if missing.
        like: the image file that the mask belongs to.

    Raises:
        GeometryError: the mask has another shape than the image.
        CaseError: the mask holds something else than labels, or the image cannot be read any more.
        OutputError: the file cannot be written there, or would replace the image itself.
    """
    target, source = absolute(path), absolute(like)
    array = _to_numpy(mask)
    grid = read_grid(source, max_voxels=sys.maxsize)
    if grid.shape not in (array.shape, (*array.shape, 1)):
        raise GeometryError(
            f"The mask for {source} has the shape {array.shape}: expected {grid.shape}. Invert the preprocessing first."
        )
    _refuse_target(target, source)
    labels = array.astype(smallest_label_type(array, target), copy=False)
    writer = cast("Writer", importlib.import_module(WRITERS[str(file_kind(source))]))
    with replacing(target) as part, part.open("xb") as stream:
        writer.write(stream, labels, target, like=source)


def _to_numpy(mask: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    if not isinstance(mask, torch.Tensor):
        return np.asarray(mask)
    plain = mask.detach().as_subclass(torch.Tensor).cpu()
    return np.asarray(plain.float() if plain.dtype == torch.bfloat16 else plain)


def _refuse_target(target: Path, source: Path) -> None:
    suffixes = KINDS[str(file_kind(source))].masks
    if not target.name.lower().endswith(suffixes):
        raise OutputError(f"{target} cannot hold the mask of {source}: expected a name in {' or '.join(suffixes)}.")
    if target.exists() and target.samefile(source):
        raise OutputError(f"{target} is the image itself: choose another folder for the masks.")
