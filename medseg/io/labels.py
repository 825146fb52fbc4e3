"""Labels in files: label maps as they are stored, DICOM SEG and RT-STRUCT laid on the grid of the image they belong to.

A SEG may lie on any image whose voxels its frames meet exactly, be that the series, a part of it stored in another
order, or its conversion to NIfTI; nothing is ever interpolated. Contours of an RT-STRUCT are drawn in slices of a DICOM
series, and are filled in that series alone.
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
from medseg.io.readers import load, placed_tensor, read_grid

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
        path: a label map in a format of `medseg.io.load`; or DICOM SEG or RT-STRUCT, a file or a folder with one.
        like: the image that the label belongs to, or its grid; a SEG or RT-STRUCT is laid on it. Without it, a SEG
            comes on the smallest grid that its frames span. An RT-STRUCT needs the path of a DICOM series.
        names: name (in any case) or number of a segment or region -> value, in the order of painting. Others are left
            out; of several names of one value, one must be there. By default each becomes its number.
        optional: those of `names` that may be missing.
        on_overlap: "refuse" segments that overlap, or let the one "later" in `names` win.
        spatial_dims: 2 or 3 to refuse everything else; by default what the file is.
        max_voxels: the largest number of values that a header may claim.

    Returns:
        `(1, x, y[, z])`, int32, with metadata as of `medseg.io.load`. `names`, `optional` and `on_overlap` leave label
        maps as they are.

    Raises:
        CaseError: the label cannot be used; a segment of `names` is not in it; or segments overlap.
        GeometryError: it has no defined place, lies in another frame of reference, or does not meet the image's voxels.
        RequestError: an RT-STRUCT without its series, or wrong values.
    """
    found = find_object(path) if isinstance(path, str | os.PathLike) else None
    if found is None:
        return load(path, label=True, spatial_dims=spatial_dims, max_voxels=max_voxels)
    file, sop_class = found
    if sop_class not in SEG_CLASSES:
        series = _series(like, file)
        array, grid = read_rtstruct(file, like=series, labels=names, optional=optional, on_overlap=on_overlap)
        return placed_tensor(*_with_axes(array, grid, spatial_dims, file), file)
    place = _place(like, file)
    if isinstance(place, Grid) and len(place.shape) == 2:
        place, spatial_dims = Grid((*place.shape, 1), place.affine), 2
    array, grid = read_seg(
        file, like=place, labels=names, optional=optional, on_overlap=on_overlap, max_voxels=max_voxels
    )
    return placed_tensor(*_with_axes(array, grid, spatial_dims, file), file)


def find_object(path: StrPath) -> tuple[Path, str] | None:
    """Return the DICOM SEG or RT-STRUCT at a path, and its SOP class; None for any other label.

    Args:
        path: a file, or a folder that is searched with its subfolders.

    Raises:
        CaseError: a folder holds several, or something cannot be read.
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
            f"{source} holds {len(objects)} segmentations or structure sets: expected one. Name one of {shown}."
        )
    return (objects[0].source.path, objects[0].sop_class) if objects else None


def _place(like: StrPath | Grid | None, file: Path) -> Path | Grid | None:
    """Return what a SEG is laid on: a series, or the grid of another image."""
    if like is None or isinstance(like, Grid):
        return like
    image = absolute(like)
    kind = image_kind(image)
    if kind == "dicom":
        return image
    if kind is not None and FORMATS[kind].kind == "image":
        raise GeometryError(
            f"{file} lies in space, and its image {image} does not say where it lies: give the DICOM image."
        )
    return read_grid(image)


def _series(like: StrPath | Grid | None, file: Path) -> Path:
    if like is None or isinstance(like, Grid):
        raise RequestError(f"{file} is an RT-STRUCT, which is read for a DICOM series: give the path of its images.")
    image = absolute(like)
    if image_kind(image) != "dicom":
        raise CaseError(
            f"{file} is an RT-STRUCT, whose contours lie in slices of a DICOM series, and its image {image} is none: "
            "give the series as the image, or a label map or DICOM SEG as the label."
        )
    return image


def _with_axes(array: NDArray[np.int32], grid: Grid, spatial_dims: int | None, file: Path) -> tuple[NDArray[Any], Grid]:
    """Return voxels with a channel, with the asked number of axes, and their grid."""
    if spatial_dims != 2:
        return array[None], grid
    if grid.shape[2] != 1:
        raise CaseError(f"{file} is a volume {grid.shape}: expected one slice.")
    return array[None, ..., 0], Grid(grid.shape[:2], grid.affine)
