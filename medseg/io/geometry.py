"""Image geometry: voxel grids, their affines, and checks of both.

World coordinates are RAS+ millimeters: the first axis points to the patient's right, the second to anterior, the third
to superior. The last column of the affine is the center of voxel (0, 0, 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.errors import CaseError, GeometryError

__all__ = [
    "Grid",
    "check_size",
    "corner_distance",
    "grid_difference",
    "same_grid",
    "spatial_axes",
    "spatial_grid",
    "to_affine4",
]

# Light microscopy reaches 1e-4 mm, and no medical image has voxels of a meter: values outside have wrong units.
MIN_SPACING = 1e-4
MAX_SPACING = 1e3
# Cosine between two voxel axes. Rounded headers stay below 1e-4; at 1e-3 an image of 500 mm is off by half a
# millimeter at its edge, and other readers (ITK) refuse or silently orthogonalize the axes.
MAX_SHEAR = 1e-3
# 8 GiB as float32; a whole-body CT of 512 x 512 x 2000 is a quarter of that.
MAX_VOXELS = 2**31
# Largest distance, in voxels, between the corners of two grids that count as equal.
GRID_TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)
class Grid:
    """The voxel grid of an image.

    Attributes:
        shape: Number of voxels along each axis, `(x, y)` or `(x, y, z)`.
        affine: 4 x 4 float64 matrix from voxel indices to RAS+ mm; the identity for a 2D image without geometry.
    """

    shape: tuple[int, ...]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        affine: NDArray[np.float64] = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4):
            raise GeometryError(f"Invalid affine of shape {affine.shape}: expected (4, 4).")
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between voxel centers along each voxel axis, in mm."""
        return tuple(float(length) for length in _axis_lengths(self.affine)[: len(self.shape)])

    @property
    def orientation(self) -> str:
        """Closest anatomical direction of each voxel axis, such as "LPS"; "?" where it is undefined."""
        if not np.isfinite(self.affine).all():
            return "?"
        return "".join(code or "?" for code in nib.aff2axcodes(self.affine))[: len(self.shape)]

    def describe(self) -> str:
        """Format shape, spacing and orientation for messages."""
        voxels = " x ".join(str(size) for size in self.shape)
        millimeters = " x ".join(f"{step:.4g}" for step in self.spacing)
        return f"{voxels} voxels of {millimeters} mm, {self.orientation}"

    def check(self, source: object, *, max_voxels: int = MAX_VOXELS) -> Grid:
        """Return the grid itself if it is valid.

        Args:
            source: Owner of the grid for messages, usually a file.
            max_voxels: Largest plausible number of voxels.

        Raises:
            GeometryError: An axis has no voxels, or the number of voxels is too large; the affine is non-finite,
                singular or sheared; or the spacing is outside 1e-4 to 1e3 mm.
        """
        check_size(self.shape, source, max_voxels)
        _check_affine(self.affine, source)
        return self


def check_size(shape: tuple[int, ...], source: object, max_voxels: int = MAX_VOXELS) -> None:
    """Refuse empty and implausibly large shapes."""
    if not shape or min(shape) < 1:
        raise GeometryError(
            f"{source} has the invalid shape {shape}: expected at least one voxel along every axis. Its header is "
            "wrong."
        )
    if math.prod(shape) > max_voxels:
        raise GeometryError(
            f"{source} is too large: {math.prod(shape):,} voxels {shape}, the limit is {max_voxels:,}. "
            "Check its header, or raise max_voxels."
        )


def spatial_axes(shape: tuple[int, ...], requested: int | None, source: object) -> int:
    """Return the number of spatial axes of a shape: as requested, or by default two for a 2D image and else three.

    Raises:
        CaseError: The image does not have the requested number; a volume of one slice counts as 2D and as 3D.
    """
    flat = len(shape) == 2
    if requested == 3 and flat:
        raise CaseError(f"{source} is a 2D image {shape}: expected a volume with three axes.")
    if requested == 2 and not flat and shape[2] != 1:
        raise CaseError(f"{source} is a volume {shape}: expected a single slice or a 2D image.")
    return requested or (2 if flat else 3)


