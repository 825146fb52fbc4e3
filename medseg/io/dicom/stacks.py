"""Stacking slices: which images of a series form one volume, in which order, and on which grid.

Only ImagePositionPatient, ImageOrientationPatient and PixelSpacing are used. SliceLocation, instance numbers and file
names are no reliable order, and SliceThickness is not the distance of slices.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from medseg.errors import CaseError, GeometryError, in_a_line
from medseg.io.dicom.headers import Header, Plane
from medseg.io.dicom.sources import streams
from medseg.io.geometry import GRID_TOLERANCE, MAX_SHEAR, Grid
from medseg.notices import warn

__all__ = ["Slice", "find_stacks", "order_slices", "slice_key"]

logger = logging.getLogger(__name__)

# Tolerance of direction cosines; headers with four decimals stay below it, and an image of 500 mm moves by 0.1 mm.
_SAME_ORIENTATION: Final = 2e-4
# Relative tolerance of pixel spacings.
_SAME_SPACING: Final = 1e-4
# Images closer than this fraction of a pixel are at the same position.
_SAME_POSITION: Final = 0.01
_UNIT_TOLERANCE: Final = 1e-2
_LPS_TO_RAS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
_SHOWN: Final = 8


@dataclass(frozen=True)
class Slice:
    """One plane of one file."""

    header: Header
    plane: Plane

    @property
    def has_geometry(self) -> bool:
        """Whether the slice has a position and an orientation."""
        return self.plane.position is not None and self.plane.orientation is not None


def slice_key(item: Slice) -> Hashable:
    """Return a key that is equal for copies of one image, and for images at the same position."""
    return (
        (item.plane.position, item.plane.orientation) if item.has_geometry else (item.header.sop_uid, item.plane.frame)
    )


def find_stacks(headers: Sequence[Header], source: object) -> list[list[Slice]]:
    """Split the images of a series into volumes: by orientation, size and spacing, then by time, echo and similar.

    Duplicate files count once. Each image without geometry is a separate 2D image.

    Raises:
        CaseError: Several images have the same position and no attribute separates them into volumes; or two files
            with the same SOPInstanceUID differ.
    """
    slices = [Slice(header, plane) for header in _without_copies(headers) for plane in header.planes]
    stacks = [[item] for item in slices if not item.has_geometry]
    for group in _group_alike([item for item in slices if item.has_geometry]):
        stacks += _separated(group, source)
    return sorted(stacks, key=lambda stack: min(_number(item) for item in stack))


def order_slices(slices: Sequence[Slice], source: object) -> tuple[list[Slice], Grid]:
    """Sort the slices of a volume along their normal, and return them with their unchecked grid.

    The grid axes are columns, rows and slices; slices ascend along the cross product of row and column direction.

    Raises:
        GeometryError: Slices are unevenly spaced or missing, the stack is sheared (gantry tilt), or directions or
            spacings are invalid.
    """
    row, column, normal = _axes(slices[0], source)
    ordered = sorted(slices, key=lambda item: float(np.dot(_position(item), normal)))
    positions = np.array([_position(item) for item in ordered])
    between_rows, between_columns = _spacing(slices[0], source)
    axes = np.stack([row * between_columns, column * between_rows, _step(ordered, positions, normal, source)], axis=1)
    if len(ordered) > 1:
        _refuse_uneven(positions, axes, normal, source)
        axes[:, 2] = _orthogonal_step(axes[:, 2], len(ordered) - 1, min(_spacing(slices[0], source)), normal, source)
    affine: NDArray[np.float64] = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, positions[0]
    header = ordered[0].header
    return ordered, Grid((header.columns, header.rows, len(ordered)), _LPS_TO_RAS @ affine)


def _number(item: Slice) -> tuple[int, str, int]:
    instance = item.header.instance
    return (math.inf if instance is None else instance, str(item.header.source), item.plane.frame)  # type: ignore[return-value]


def _without_copies(headers: Sequence[Header]) -> list[Header]:
    """Skip files that are byte-identical copies of others."""
    kept: dict[str, Header] = {}
    rest = []
    for header in headers:
        if not header.sop_uid or header.sop_uid not in kept:
            kept.setdefault(header.sop_uid or str(header.source), header)
            rest.append(header)
            continue
        first = kept[header.sop_uid]
        if _digest(first) != _digest(header):
            raise CaseError(
                f"{first.source} and {header.source} have the same SOPInstanceUID (ending in {header.sop_uid[-8:]}), "
                "but differ: remove the wrong one."
            )
        logger.info("%s is a duplicate of %s and is skipped.", header.source, first.source)
    return rest


def _digest(header: Header) -> str:
    digest = hashlib.sha256()
    try:
        for _, stream in streams([header.source]):
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except (CaseError, OSError, MemoryError):
        raise
    except Exception as error:  # each compression method raises different types
        raise CaseError(f"{header.source} cannot be unpacked ({in_a_line(error)}): copy it again.") from error
    return digest.hexdigest()


def _group_alike(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Group slices by size, orientation and pixel spacing."""
    groups: list[list[Slice]] = []
    for item in slices:
        for group in groups:
            if _is_alike(group[0], item):
                group.append(item)
                break
        else:
            groups.append([item])
    return groups


