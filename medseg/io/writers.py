"""Writing: labels and probabilities go onto exactly the grid of their image, completely or not at all."""

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
    """What a module that writes a format offers."""

    def write(self, stream: BinaryIO, array: NDArray[Any], path: Path, *, grid: Grid, like: Path | None) -> None:
        """Write labels `(*spatial)`, or channels `(C, *spatial)`, into a stream.

        Args:
            stream: a seekable binary stream at its beginning.
            array: checked labels of type uint8, uint16 or int32 and the grid's shape, or channels of type uint8 or
                float32.
            path: the file's name, for its suffix and for messages.
            grid: where the voxels lie.
            like: a file of the same format whose position fields are to be taken over bit for bit, if there is one.
        """


_PROBABILITY_TYPES = ("uint8", "float16", "float32")
_MAX_NAME = 100
_SHOWN = 5


def write_mask(mask: torch.Tensor | NDArray[Any], path: StrPath, *, like: StrPath) -> None:
    """Write a label map on the grid of its source image.

    The ending of `path` chooses the format. Where it is the source's own, the fields that place the voxels are the
    source's bit for bit; NIfTI keeps its version and byte order, too. Another format is written from the grid, as exact
    as it can hold it. Texts, scale factors, display ranges and extensions, which may name the patient, are never taken
    over. The mask of a file of several channels or times is 3D. The mask of a picture is a grey PNG or TIFF of 8 or 16
    bits, also for a JPEG, whose compression would change labels.

    The type is uint8, uint16 or int32, the first that holds the largest label (MGH has no uint16). The file appears
    under its name when it is complete; an older one is replaced. Equal masks give equal bytes.

    Args:
        mask: whole numbers of 0 or more, of any type, shape `(x, y)` or `(x, y, z)`.
        path: where to write, with one of the `written` endings of `medseg.io.formats.FORMATS`. Its folder is made if
            missing.
        like: the image file that the mask belongs to.

    Raises:
        GeometryError: the mask has another shape than the image.
        CaseError: the mask holds something else than labels, or the image cannot be read any more.
        OutputError: the file cannot be written there, or would replace the image itself.
    """
    target, source = absolute(path), absolute(like)
    grid = read_grid(source, max_voxels=sys.maxsize)
    labels = _on_grid(to_numpy(mask), grid, source)
    _refuse_target(target, source, grid, list(FORMATS.values()))
    _write(labels.astype(smallest_label_type(labels, target), copy=False), target, grid=grid, source=source)


def write_label_files(
    mask: torch.Tensor | NDArray[Any], path: StrPath, *, like: StrPath, labels: Mapping[int, str] | None = None
) -> dict[int, Path]:
    """Write one mask of 0 and 1 for each label, such as `case1_liver.nii.gz` and `case1_spleen.nii.gz`.

    Args:
        mask: as for `write_mask`.
        path: folder and stem of the files, such as `out/case1`, with an ending as for `write_mask` if it shall not be
            that of the image's own masks.
        like: the image file that the mask belongs to.
        labels: value to name; every one gets a file, also if the mask has none of it. What is no letter, digit, dot or
            hyphen becomes `_`. A value that has no name is called by its number; 0 is background and has no file.

    Returns:
        Value to file.

    Raises:
        RequestError: two labels would share one file, or a value is below 1.
        GeometryError, CaseError, OutputError: as for `write_mask`.
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
    """Write a map of several channels on the grid of its source image.

    NIfTI holds the channels along the fourth axis, NRRD and MetaImage side by side at each voxel. Values are written as
    they are; float16, which no format has, becomes float32.

    Args:
        probabilities: `(C, *spatial)` of type uint8, float16 or float32.
        path: where to write: NIfTI, NRRD or MetaImage (`.mha`).
        like: the image file that the map belongs to.

    Raises:
        GeometryError: the map has another shape than the image.
        CaseError: it has another type, or the image cannot be read any more.
        OutputError: the file cannot be written there, or would replace the image itself.
    """
    target, source = absolute(path), absolute(like)
    array = to_numpy(probabilities)
    if array.dtype.name not in _PROBABILITY_TYPES or array.ndim < 3:
        raise CaseError(
            f"{target}: a map of type {array.dtype} and shape {array.shape} cannot be written: expected (C, *spatial) "
            f"of {', '.join(_PROBABILITY_TYPES)}."
        )
    grid = read_grid(source, max_voxels=sys.maxsize)
    channels = np.stack([_on_grid(channel, grid, source) for channel in array])
    _refuse_target(target, source, grid, [entry for entry in FORMATS.values() if entry.channels])
    _write(channels.astype(np.float32 if channels.dtype.kind == "f" else np.uint8), target, grid=grid, source=source)


def to_numpy(array: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    """Return a plain array; bfloat16, which numpy lacks, becomes float32."""
    if not isinstance(array, torch.Tensor):
        return np.asarray(array)
    plain = array.detach().as_subclass(torch.Tensor).cpu()
    return np.asarray(plain.float() if plain.dtype == torch.bfloat16 else plain)


def warn_of_unnamed(values: Sequence[int], source: object) -> None:
    """Warn of labels that are written under their number, since nothing names them."""
    if values:
        shown = ", ".join(map(str, values[:_SHOWN])) + (f" and {len(values) - _SHOWN} more" if values[_SHOWN:] else "")
        warn(logger, "label-unnamed", f"labels without a name are called by their number: {shown}", source)


def _on_grid(array: NDArray[Any], grid: Grid, source: Path) -> NDArray[Any]:
    """Return the array in the shape of the grid; one slice may lack its third axis."""
    if grid.shape not in (array.shape, (*array.shape, 1)):
        raise GeometryError(
            f"The mask for {source} has the shape {array.shape}: expected {grid.shape}. Invert the preprocessing first."
        )
    return array.reshape(grid.shape)


def _refuse_target(target: Path, source: Path, grid: Grid, formats: Sequence[Format]) -> None:
    """Refuse names of no format, of one that cannot hold the mask or its place, and the source itself."""
    if case_kind(source) == "image":  # without geometry, which a volume format would have to make up
        formats = [entry for entry in formats if entry.kind == "image"]
    elif grid.shape[2:] not in ((), (1,)):
        formats = [entry for entry in formats if entry.kind != "image"]
    endings = [suffix for entry in formats for suffix in entry.written]
    if not target.name.lower().endswith(tuple(endings)):
        raise OutputError(
            f"{target} cannot hold the mask of {source}: expected a name in {' or '.join(endings) or 'no format'}."
        )
    if target.exists() and source.exists() and target.samefile(source):  # `folder::series` names no file
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
            raise RequestError(f"A label file is due for the value {value}: expected values of 1 or more.")
        name = re.sub(r"[^\w.-]+", "_", labels.get(value, ""))[:_MAX_NAME].strip("._") or f"label_{value}"
        twin = next((other for other, known in names.items() if known.lower() == name.lower()), None)
        if twin is not None:
            raise RequestError(f"The labels {twin} and {value} would share one file, named {name!r}: rename one.")
        names[value] = name
    return names
