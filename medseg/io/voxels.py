"""Values of voxels: image intensities as float32, labels as whole numbers, and nothing in between.

Arrays are converted slab by slab, so that no second copy of a large volume is made in a wider type.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import CaseError
from medseg.io.geometry import MAX_VOXELS
from medseg.notices import warn

__all__ = [
    "ReadOptions",
    "choose_channels",
    "fill_image",
    "fill_labels",
    "image_type",
    "label_values",
    "refuse_nonfinite",
    "smallest_label_type",
]

logger = logging.getLogger(__name__)

# Labels stored through a float32 slope come back within a few units of the last place.
_LABEL_TOLERANCE = 1e-4
_SLAB_VALUES = 1 << 22
# Up to here float32 holds every whole number.
_EXACT = 1 << 24


@dataclass(frozen=True)
class ReadOptions:
    """What `medseg.io.load` asks of the module of a format.

    Attributes:
        spatial_dims: 2 or 3 to refuse everything else; None for what the file is.
        channels: values per voxel that are due; None for the usual number.
        index: which volume of a series; None to refuse a series.
        label: whether whole numbers are read instead of intensities.
        stored: whether an image may keep the file's own whole numbers.
        max_voxels: the largest number of voxels that a header may claim.
    """

    spatial_dims: int | None = None
    channels: int | None = None
    index: int | None = None
    label: bool = False
    stored: bool = False
    max_voxels: int = MAX_VOXELS


def choose_channels(rest: tuple[int, ...], channels: int | None, index: int | None, source: object) -> range:
    """Return which entries to read of the only axis beyond space that has more than one.

    Args:
        rest: lengths of the axes beyond space.
        channels: how many values per voxel are due, by default one.
        index: which entry to take of a series, by default none, so that a series is refused.
        source: the file, for messages.

    Raises:
        CaseError: there are more axes or entries than asked for, or there is no such entry.
    """
    sizes = [size for size in rest if size > 1]
    beyond = " x ".join(str(size) for size in sizes)
    held = f"{beyond} values per voxel (channels, or points in time)" if sizes else "one value per voxel"
    found = math.prod(sizes)
    if index is not None and channels in (None, 1) and len(sizes) <= 1:
        if not 0 <= index < found:
            raise CaseError(f"{source} has {held}: there is no volume {index}, the last is {found - 1}.")
        return range(index, index + 1)
    if index is not None or len(sizes) > 1 or found != (channels or 1):
        raise CaseError(
            f"{source} has {held}: expected {channels or 1}. Take one volume (index=0 is the first), or stack what the "
            "model was made for.",
            code="channels",
            path=_path(source),
            found=found,
            expected=channels or 1,
        )
    return range(found)


def image_type(dtype: np.dtype[Any], *, slope: float = 1.0, inter: float = 0.0, stored: bool = False) -> np.dtype[Any]:
    """Return the type that an image is read as: float32, or with `stored` the first of uint8, int16 and int32 for it.

    Args:
        dtype: type of the values in the file.
        slope: factor from the file's values to the image's.
        inter: what is added after the factor.
        stored: keep whole numbers, if none of the three types is too narrow and there is nothing to scale.
    """
    if stored and slope == 1 and inter == 0 and dtype.kind in "iu":
        for whole in (np.uint8, np.int16, np.int32):
            if np.can_cast(dtype, whole):
                return np.dtype(whole)
    return np.dtype(np.float32)


def fill_image(out: NDArray[Any], raw: NDArray[Any], slope: float, inter: float, source: object) -> None:
    """Write `raw * slope + inter` into `out`, of the type that `image_type` gives.

    What float32 cannot hold becomes infinite. Whole numbers that it rounds are warned of in either type, since
    networks compute in float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = _scaled(raw, slope, inter)
        out[...] = values
    if values.dtype.kind in "iu" and values.dtype.itemsize >= 4 and values.size:
        largest = max(int(values.max()), -int(values.min()))
        if largest > _EXACT:
            text = f"whole numbers up to {largest:,} are rounded: float32 is exact up to {_EXACT:,}"
            warn(logger, "values-rounded", text, source)


