"""Reading labels: label maps as stored, DICOM SEG and RT-STRUCT on the voxel grid of their image.

A SEG can be read on the grid of any image whose voxels coincide with those of its frames: the series, a part of it in
another order, or its conversion to NIfTI. Labels are never interpolated. Contours of an RT-STRUCT are drawn on slices
of a DICOM series, and are only filled on the grid of that series.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from numpy.typing import NDArray

from medseg.errors import CaseError, GeometryError, RequestError
from medseg.io.dicom.detect import image_kind, is_dicom, split_series
from medseg.io.dicom.headers import read_headers
from medseg.io.dicom.objects import OnOverlap
from medseg.io.dicom.rtstruct import RTSTRUCT_CLASS, read_rtstruct
from medseg.io.dicom.seg import SEG_CLASSES, read_seg
from medseg.io.dicom.sources import find_sources
from medseg.io.formats import FORMATS
from medseg.io.geometry import MAX_VOXELS, Grid
from medseg.io.names import StrPath, absolute, file_kind
from medseg.io.readers import load, read_grid, to_meta_tensor

__all__ = ["find_object", "load_label"]

_SHOWN = 5


def load_label(
    path: StrPath,
    *,
    like: StrPath | Grid | None = None,
    names: Mapping[str, int] | None = None,
    optional: Collection[str] = (),
    on_overlap: OnOverlap = "refuse",
    spatial_dims: int | None = None,
    max_voxels: int = MAX_VOXELS,
) -> MetaTensor:
    """Read a label.

    Args:
        path: Label map in a format of `medseg.io.load`; or DICOM SEG or RT-STRUCT, as a file or a folder with one.
        like: Image that the label belongs to, or its grid, for SEG and RT-STRUCT. Without it, a SEG is read on the
            smallest grid that contains its frames. An RT-STRUCT needs the path of its DICOM series.
        names: Name (case-insensitive) or number of a segment or ROI -> label value, in the order of painting. Others
            are ignored; of several names with one value, one must be present. By default the label values are the
            numbers.
        optional: Names in `names` that may be missing.
        on_overlap: Rule for overlapping segments: "refuse" them, or the "later" one in `names` wins.
        spatial_dims: Required number of spatial dimensions, 2 or 3; by default that of the file.
        max_voxels: Largest number of values that a header may claim.

    Returns:
        Label map `(1, x, y[, z])`, int32, with the metadata of `medseg.io.load`. `names`, `optional` and `on_overlap`
        do not change label maps.

    Raises:
        CaseError: The label cannot be read; a segment of `names` is missing; or segments overlap.
        GeometryError: The label has no valid geometry, another frame of reference, or a geometry mismatch with the
            image.
        RequestError: An RT-STRUCT without its series, or an invalid label value.
    """
    found = find_object(path) if isinstance(path, str | os.PathLike) else None
    if found is None:
        return load(path, label=True, spatial_dims=spatial_dims, max_voxels=max_voxels)
    file, sop_class = found
    if sop_class not in SEG_CLASSES:
        series = _series(like, file)
        array, grid = read_rtstruct(file, like=series, labels=names, optional=optional, on_overlap=on_overlap)
        return to_meta_tensor(*_with_axes(array, grid, spatial_dims, file), file)
    target = _target(like, file)
    if isinstance(target, Grid) and len(target.shape) == 2:
        target, spatial_dims = Grid((*target.shape, 1), target.affine), 2
    array, grid = read_seg(
        file, like=target, labels=names, optional=optional, on_overlap=on_overlap, max_voxels=max_voxels
    )
    return to_meta_tensor(*_with_axes(array, grid, spatial_dims, file), file)


def find_object(path: StrPath) -> tuple[Path, str] | None:
    """Return the DICOM SEG or RT-STRUCT at a path, and its SOP class UID; None for any other label.

    Args:
        path: File, or folder that is searched recursively.

    Raises:
        CaseError: The folder holds several, or cannot be read.
    """
    source, series = split_series(path)
    try:
        if series or not (source.is_dir() or (file_kind(source) in (None, "dicom") and is_dicom(source))):
            return None
        headers = read_headers(find_sources(source))
    except OSError as error:
        raise CaseError(f"{source} cannot be read ({error.strerror or error}).") from error
    objects = [header for header in headers if header.sop_class in (*SEG_CLASSES, RTSTRUCT_CLASS)]
    if len(objects) > 1:
        shown = ", ".join(str(header.source) for header in objects[:_SHOWN])
        raise CaseError(
            f"{source} has {len(objects)} segmentations or structure sets: expected one. Give one of {shown}."
        )
    return (objects[0].source.path, objects[0].sop_class) if objects else None


def _target(like: StrPath | Grid | None, file: Path) -> Path | Grid | None:
    """Return the target of a SEG: a DICOM series, or the grid of another image."""
    if like is None or isinstance(like, Grid):
        return like
    image = absolute(like)
    kind = image_kind(image)
    if kind == "dicom":
        return image
    if kind is not None and FORMATS[kind].kind == "image":
        raise GeometryError(
            f"Geometry mismatch: {file} has a geometry, but its image {image} has none. Give the DICOM image."
        )
    return read_grid(image)


def _series(like: StrPath | Grid | None, file: Path) -> Path:
    if like is None or isinstance(like, Grid):
        raise RequestError(
            f"{file} is an RT-STRUCT, which cannot be read without its DICOM series: give the path of its images."
        )
    image = absolute(like)
    if image_kind(image) != "dicom":
        raise CaseError(
            f"{file} is an RT-STRUCT, which needs its DICOM series, but its image {image} is not DICOM: give the "
            "series as the image, or a label map or DICOM SEG as the label."
        )
    return image


def _with_axes(array: NDArray[np.int32], grid: Grid, spatial_dims: int | None, file: Path) -> tuple[NDArray[Any], Grid]:
    """Return voxels with a channel axis and the requested number of spatial axes, and their grid."""
    if spatial_dims != 2:
        return array[None], grid
    if grid.shape[2] != 1:
        raise CaseError(f"{file} is a volume {grid.shape}: expected a single slice.")
    return array[None, ..., 0], Grid(grid.shape[:2], grid.affine)