def _is_alike(a: Slice, b: Slice) -> bool:
    sizes = [(item.header.rows, item.header.columns, item.header.samples) for item in (a, b)]
    if sizes[0] != sizes[1] or (a.plane.spacing is None) != (b.plane.spacing is None):
        return False
    difference = np.abs(np.subtract(a.plane.orientation or 0, b.plane.orientation or 0)).max()
    return bool(
        difference <= _SAME_ORIENTATION and np.allclose(a.plane.spacing or 0, b.plane.spacing or 0, rtol=_SAME_SPACING)
    )


def _separated(slices: Sequence[Slice], source: object) -> list[list[Slice]]:
    """Split slices with repeated positions, such as time points, by the first discriminator that separates them."""
    position_ids = _position_ids(slices, source)
    repeats = Counter(position_ids)
    if max(repeats.values()) == 1:
        return [list(slices)]
    if len(set(repeats.values())) == 1:
        keys = [
            [str(item.header.source) for item in slices],
            *([_discriminator(item, name) for item in slices] for name in _names(slices)),
        ]
        for key in (*keys, _ranks(slices, position_ids)):
            parts = _split_by(slices, position_ids, key)
            if parts:
                return parts
    raise CaseError(
        f"{source}: {len(slices)} images at {len(repeats)} positions cannot be separated into volumes (by time, echo, "
        "acquisition or instance number). Export the volumes as separate series."
    )


def _position_ids(slices: Sequence[Slice], source: object) -> list[int]:
    """Number the positions along the normal."""
    _, _, normal = _axes(slices[0], source)
    near = _SAME_POSITION * min(_spacing(slices[0], source))
    along = np.array([float(np.dot(_position(item), normal)) for item in slices])
    order = np.argsort(along, kind="stable")
    numbers = np.empty(len(slices), dtype=int)
    numbers[order] = np.concatenate([[0], np.cumsum(np.diff(along[order]) > near)])
    return [int(number) for number in numbers]


def _names(slices: Sequence[Slice]) -> list[str]:
    """Return the discriminators that all slices have and that differ, in order of preference."""
    shared = [name for name, _ in slices[0].plane.discriminators]
    return [name for name in shared if len({_discriminator(item, name) for item in slices}) > 1]


def _discriminator(item: Slice, name: str) -> str:
    return dict(item.plane.discriminators).get(name, "")


def _ranks(slices: Sequence[Slice], position_ids: Sequence[int]) -> list[str]:
    """Return the rank of each slice at its position, if instances are numbered by volume or by position."""
    numbers = [(item.header.instance, item.plane.frame) for item in slices]
    if any(number[0] is None for number in numbers) or len(set(numbers)) < len(numbers):
        return [""] * len(slices)
    order = sorted(range(len(slices)), key=lambda index: numbers[index])
    seen: Counter[int] = Counter()
    ranks = [0] * len(slices)
    for index in order:
        ranks[index] = seen[position_ids[index]]
        seen[position_ids[index]] += 1
    by_rank = [ranks[index] for index in order]
    by_position = [position_ids[index] for index in order]
    runs = sum(a != b for a, b in pairwise(by_position)) + 1
    if by_rank == sorted(by_rank) or runs == len(seen):
        return [str(rank) for rank in ranks]
    return [""] * len(slices)


def _split_by(slices: Sequence[Slice], position_ids: Sequence[int], key: Sequence[str]) -> list[list[Slice]]:
    """Split slices by a key if each part then has one slice at every position; otherwise return an empty list."""
    parts: dict[str, list[int]] = {}
    for index, value in enumerate(key):
        parts.setdefault(value, []).append(index)
    everywhere = sorted(set(position_ids))
    if len(parts) > 1 and all(sorted(position_ids[index] for index in part) == everywhere for part in parts.values()):
        return [[slices[index] for index in part] for part in parts.values()]
    return []


