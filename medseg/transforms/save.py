"""Writing of label maps as a MONAI transform."""

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

# DICOM formats by file extension; their modules need optional packages.
_OBJECTS = {ending: entry for entry in FORMATS.values() if entry.object_writer for ending in entry.outputs.values()}


class SaveMaskd(SaveImaged):  # type: ignore[misc]  # MONAI publishes no types
    """Write a label map in the geometry of its source image.

    Derived from `SaveImaged`, so that other software recognizes (and can skip) the writer of a bundle; the file is
    written by `medseg.io.write_mask`. Its name is the `"name"` of the case, or the file name of the image; folders
    below `output_dir` are created if missing.

    Args:
        keys: Key of the mask: labels `(1, *spatial)` in native space, so after `Invertd` and the arg max.
        output_dir: Folder of the masks, created if missing.
        output_format: Key of `medseg.io.names.OUTPUT_FORMATS`, such as "nrrd" or "dicom-seg"; by default the format is
            given by the extension of the case name, which is that of the image.
        separate_labels: Whether to also write each label to a separate file, `case1_liver.nii.gz` beside
            `case1.nii.gz`. These are written first, so they are complete once the mask exists.
        labels: Name of each label value, for the separate files and the DICOM segments; keys may be strings. Unnamed
            values use their number.
        image_key: Key of the image, whose file name is used if the metadata of the mask have none.
        allow_missing_keys: Whether to skip cases without the key.

    Raises:
        CaseError: Not a single-channel label map.
        GeometryError: Geometry mismatch with the image.
        OutputError: The file cannot be written (see `medseg.io.write_mask`).
        RequestError: More than one key, an unknown format, or no known image file.
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
            raise RequestError(f"SaveMaskd supports one key, found {self.keys}: use one SaveMaskd per key.")
        if output_format and output_format not in OUTPUT_FORMATS:
            raise RequestError(f"Unknown output format {output_format!r}: use one of {', '.join(OUTPUT_FORMATS)}.")
        if separate_labels and OUTPUT_FORMATS.get(output_format) in _OBJECTS:
            raise RequestError(f"{output_format} stores named labels in one file: remove separate_labels.")
        self.output_dir = Path(output_dir)
        self.output_format = output_format
        self.separate_labels = separate_labels
        self.labels = _names_by_value(labels or {})
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the mask and return `data` unchanged."""
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
            f"No image file for the mask {key!r}: neither its metadata nor those of {self.image_key!r} name one. Load "
            "the image with LoadCased and keep its metadata."
        )


def _names_by_value(labels: Mapping[int, str] | Mapping[str, str]) -> dict[int, str]:
    try:
        names = {int(value): str(name) for value, name in labels.items()}
    except ValueError as error:
        raise RequestError(
            f"Invalid label values {list(labels)}: expected integers as keys of the label names."
        ) from error
    return {value: name for value, name in names.items() if value != 0}


def _write_object(form: Format, mask: torch.Tensor, target: Path, source: Path, labels: Mapping[int, str]) -> None:
    """Write the mask as a DICOM object; unnamed values use their number."""
    array = to_numpy(mask)
    unnamed = [value for value in label_values(array, source) if value != 0 and value not in labels]
    warn_of_unnamed(unnamed, source)
    named = {value: f"label {value}" for value in unnamed} | dict(labels)
    getattr(importlib.import_module(form.module), form.object_writer)(array, target, source, labels=named)


def _label_map(mask: Any, source: Path) -> torch.Tensor:
    """Return the labels `(*spatial)` after checking shape and geometry against the image."""
    tensor = mask.as_tensor() if isinstance(mask, MetaTensor) else torch.as_tensor(mask)
    grid = read_grid(source)
    if tensor.ndim == 3 and grid.shape[2:] == (1,):  # a single slice processed in 2D
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
            f"Geometry mismatch between the mask and {source}: {difference}. Invert the preprocessing (Invertd) first."
        )