def fill_labels(out: NDArray[Any], raw: NDArray[Any], slope: float, inter: float, source: object) -> None:
    """Write `raw * slope + inter` into the int32 array `out`.

    Raises:
        CaseError: a value is not finite, not a whole number (within 1e-4) or beyond int32.
    """
    values = _scaled(raw, slope, inter)
    if values.dtype.kind == "f":
        values = _whole(values, source)
    limits = np.iinfo(np.int32)
    for extreme in (values.min(), values.max()):
        if not limits.min <= extreme <= limits.max:
            raise CaseError(f"{source} holds the label {extreme:.0f}: the largest that is read is {limits.max}.")
    out[...] = values


def refuse_nonfinite(values: NDArray[Any], source: object) -> None:
    """Raise CaseError if an image holds NaN or infinite values, with their number."""
    nan = bad = 0
    for part in _slabs(values):
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(part.sum()):  # the common case, told fast; a sum that overflows is looked at closely
                continue
        finite = np.isfinite(part)
        if not finite.all():
            bad += int((~finite).sum())
            nan += int(np.isnan(part).sum())
    if bad:
        raise CaseError(
            f"{source} holds values that are no numbers: {nan:,} NaN and {bad - nan:,} infinite (or beyond float32) of "
            f"{values.size:,} voxels. Replace them, for instance by the background value, and run again.",
            code="nonfinite",
            path=_path(source),
            nan=nan,
            infinite=bad - nan,
        )


def label_values(mask: NDArray[Any], source: object) -> list[int]:
    """Return the labels that a mask holds, in order; errors as in `smallest_label_type`."""
    smallest_label_type(mask, source)
    found: set[int] = set()
    for part in _slabs(mask):
        found.update(int(value) for value in np.unique(part))
    return sorted(found)


def smallest_label_type(mask: NDArray[Any], source: object) -> np.dtype[Any]:
    """Return uint8, uint16 or int32, the first that holds every label of `mask`.

    Raises:
        CaseError: a label is negative, not a whole number, or beyond int32.
    """
    if mask.dtype.kind not in "biuf":
        raise CaseError(f"{source}: a mask of type {mask.dtype} cannot be written: expected whole numbers.")
    largest = 0
    for part in _slabs(mask):
        if part.dtype.kind == "f" and not (np.isfinite(part) & (part == np.floor(part))).all():
            wrong = part[~(np.isfinite(part) & (part == np.floor(part)))][0]
            raise CaseError(f"{source}: the mask holds {wrong:g}: expected whole numbers, so take the argmax first.")
        if part.min() < 0:
            raise CaseError(f"{source}: the mask holds the label {part.min():g}: expected 0 or more.")
        largest = max(largest, int(part.max()))
    for dtype in (np.uint8, np.uint16, np.int32):
        if largest <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise CaseError(f"{source}: the mask holds the label {largest}: the largest that can be written is {2**31 - 1}.")


def _scaled(raw: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    if slope == 1 and inter == 0:
        return raw
    with np.errstate(over="ignore", invalid="ignore"):
        values: NDArray[np.float64] = raw.astype(np.float64)
        values *= slope
        values += inter
    return values


def _whole(values: NDArray[Any], source: object) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise CaseError(
            f"{source} is a label with NaN or infinite values: expected whole numbers.",
            code="nonfinite",
            path=_path(source),
        )
    rounded: NDArray[Any] = np.rint(values)
    far = np.abs(values - rounded) > _LABEL_TOLERANCE
    if far.any():
        raise CaseError(f"{source} is a label but holds {values[far][0]:g}: expected whole numbers.")
    return rounded


def _path(source: object) -> Path | None:
    return source if isinstance(source, Path) else None


def _slabs(values: NDArray[Any]) -> list[NDArray[Any]]:
    """Cut along the longest axis into views of a few million values."""
    if values.size == 0:
        return []
    axis = int(np.argmax(values.shape))
    parts = min(values.shape[axis], -(-values.size // _SLAB_VALUES))
    return np.array_split(values, parts, axis=axis)
