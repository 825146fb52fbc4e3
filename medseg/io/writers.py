"""Writing labels and probabilities in the geometry of their image, atomically."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.errors import CaseError, GeometryError, OutputError, RequestError
from medseg.files import replacing
from medseg.io.formats import FORMATS, Format
from medseg.io.geometry import Grid
from medseg.io.names import OUTPUT_FORMATS, StrPath, absolute, case_kind, file_kind, mask_name, split_suffix
from medseg.io.readers import read_grid
from medseg.io.voxels import label_values, smallest_label_type
from medseg.notices import warn

__all__ = [
    "Writer",
    "to_numpy",
    "warn_of_unnamed",
    "write_label_files",
    "write_mask",
    "write_probabilities",
]

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Interface of a module that writes a format."""

    def write(self, stream: BinaryIO, array: NDArray[Any], path: Path, *, grid: Grid, like: Path | None) -> None:
        """Write labels `(*spatial)`, or channels `(C, *spatial)`, to a stream.

        Args:
            stream: Seekable binary stream at its beginning.
            array: Checked labels of type uint8, uint16 or int32 in the shape of the grid, or channels of type uint8 or
                float32.
            path: File name, for its suffix and for messages.
            grid: Geometry of the voxels.
            like: File of the same format whose geometry fields are copied bit for bit; None to write `grid`.
        """


_PROBABILITY_TYPES = ("uint8", "float16", "float32")
_MAX_NAME = 100
_SHOWN = 5


def write_mask(mask: torch.Tensor | NDArray[Any], path: StrPath, *, like: StrPath) -> None:
    """Write a label map in the geometry of its source image.

    The suffix of `path` selects the format. In the format of the source, the geometry fields are copied bit for bit, in
    NIfTI also version and byte order; other formats store the grid as precisely as they can. Texts, scale factors,
    display ranges and extensions, which may identify the patient, are never copied. The mask of an image with several
    channels or time points is 3D. The mask of a 2D image is an 8 or 16 bit grayscale PNG or TIFF, also for a JPEG,
    whose compression would change labels.

    The type is the smallest of uint8, uint16 and int32 that holds the largest label (MGH has no uint16). The file is
    written atomically and replaces an existing one. Equal masks give equal bytes.

    Args:
        mask: Label map `(x, y)` or `(x, y, z)` of non-negative integers, of any type.
        path: File to write, with one of the `written` suffixes of `medseg.io.formats.FORMATS`. Its folder is created
            if missing.
        like: Path of the image that the mask belongs to.

    Raises:
        GeometryError: The shapes of mask and image differ.
        CaseError: The mask has values that are not labels, or the image can no longer be read.
        OutputError: The file cannot be written, or is the image itself.
    """
    target, source = absolute(path), absolute(like)
    grid = read_grid(source, max_voxels=sys.maxsize)
    labels = _on_grid(to_numpy(mask), grid, source)
    _refuse_target(target, source, grid, list(FORMATS.values()))
    _write(labels.astype(smallest_label_type(labels, target), copy=False), target, grid=grid, source=source)


def write_label_files(
    mask: torch.Tensor | NDArray[Any], path: StrPath, *, like: StrPath, labels: Mapping[int, str] | None = None
) -> dict[int, Path]:
    """Write one binary mask for each label, such as `case1_liver.nii.gz` and `case1_spleen.nii.gz`.

    Args:
        mask: As for `write_mask`.
        path: Folder and stem of the files, such as `out/case1`. A suffix as for `write_mask` selects another format
            than that of the image.
        like: Path of the image that the mask belongs to.
        labels: Label value -> name. Every label has a file, also if its mask is empty. Characters other than letters,
            digits, dots and hyphens become `_`. A label without a name is named by its value. The background, 0, has no
            file.

    Returns:
        Label value -> path of its file.

    Raises:
        RequestError: Two labels have the same file name, or a value is below 1.
        GeometryError, CaseError, OutputError: As for `write_mask`.
    """
    array = to_numpy(mask)
    stem, suffix = split_suffix(absolute(path).name)
    suffix = suffix or split_suffix(mask_name(Path(like).name))[1] or OUTPUT_FORMATS["nifti"]
    values = {*label_values(array, absolute(like)), *(labels or {})} - {0}
    warn_of_unnamed(sorted(values - set(labels or {})), like)
    files = {
        value: absolute(path).with_name(f"{stem}_{name}{suffix}")
        for value, name in _label_names(sorted(values), labels or {}).items()
    }
    for value, file in files.items():
        write_mask(array == value, file, like=like)
    return files


