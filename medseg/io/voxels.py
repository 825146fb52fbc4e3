"""Voxel values: intensities as float32 and labels as integers.

Arrays are converted slab by slab, so that a large volume is never copied as a whole to a wider type.
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

# Labels stored with a float32 slope are recovered within a few units in the last place.
_LABEL_TOLERANCE = 1e-4
_SLAB_VALUES = 1 << 22
# Up to here float32 represents every integer exactly.
_EXACT = 1 << 24


@dataclass(frozen=True)
class ReadOptions:
    """Options that `medseg.io.load` passes to the reader of a format.

    Attributes:
        spatial_dims: Required number of spatial dimensions, 2 or 3; None for that of the file.
        channels: Expected number of channels; None for the default.
        index: Index of the volume to read from a series of volumes; None to refuse a series.
        label: Whether integer labels are read instead of intensities.
        stored: Whether an image may keep the integer type of the file.
        max_voxels: Largest number of voxels that a header may claim.
    """

    spatial_dims: int | None = None
    channels: int | None = None
    index: int | None = None
    label: bool = False
    stored: bool = False
    max_voxels: int = MAX_VOXELS


def choose_channels(rest: tuple[int, ...], channels: int | None, index: int | None, source: object) -> range:
    """Return the entries to read along the only non-spatial axis longer than 1.

    Args:
        rest: Sizes of the non-spatial axes.
        channels: Expected number of channels, by default one.
        index: Index of the volume to read from a series; None refuses a series.
        source: File, for messages.

    Raises:
        CaseError: The number of axes or entries is not the expected one, or the index is out of range.
    """
    sizes = [size for size in rest if size > 1]
    beyond = " x ".join(str(size) for size in sizes)
    held = f"{beyond} values per voxel (channels or time points)" if sizes else "one value per voxel"
    found = math.prod(sizes)
    if index is not None and channels in (None, 1) and len(sizes) <= 1:
        if not 0 <= index < found:
            raise CaseError(f"{source} has {held}: index {index} is out of range, the last volume is {found - 1}.")
        return range(index, index + 1)
    if index is not None or len(sizes) > 1 or found != (channels or 1):
        raise CaseError(
            f"{source} has {held}: expected {channels or 1}. Select one volume (index=0 is the first), or stack the "
            "channels that the model was trained on.",
            code="channels",
            path=_path(source),
            found=found,
            expected=channels or 1,
        )
    return range(found)


def image_type(dtype: np.dtype[Any], *, slope: float = 1.0, inter: float = 0.0, stored: bool = False) -> np.dtype[Any]:
    """Return the type an image is read as: float32, or with `stored` the smallest of uint8, int16 and int32 that fits.

    Args:
        dtype: Type of the stored values.
        slope: Scale factor of the stored values.
        inter: Offset added after scaling.
        stored: Whether to keep integers, if they are not scaled and fit one of the three types.
    """
    if stored and slope == 1 and inter == 0 and dtype.kind in "iu":
        for whole in (np.uint8, np.int16, np.int32):
            if np.can_cast(dtype, whole):
                return np.dtype(whole)
    return np.dtype(np.float32)


def fill_image(out: NDArray[Any], raw: NDArray[Any], slope: float, inter: float, source: object) -> None:
    """Write `raw * slope + inter` to `out`, which has the type returned by `image_type`.

    Values beyond float32 become infinite. Integers that float32 rounds cause a warning for every type, since networks
    compute in float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = _scaled(raw, slope, inter)
        out[...] = values
    if values.dtype.kind in "iu" and values.dtype.itemsize >= 4 and values.size:
        largest = max(int(values.max()), -int(values.min()))
        if largest > _EXACT:
            text = f"integers up to {largest:,} are rounded: float32 is exact up to {_EXACT:,}"
            warn(logger, "values-rounded", text, source)


def fill_labels(out: NDArray[Any], raw: NDArray[Any], slope: float, inter: float, source: object) -> None:
    """Write `raw * slope + inter` to the int32 array `out`.

    Raises:
        CaseError: A value is non-finite, not an integer (within 1e-4) or outside int32.
    """
    values = _scaled(raw, slope, inter)
    if values.dtype.kind == "f":
        values = _whole(values, source)
    limits = np.iinfo(np.int32)
    for extreme in (values.min(), values.max()):
        if not limits.min <= extreme <= limits.max:
            raise CaseError(f"{source} has the invalid label {extreme:.0f}: expected {limits.min} to {limits.max}.")
    out[...] = values


def refuse_nonfinite(values: NDArray[Any], source: object) -> None:
    """Raise a CaseError if an image has non-finite values (NaN or Inf), with their number."""
    nan = bad = 0
    for part in _slabs(values):
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(part.sum()):  # fast test of the common case; an overflowing sum is checked in detail
                continue
        finite = np.isfinite(part)
        if not finite.all():
            bad += int((~finite).sum())
            nan += int(np.isnan(part).sum())
    if bad:
        raise CaseError(
            f"{source} has non-finite values: {nan:,} NaN and {bad - nan:,} Inf (or beyond float32) of "
            f"{values.size:,} voxels. Replace them, for instance with the background value.",
            code="nonfinite",
            path=_path(source),
            nan=nan,
            infinite=bad - nan,
        )


def label_values(mask: NDArray[Any], source: object) -> list[int]:
    """Return the labels in a mask, ascending; errors as in `smallest_label_type`."""
    smallest_label_type(mask, source)
    found: set[int] = set()
    for part in _slabs(mask):
        found.update(int(value) for value in np.unique(part))
    return sorted(found)


def smallest_label_type(mask: NDArray[Any], source: object) -> np.dtype[Any]:
    """Return the smallest of uint8, uint16 and int32 that holds every label of `mask`.

    Raises:
        CaseError: A label is negative, not an integer, or outside int32.
    """
    if mask.dtype.kind not in "biuf":
        raise CaseError(f"{source}: a mask of type {mask.dtype} cannot be written: expected integers.")
    largest = 0
    for part in _slabs(mask):
        if part.dtype.kind == "f" and not (np.isfinite(part) & (part == np.floor(part))).all():
            wrong = part[~(np.isfinite(part) & (part == np.floor(part)))][0]
            raise CaseError(f"{source}: the mask has the value {wrong:g}: expected integer labels. Apply argmax first.")
        if part.min() < 0:
            raise CaseError(f"{source}: the mask has the negative label {part.min():g}: expected 0 or more.")
        largest = max(largest, int(part.max()))
    for dtype in (np.uint8, np.uint16, np.int32):
        if largest <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise CaseError(f"{source}: the mask has the label {largest}: expected at most {2**31 - 1}.")


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
            f"{source} is a label with non-finite values (NaN or Inf): expected integers.",
            code="nonfinite",
            path=_path(source),
        )
    rounded: NDArray[Any] = np.rint(values)
    far = np.abs(values - rounded) > _LABEL_TOLERANCE
    if far.any():
        raise CaseError(f"{source} is a label with the non-integer value {values[far][0]:g}: expected integers.")
    return rounded


def _path(source: object) -> Path | None:
    return source if isinstance(source, Path) else None


def _slabs(values: NDArray[Any]) -> list[NDArray[Any]]:
    """Split along the longest axis into views of a few million values."""
    if values.size == 0:
        return []
    axis = int(np.argmax(values.shape))
    parts = min(values.shape[axis], -(-values.size // _SLAB_VALUES))
    return np.array_split(values, parts, axis=axis)
