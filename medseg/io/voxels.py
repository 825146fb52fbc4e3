"""Values of voxels: image intensities as float32, labels as whole numbers, and nothing in between.

Arrays are converted slab by slab, so that no second copy of a large volume is made in a wider type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import CaseError

__all__ = ["fill_image", "fill_labels", "refuse_nonfinite", "smallest_label_type"]

# Labels stored through a float32 slope come back within a few units of the last place.
_LABEL_TOLERANCE = 1e-4
_SLAB_VALUES = 1 << 22


def fill_image(out: NDArray[Any], raw: NDArray[Any], slope: float, inter: float) -> None:
    """Write `raw * slope + inter` into the float32 array `out`; what float32 cannot hold becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = _scaled(raw, slope, inter)


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
        finite = np.isfinite(part)
        if not finite.all():
            bad += int((~finite).sum())
            nan += int(np.isnan(part).sum())
    if bad:
        raise CaseError(
            f"{source} holds values that are no numbers: {nan:,} NaN and {bad - nan:,} infinite (or beyond float32) of "
            f"{values.size:,} voxels. Replace them, for instance by the background value, and run again."
        )


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
        raise CaseError(f"{source} is a label with NaN or infinite values: expected whole numbers.")
    rounded: NDArray[Any] = np.rint(values)
    far = np.abs(values - rounded) > _LABEL_TOLERANCE
    if far.any():
        raise CaseError(f"{source} is a label but holds {values[far][0]:g}: expected whole numbers.")
    return rounded


def _slabs(values: NDArray[Any]) -> list[NDArray[Any]]:
    """Cut along the longest axis into views of a few million values."""
    if values.size == 0:
        return []
    axis = int(np.argmax(values.shape))
    parts = min(values.shape[axis], -(-values.size // _SLAB_VALUES))
    return np.array_split(values, parts, axis=axis)