def write_probabilities(probabilities: torch.Tensor | NDArray[Any], path: StrPath, *, like: StrPath) -> None:
    """Write a multi-channel map in the geometry of its source image.

    NIfTI stores the channels along the fourth axis, NRRD and MetaImage interleaved at each voxel. Values are not
    changed; float16, which no format supports, becomes float32.

    Args:
        probabilities: Channels `(C, *spatial)` of type uint8, float16 or float32.
        path: NIfTI, NRRD or MetaImage (`.mha`) file to write.
        like: Path of the image that the map belongs to.

    Raises:
        GeometryError: The shapes of map and image differ.
        CaseError: The map has another type or rank, or the image can no longer be read.
        OutputError: The file cannot be written, or is the image itself.
    """
    target, source = absolute(path), absolute(like)
    array = to_numpy(probabilities)
    if array.dtype.name not in _PROBABILITY_TYPES or array.ndim < 3:
        raise CaseError(
            f"{target}: a probability map of type {array.dtype} and shape {array.shape} cannot be written: expected "
            f"(C, *spatial) of {', '.join(_PROBABILITY_TYPES)}."
        )
    grid = read_grid(source, max_voxels=sys.maxsize)
    channels = np.stack([_on_grid(channel, grid, source) for channel in array])
    _refuse_target(target, source, grid, [entry for entry in FORMATS.values() if entry.channels])
    _write(channels.astype(np.float32 if channels.dtype.kind == "f" else np.uint8), target, grid=grid, source=source)


def to_numpy(array: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    """Return a NumPy array; bfloat16, which NumPy lacks, becomes float32."""
    if not isinstance(array, torch.Tensor):
        return np.asarray(array)
    plain = array.detach().as_subclass(torch.Tensor).cpu()
    return np.asarray(plain.float() if plain.dtype == torch.bfloat16 else plain)


def warn_of_unnamed(values: Sequence[int], source: object) -> None:
    """Warn of labels without a name, which are named by their value."""
    if values:
        shown = ", ".join(map(str, values[:_SHOWN])) + (f" and {len(values) - _SHOWN} more" if values[_SHOWN:] else "")
        warn(logger, "label-unnamed", f"labels without a name are named by their value: {shown}", source)


def _on_grid(array: NDArray[Any], grid: Grid, source: Path) -> NDArray[Any]:
    """Return the array in the shape of the grid; a single slice may lack the third axis."""
    if grid.shape not in (array.shape, (*array.shape, 1)):
        raise GeometryError(
            f"Geometry mismatch: the mask for {source} has shape {array.shape}, expected {grid.shape}. Invert the "
            "preprocessing first."
        )
    return array.reshape(grid.shape)


def _refuse_target(target: Path, source: Path, grid: Grid, formats: Sequence[Format]) -> None:
    """Refuse unsupported suffixes, formats that cannot store the mask or its geometry, and the source itself."""
    if case_kind(source) == "image":  # without geometry, which a volume format would have to invent
        formats = [entry for entry in formats if entry.kind == "image"]
    elif grid.shape[2:] not in ((), (1,)):
        formats = [entry for entry in formats if entry.kind != "image"]
    endings = [suffix for entry in formats for suffix in entry.written]
    if not target.name.lower().endswith(tuple(endings)):
        raise OutputError(
            f"{target} cannot hold the mask of {source}: expected a name in {' or '.join(endings) or 'no format'}."
        )
    if target.exists() and source.exists() and target.samefile(source):  # `folder::series` is not a file
        raise OutputError(f"{target} is the image itself: choose another folder for the masks.")


def _write(array: NDArray[Any], target: Path, *, grid: Grid, source: Path) -> None:
    kind = str(file_kind(target))
    writer = cast("Writer", importlib.import_module(FORMATS[kind].module))
    with replacing(target) as part, part.open("xb") as stream:
        writer.write(stream, array, target, grid=grid, like=source if file_kind(source) == kind else None)


def _label_names(values: list[int], labels: Mapping[int, str]) -> dict[int, str]:
    names: dict[int, str] = {}
    for value in values:
        if value < 1:
            raise RequestError(f"Invalid label value {value}: expected values of 1 or more.")
        name = re.sub(r"[^\w.-]+", "_", labels.get(value, ""))[:_MAX_NAME].strip("._") or f"label_{value}"
        twin = next((other for other, known in names.items() if known.lower() == name.lower()), None)
        if twin is not None:
            raise RequestError(f"The labels {twin} and {value} have the same file name {name!r}: rename one of them.")
        names[value] = name
    return names