def spatial_grid(
    shape: tuple[int, ...], affine: ArrayLike, requested: int | None, source: object, max_voxels: int = MAX_VOXELS
) -> Grid:
    """Return the checked grid of the spatial axes; errors as in `spatial_axes` and `Grid.check`."""
    dims = spatial_axes(shape, requested, source)
    return Grid(shape[:dims], np.asarray(affine)).check(source, max_voxels=max_voxels)


def same_grid(a: Grid, b: Grid, *, tolerance: float = GRID_TOLERANCE) -> bool:
    """Return whether two grids are equal: same shape, and corners within `tolerance` voxels."""
    return not grid_difference(a, b, tolerance=tolerance)


def grid_difference(a: Grid, b: Grid, *, tolerance: float = GRID_TOLERANCE) -> str:
    """Describe the difference of two grids as a phrase for messages; empty if they are equal (see `same_grid`)."""
    if a.shape != b.shape:
        return f"their shapes differ: {a.shape} and {b.shape}"
    distance = corner_distance(a, b)
    # Written so that NaN counts as a difference.
    if distance <= tolerance * min(min(a.spacing), min(b.spacing)):
        return ""
    return f"their corners are up to {distance:.3g} mm apart ({a.describe()}; {b.describe()})"


def corner_distance(a: Grid, b: Grid) -> float:
    """Return the largest distance in mm between corresponding corners of two grids of equal shape."""
    ends = [(0, size - 1) for size in a.shape] + [(0,)] * (3 - len(a.shape))
    corners = np.array([(*corner, 1) for corner in product(*ends)], dtype=np.float64)
    apart = (corners @ (a.affine - b.affine).T)[:, :3]
    return float(np.sqrt((apart**2).sum(axis=1)).max())


def to_affine4(affine: ArrayLike) -> NDArray[np.float64]:
    """Return a 4 x 4 affine; a 3 x 3 affine of a 2D image is extended."""
    given: NDArray[np.float64] = np.asarray(affine, dtype=np.float64)
    if given.shape != (3, 3):
        return given
    full: NDArray[np.float64] = np.eye(4)
    full[:2, :2], full[:2, 3] = given[:2, :2], given[:2, 2]
    return full


def _axis_lengths(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        lengths: NDArray[np.float64] = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return lengths


def _check_affine(affine: NDArray[np.float64], source: object) -> None:
    shown = np.array2string(affine, separator=", ", suppress_small=True).replace("\n", "")
    if not np.isfinite(affine).all():
        raise GeometryError(f"{source} has a non-finite affine (NaN or Inf): {shown}. Repair its header.")
    if not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise GeometryError(f"{source} has an invalid affine: its last row is {affine[3]}, expected [0 0 0 1].")
    lengths = _axis_lengths(affine)
    for axis, length in enumerate(lengths):
        if not MIN_SPACING <= length <= MAX_SPACING:
            raise GeometryError(
                f"{source} has an invalid spacing of {length:.4g} mm along voxel axis {axis}: expected "
                f"{MIN_SPACING:g} to {MAX_SPACING:g} mm. The affine is {shown}; check its units."
            )
    _check_axes(affine[:3, :3] / lengths, source, shown)


def _check_axes(directions: NDArray[np.float64], source: object, shown: str) -> None:
    if abs(np.linalg.det(directions)) < 1e-6:
        raise GeometryError(f"{source} has a singular affine (linearly dependent axes): {shown}. Repair its header.")
    shear = np.abs(directions.T @ directions - np.eye(3)).max()
    if shear > MAX_SHEAR:
        angle = math.degrees(math.acos(min(1.0, shear)))
        raise GeometryError(
            f"{source} has a sheared affine: two voxel axes meet at {angle:.2f} degrees, expected 90 (gantry tilt, or "
            f"an affine registration): {shown}. Resample it to an orthogonal grid first."
        )