def _position(item: Slice) -> NDArray[np.float64]:
    return np.asarray(item.plane.position, dtype=np.float64)


def _axes(item: Slice, source: object) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the unit vectors along rows, along columns, and across the slice, LPS+."""
    row, column = np.asarray(item.plane.orientation, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > _UNIT_TOLERANCE or abs(np.dot(row, column)) > MAX_SHEAR:
        shown = ", ".join(f"{number:g}" for number in (*row, *column))
        raise GeometryError(
            f"{source} has an invalid ImageOrientationPatient [{shown}]: expected two orthogonal unit vectors. Its "
            "header is wrong."
        )
    row, column = row / lengths[0], column / lengths[1]
    normal = np.cross(row, column)
    return row, column, normal / np.linalg.norm(normal)


def _spacing(item: Slice, source: object) -> tuple[float, float]:
    spacing = item.plane.spacing
    if spacing is None or min(spacing) <= 0:
        found = "no PixelSpacing" if spacing is None else f"the PixelSpacing {spacing[0]:g} x {spacing[1]:g}"
        raise GeometryError(f"{source} has {found}: expected two positive values. Export it again with its geometry.")
    return spacing[0], spacing[1]


def _step(
    ordered: Sequence[Slice], positions: NDArray[np.float64], normal: NDArray[np.float64], source: object
) -> NDArray[np.float64]:
    """Return the vector from one slice to the next, LPS+ mm."""
    if len(ordered) == 1:
        thickness = ordered[0].plane.thickness
        if thickness is None:
            text = "a single slice without SliceThickness or SpacingBetweenSlices; 1 mm is assumed"
            warn(logger, "spacing-assumed", text, source)
        return normal * (thickness or 1.0)
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(ordered) - 1)
    return step


def _orthogonal_step(
    step: NDArray[np.float64], count: int, pixel: float, normal: NDArray[np.float64], source: object
) -> NDArray[np.float64]:
    """Return the step between slices along the normal; refuse a sheared stack, and ignore rounding errors.

    Positions rounded to 0.01 mm deviate sideways by less than a tenth of a pixel over the whole stack.
    """
    along = float(np.dot(step, normal))
    aside = float(np.linalg.norm(step - along * normal))
    if aside <= MAX_SHEAR * along:
        return step
    if aside * count <= GRID_TOLERANCE * pixel:
        return along * normal
    raise GeometryError(
        f"{source} is sheared: its slices shift sideways by {aside:.3g} mm per {along:.3g} mm, which is a gantry tilt "
        f"of {math.degrees(math.atan2(aside, along)):.1f} degrees. Resample it to an orthogonal grid first, as "
        "dcm2niix does."
    )


def _refuse_uneven(
    positions: NDArray[np.float64], axes: NDArray[np.float64], normal: NDArray[np.float64], source: object
) -> None:
    """Refuse stacks with a slice more than a tenth of a voxel off the regular grid."""
    due = positions[0] + np.arange(len(positions))[:, None] * axes[:, 2]
    off = np.abs(np.linalg.solve(axes, (positions - due).T))
    if off.max() <= GRID_TOLERANCE:
        return
    along = positions @ normal
    if off[2].max() <= GRID_TOLERANCE:
        worst = int(off[:2].max(axis=0).argmax())
        raise GeometryError(
            f"{source} has a misaligned slice, {off[:2].max():.2g} pixels off the line of the others, at "
            f"{along[worst]:.6g} mm: expected aligned slices."
        )
    raise GeometryError(f"{source} has unevenly spaced slices: {_gaps(along)}. Export all slices, or resample it.")


def _gaps(along: NDArray[np.float64]) -> str:
    """Describe the positions along the normal between which the distance is not the usual one."""
    steps = np.diff(along)
    usual = float(np.median(steps))
    odd = [index for index, step in enumerate(steps) if abs(step - usual) > GRID_TOLERANCE * usual]
    gaps = []
    for index in odd[:_SHOWN]:
        missing = round(steps[index] / usual) - 1
        even = missing > 0 and abs(steps[index] - (missing + 1) * usual) <= GRID_TOLERANCE * usual
        hint = f", as if {missing} slice{'s' if missing > 1 else ''} were missing" if even else ""
        gaps.append(f"{steps[index]:.4g} mm between {along[index]:.6g} and {along[index + 1]:.6g}{hint}")
    more = f", and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    if not gaps:
        gaps = [f"they drift from {steps.min():.4g} to {steps.max():.4g} mm"]
    return f"usually {usual:.4g} mm, but {'; '.join(gaps)}{more} (along the normal)"
