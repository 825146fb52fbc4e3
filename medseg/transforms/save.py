"""Writing label maps at the end of a chain of MONAI transforms."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import SaveImaged

from medseg.errors import CaseError, GeometryError, RequestError
from medseg.io import Grid, grid_difference, output_path, read_grid, write_label_files, write_mask
from medseg.io.formats import FORMATS, Format
from medseg.io.geometry import to_affine4
from medseg.io.names import OUTPUT_FORMATS, StrPath, mask_name
from medseg.io.voxels import label_values
from medseg.io.writers import to_numpy, warn_of_unnamed
from medseg.transforms.traits import Traits

__all__ = ["SaveMaskd"]

# DICOM objects by their ending; their modules need packages that others do without.
_OBJECTS = {ending: entry for entry in FORMATS.values() if entry.object_writer for ending in entry.outputs.values()}


class SaveMaskd(SaveImaged):  # type: ignore[misc]  # MONAI publishes no types
    """Write a label map exactly on the grid of the image that it was made from.

    It is a `SaveImaged`, by which other programs find (and leave out) the writer of a bundle; the file is written by
    `medseg.io.write_mask`. It goes under the case's `"name"` below `output_dir`, or without one under the image's file
    name; folders are made as needed.

    Args:
        keys: the one entry to write: labels `(1, *spatial)` on the image's own grid, so after `Invertd` and the argmax.
        output_dir: the folder of all masks.
        output_format: a key of `medseg.io.names.OUTPUT_FORMATS`, such as "nrrd" or "dicom-seg"; by default the ending
            of the case's name decides, which is that of the image's own format.
        separate_labels: also write each label to a file of its own, `case1_liver.nii.gz` beside `case1.nii.gz`. They
            come first: where the whole mask is, they are complete.
        labels: value to name, for the names of those files and of the segments in DICOM; a key may be text. Values
            without a name go by their number.
        image_key: the entry of the image, asked for its file where the mask's own metadata do not name one.
        allow_missing_keys: do nothing for a case without the entry.

    Raises:
        CaseError: the entry is not one label map.
        GeometryError: it does not lie on the grid of the image.
        OutputError: it cannot be written (see `medseg.io.write_mask`).
    """

    traits = Traits("kept")

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: StrPath,
        *,
        output_format: str = "",
        separate_labels: bool = False,
        labels: Mapping[int, str] | Mapping[str, str] | None = None,
        image_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, output_dir=output_dir, output_postfix="", allow_missing_keys=allow_missing_keys)
        if len(self.keys) != 1:
            raise RequestError(f"SaveMaskd writes one entry of a case, got {self.keys}: use one SaveMaskd for each.")
        if output_format and output_format not in OUTPUT_FORMATS:
            raise RequestError(f"There is no output format {output_format!r}: use one of {', '.join(OUTPUT_FORMATS)}.")
        if separate_labels and OUTPUT_FORMATS.get(output_format) in _OBJECTS:
            raise RequestError(f"{output_format} names its labels inside of one file: leave separate_labels out.")
        self.output_dir = Path(output_dir)
        self.output_format = output_format
        self.separate_labels = separate_labels
        self.labels = _names_by_value(labels or {})
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the mask and return `data` as it is."""
        case = dict(data)
        for key in self.key_iterator(case):
            source = self._source(case, key)
            name = case.get("name") or mask_name(source.name)
            if self.output_format:
                name = mask_name(name, self.output_format)
            self._write(_label_map(case[key], source), output_path(name, self.output_dir), source)
        return case

    def _write(self, mask: torch.Tensor, target: Path, source: Path) -> None:
        form = next((entry for ending, entry in _OBJECTS.items() if target.name.lower().endswith(ending)), None)
        if form is not None:
            _write_object(form, mask, target, source, self.labels)
            return
        if self.separate_labels:
            write_label_files(mask, target, like=source, labels=self.labels)
        write_mask(mask, target, like=source)

    def _source(self, case: Mapping[Hashable, Any], key: Hashable) -> Path:
        for image in (case[key], case.get(self.image_key)):
            name = image.meta.get("filename_or_obj") if isinstance(image, MetaTensor) else image
            if isinstance(name, str) and name:
                return Path(name)
        raise RequestError(
            f"The mask under {key!r} cannot be placed: neither it nor {self.image_key!r} knows the image's file. Load "
            "the image with LoadCased and keep its metadata."
        )


def _names_by_value(labels: Mapping[int, str] | Mapping[str, str]) -> dict[int, str]:
    try:
        names = {int(value): str(name) for value, name in labels.items()}
    except ValueError as error:
        raise RequestError(f"The labels of a mask are named by whole numbers, got {list(labels)}.") from error
    return {value: name for value, name in names.items() if value != 0}


def _write_object(form: Format, mask: torch.Tensor, target: Path, source: Path, labels: Mapping[int, str]) -> None:
    """Write a DICOM object that describes the mask; a value without a name is called by its number."""
    array = to_numpy(mask)
    unnamed = [value for value in label_values(array, source) if value != 0 and value not in labels]
    warn_of_unnamed(unnamed, source)
    named = {value: f"label {value}" for value in unnamed} | dict(labels)
    getattr(importlib.import_module(form.module), form.object_writer)(array, target, source, labels=named)


def _label_map(mask: Any, source: Path) -> torch.Tensor:
    """Return labels `(*spatial)`, checked to lie where the image does."""
    tensor = mask.as_tensor() if isinstance(mask, MetaTensor) else torch.as_tensor(mask)
    grid = read_grid(source)
    if tensor.ndim == 3 and grid.shape[2:] == (1,):  # one slice, worked on in 2D
        grid = Grid(grid.shape[:2], grid.affine)
    if tensor.ndim == len(grid.shape) + 1 and len(tensor) != 1:
        raise CaseError(
            f"The mask for {source} has {len(tensor)} channels: expected one channel of labels. Take the argmax first."
        )
    if tensor.ndim != len(grid.shape) + 1:
        raise CaseError(
            f"The mask for {source} has the shape {tuple(tensor.shape)}: expected {(1, *grid.shape)}, channel first."
        )
    if isinstance(mask, MetaTensor):
        here = Grid(tuple(tensor.shape[1:]), to_affine4(mask.affine.numpy()))
        _refuse_other_place(here, grid, source)
    return tensor[0]


def _refuse_other_place(here: Grid, grid: Grid, source: Path) -> None:
    difference = grid_difference(here, grid)
    if difference:
        raise GeometryError(
            f"The mask does not lie on the grid of {source}: {difference}. Invert the preprocessing (Invertd) first."
        )
