"""A synthetic CT data set: torsos with lungs, a liver and lung nodules, and the exact label of each voxel.

The anatomy is a set of analytic shapes in world coordinates (millimeters, RAS), deformed by a smooth random field. It
is sampled on a scanner grid with thick slices, a few degrees of tilt and sometimes a flipped axis, so software that
ignores the affine fails on these volumes. The label is the shape at each voxel center; the image additionally has the
scanner's blur (partial volume) and correlated noise. No real scan is involved, and organ sizes follow the field of
view, not a population: a network trained on these volumes is of no use on patients.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np

from medseg.errors import OutputError, RequestError
from medseg.files import replace_text, replacing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["LABELS", "Phantom", "make_phantom", "write_phantoms"]

LABELS = {0: "background", 1: "lung", 2: "liver", 3: "nodule"}
LUNG, LIVER, NODULE = 1, 2, 3
NAME = "medseg CT phantoms"

# Attenuation in Hounsfield units. Liver, spleen and muscle lie within one noise level of each other, as on real CT.
AIR, LUNG_TISSUE, FAT, WATER, MUSCLE, SPLEEN, LIVER_TISSUE = -1000, -830, -100, 15, 40, 48, 62
DISC, SPONGY_BONE, RIB_BONE, CORTICAL_BONE = 90, 330, 520, 700
HU_RANGE = (-1024, 3071)

NOISE_SD = 20.0
NOISE_SIGMA = (0.6, 0.6, 0.5)  # voxels
BLUR_SIGMA = (0.6, 0.6, 0.5)  # voxels
SMALLEST_SIDE = 32  # below this, nodules and ribs are thinner than a voxel


@dataclass(frozen=True)
class Phantom:
    """One synthetic CT volume.

    Attributes:
        image: `(X, Y, Z)` int16, HU.
        label: `(X, Y, Z)` uint8, values as in `LABELS`.
        affine: `(4, 4)`, voxel index to world millimeters (RAS); its values are exact in float32.
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


def write_phantoms(
    folder: str | Path,
    *,
    cases: int = 8,
    validation: int = 2,
    unseen: int = 2,
    seed: int = 0,
    shape: Sequence[int] = (96, 96, 64),
    spacing: Sequence[float] = (1.5, 1.5, 3.0),
) -> Path:
    """Write a data set in the layout of the Medical Segmentation Decathlon.

    It consists of `imagesTr`, `labelsTr` (training and validation cases), `imagesTs`, `labelsTs` (test cases) and
    `dataset.json`. Equal arguments write equal bytes; a case does not depend on the number of cases.

    Args:
        folder: Folder of the data set, created if missing.
        cases: Number of volumes in `imagesTr`.
        validation: Number of these, the last ones, that are listed under "validation" instead of "training".
        unseen: Number of further volumes in `imagesTs`, listed under "test".
        seed: Non-negative integer; each volume is drawn from (seed, case).
        shape: Nominal size in voxels; each case differs from it by a few voxels.
        spacing: Nominal spacing in mm; each case differs from it by up to 10 %.

    Returns:
        The path of `dataset.json`, which is written last.

    Raises:
        RequestError: Invalid counts, seed, shape or spacing.
        OutputError: The folder is not writable, or holds the `dataset.json` of another data set.
    """
    _check_counts(cases, validation, unseen)
    root = Path(folder)
    target = root / "dataset.json"
    _refuse_foreign(target)
    entries = []
    for case in range(cases + unseen):
        phantom = make_phantom(case, seed=seed, shape=shape, spacing=spacing)
        entries.append(_write_case(phantom, root, f"phantom_{case:03d}", "Tr" if case < cases else "Ts"))
    train = cases - validation
    listing = _listing(entries[:train], entries[train:cases], entries[cases:], seed)
    return replace_text(target, json.dumps(listing, indent=1) + "\n")


def make_phantom(
    case: int, *, seed: int = 0, shape: Sequence[int] = (96, 96, 64), spacing: Sequence[float] = (1.5, 1.5, 3.0)
) -> Phantom:
    """Generate one phantom; `case` is its index from 0, the other arguments are those of `write_phantoms`.

    Raises:
        RequestError: A negative case or seed, a side below 32 voxels, or a spacing that is not positive.
    """
    _check_grid(case, seed, shape, spacing)
    rng = np.random.default_rng([seed, case])
    grid = tuple(int(n) + int(d) for n, d in zip(shape, rng.integers(-3, 4, size=3), strict=True))
    zooms = np.round(np.asarray(spacing, dtype=float) * rng.uniform(0.9, 1.1, size=3), 2)
    affine = _oblique_affine(grid, zooms, rng)
    canvas = _Canvas(affine, grid, zooms, rng)
    for paint in (_paint_body, _paint_abdomen, _paint_lungs, _paint_bones, _paint_nodules):
        paint(canvas)
    return Phantom(_scan(canvas.hu, rng), canvas.label, affine)


# --- the grid ---------------------------------------------------------------------------------------------------


def _oblique_affine(grid: Sequence[int], zooms: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Affine of a grid tilted by 2 to 6 degrees about each axis, in half of the cases with one axis flipped."""
    angles = np.deg2rad(rng.uniform(2, 6, size=3) * rng.choice([-1, 1], size=3))
    signs = np.ones(3)
    if rng.random() < 0.5:
        signs[rng.integers(3)] = -1
    affine = np.eye(4)
    affine[:3, :3] = _rotation(angles) @ np.diag(zooms * signs)
    center = rng.uniform((-40, -40, -340), (40, 40, -260))
    affine[:3, 3] = center - affine[:3, :3] @ ((np.asarray(grid) - 1) / 2)
    return affine.astype(np.float32).astype(np.float64)


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation by the three angles (radians) about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[b, a] = np.sin(angle)
        turn[a, b] = -np.sin(angle)
        matrix = turn @ matrix
    return matrix


class _Canvas:
    """The volume being painted.

    The coordinates `x` (right), `y` (anterior), `z` (superior) run from about -1 to 1 across the field of view and are
    deformed by a smooth field, so that an ellipsoid in them is an organ-like shape.
    """

    def __init__(
        self,
        affine: NDArray[np.float64],
        grid: tuple[int, ...],
        zooms: NDArray[np.float64],
        rng: np.random.Generator,
    ) -> None:
        self.affine = affine
        self.zooms = zooms
        self.half = np.asarray(grid) * zooms / 2
        self.rng = rng
        self.hu = np.full(grid, AIR, dtype=np.float32)
        self.label = np.zeros(grid, dtype=np.uint8)
        self.x, self.y, self.z = _bend(_positions(affine, grid, self.half), rng)
        self.nodule_sites = np.empty(0, dtype=np.intp)

    def ellipsoid(self, center: Sequence[float], radii: Sequence[float], vary: float = 0.06) -> NDArray[np.float32]:
        """Level of a randomly varied ellipsoid: 0 at its center, 1 on its surface, growing with the square."""
        c = np.add(center, self.rng.uniform(-0.02, 0.02, size=3)).astype(np.float32)
        r = np.multiply(radii, self.rng.uniform(1 - vary, 1 + vary, size=3)).astype(np.float32)
        level: NDArray[np.float32] = ((self.x - c[0]) / r[0]) ** 2
        level += ((self.y - c[1]) / r[1]) ** 2
        level += ((self.z - c[2]) / r[2]) ** 2
        return level

    def fill(self, where: NDArray[np.bool_], hu: NDArray[Any] | float, label: int = 0) -> None:
        """Set the attenuation (one number, or one per masked voxel) and the label of the masked voxels."""
        self.hu[where] = hu
        self.label[where] = label

    def tube(self, x: float, y: float, radius: Sequence[float]) -> NDArray[np.float32]:
        """Level of an elliptic cylinder along z."""
        level: NDArray[np.float32] = ((self.x - np.float32(x)) / np.float32(radius[0])) ** 2
        level += ((self.y - np.float32(y)) / np.float32(radius[1])) ** 2
        return level


def _positions(
    affine: NDArray[np.float64], grid: tuple[int, ...], half: NDArray[np.float64]
) -> list[NDArray[np.float32]]:
    """World position of each voxel center relative to the middle of the grid, in half fields of view."""
    steps = [np.arange(n) - (n - 1) / 2 for n in grid]
    i, j, k = np.meshgrid(*steps, indexing="ij", sparse=True)
    rows = affine[:3, :3] / half[:, None]
    return [(row[0] * i + row[1] * j + row[2] * k).astype(np.float32) for row in rows]


def _bend(positions: list[NDArray[np.float32]], rng: np.random.Generator) -> list[NDArray[np.float32]]:
    """Displace the positions by a smooth field of up to about a twentieth of the field of view."""
    return [p + np.float32(0.022) * _waves(positions, rng, count=3, frequency=3.0) for p in positions]


def _waves(
    positions: Sequence[NDArray[np.float32]], rng: np.random.Generator, *, count: int, frequency: float
) -> NDArray[np.float32]:
    """Sum of `count` plane waves of random direction and phase; `frequency` in radians per half field of view."""
    total = np.zeros_like(positions[0])
    for _ in range(count):
        direction = rng.normal(size=3)
        wave = (direction / np.linalg.norm(direction) * frequency * rng.uniform(0.7, 1.3)).astype(np.float32)
        phase = np.float32(rng.uniform(0, 2 * np.pi))
        total += np.sin(wave[0] * positions[0] + wave[1] * positions[1] + wave[2] * positions[2] + phase)
    return total


# --- the anatomy ------------------------------------------------------------------------------------------------


def _paint_body(canvas: _Canvas) -> None:
    """Skin and a rim of fat around soft tissue."""
    rx, ry = canvas.rng.uniform(0.86, 0.90), canvas.rng.uniform(0.64, 0.69)
    level = np.abs(canvas.x / np.float32(rx)) ** np.float32(2.4) + np.abs(canvas.y / np.float32(ry)) ** np.float32(2.4)
    canvas.fill(level < 1, MUSCLE)
    canvas.fill(level < 0.96, FAT)
    canvas.fill(level < canvas.rng.uniform(0.76, 0.84), MUSCLE)


def _paint_abdomen(canvas: _Canvas) -> None:
    """Spleen and a stomach with a gas bubble on the left, both unlabeled; the liver, a wedge from the right."""
    canvas.fill(canvas.ellipsoid((-0.50, -0.16, -0.50), (0.20, 0.27, 0.34)) < 1, SPLEEN)
    stomach = canvas.ellipsoid((-0.34, 0.20, -0.62), (0.24, 0.20, 0.28))
    canvas.fill(stomach < 1, WATER)
    canvas.fill((stomach < 0.85) & (canvas.y > 0.28), AIR)
    level = canvas.ellipsoid((0.26, 0.04, -0.47), (0.46, 0.42, 0.47))
    ceiling = np.float32(0.02) - np.float32(0.12) * canvas.tube(0.38, 0.05, (0.31, 0.44))
    canvas.fill((level < 1) & (canvas.z < ceiling), LIVER_TISSUE, LIVER)


def _paint_lungs(canvas: _Canvas) -> None:
    """Lungs with vessels above a domed diaphragm, the heart between them, and the windpipe."""
    heart = canvas.ellipsoid((-0.12, 0.14, 0.05), (0.27, 0.25, 0.34))
    canvas.fill(heart < 1, MUSCLE)
    sites = np.zeros(canvas.hu.shape, dtype=bool)
    for side, top in ((1, -0.02), (-1, -0.14)):
        level = canvas.ellipsoid((side * 0.42, 0.0, 0.22), (0.31, 0.45, 0.70), vary=0.04)
        height = canvas.z - _dome(canvas, side, top)
        lung = (level < 1) & (height > 0) & (heart > 1.05)
        _fill_lung(canvas, lung, level[lung])
        sites |= (level < 0.75) & (height > 0.08) & (heart > 1.4)
    canvas.nodule_sites = np.flatnonzero(sites)
    windpipe = (canvas.tube(0.0, -0.02, (0.055, 0.055)) < 1) & (canvas.z > 0.38)
    canvas.fill(windpipe & (canvas.label == 0), AIR)


def _dome(canvas: _Canvas, side: int, top: float) -> NDArray[np.float32]:
    """Height of the diaphragm on one side: a cap that falls off toward the ribs."""
    slope = canvas.tube(side * 0.38, 0.05, (0.31, 0.44))
    return np.float32(top + canvas.rng.uniform(-0.04, 0.04)) - np.float32(0.30) * slope


def _fill_lung(canvas: _Canvas, lung: NDArray[np.bool_], level: NDArray[np.float32]) -> None:
    """Fill the voxels of one lung: denser toward the back, with branching vessels that thin out toward the ribs.

    The curves on which two smooth random functions both vanish serve as the vessels.
    """
    positions = [canvas.x[lung], canvas.y[lung], canvas.z[lung]]
    first, second = (_waves(positions, canvas.rng, count=4, frequency=17.0) for _ in range(2))
    width = np.float32(0.50) * (np.float32(1.05) - level)
    vessel = np.exp(-(first**2 + second**2) / (2 * width**2 + np.float32(1e-3)))
    air = np.float32(LUNG_TISSUE) - np.float32(45) * positions[1]
    canvas.fill(lung, air + (np.float32(MUSCLE) - air) * vessel, LUNG)


def _paint_bones(canvas: _Canvas) -> None:
    """A spine of vertebrae and discs with its canal, and slanting ribs around the lungs."""
    period = np.float32(2 * np.pi / 0.21)
    shift = np.float32(canvas.rng.uniform(0, 2 * np.pi))
    body = canvas.tube(0.0, -0.40, (0.125, 0.105))
    disc = np.sin(canvas.z * period + shift) > 0.72
    _set_bone(canvas, body < 1, np.where(disc, DISC, np.where(body > 0.62, CORTICAL_BONE, SPONGY_BONE)))
    arch = canvas.tube(0.0, -0.545, (0.075, 0.065))
    _set_bone(canvas, (arch < 1) & ~disc, np.where(arch < 0.45, WATER, RIB_BONE))
    cage = canvas.ellipsoid((0.0, 0.0, 0.10), (0.77, 0.525, 1.25), vary=0.01)
    slant = np.sin((canvas.z + np.float32(0.35) * canvas.y) * period + shift)
    ribs = (cage > 0.94) & (cage < 1.06) & (slant > 0.35) & (canvas.z > -0.45)
    _set_bone(canvas, ribs, np.full(canvas.hu.shape, RIB_BONE))


def _set_bone(canvas: _Canvas, where: NDArray[np.bool_], hu: NDArray[Any]) -> None:
    """Paint bone over anything but the air outside and the labeled organs."""
    where = where & (canvas.hu > AIR) & (canvas.label == 0)
    canvas.fill(where, hu[where])


def _paint_nodules(canvas: _Canvas) -> None:
    """One to three lobed nodules, clipped to the lungs."""
    sites = canvas.nodule_sites
    smallest = 1.3 * float(canvas.zooms.max())
    for _ in range(int(canvas.rng.integers(1, 4))):
        site = np.unravel_index(sites[canvas.rng.integers(len(sites))], canvas.hu.shape)
        radius = max(smallest, float(canvas.half.mean() * canvas.rng.uniform(0.055, 0.12)))
        _paint_nodule(canvas, np.asarray(site), radius)


def _paint_nodule(canvas: _Canvas, site: NDArray[np.intp], radius: float) -> None:
    """Paint one nodule of about `radius` mm around the voxel `site`."""
    reach = np.ceil(1.35 * radius / canvas.zooms).astype(int)
    low = np.maximum(site - reach, 0)
    high = np.minimum(site + reach + 1, canvas.hu.shape)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    offsets = np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in box), indexing="ij"), axis=-1) - site
    mm = offsets @ canvas.affine[:3, :3].T
    distance = np.linalg.norm(mm, axis=-1)
    toward = mm / np.maximum(distance, 1e-6)[..., None]
    lobes = _waves([toward[..., axis].astype(np.float32) for axis in range(3)], canvas.rng, count=3, frequency=3.0)
    inside = (distance < radius * (1 + 0.10 * lobes)) & (canvas.label[box] == LUNG)
    canvas.hu[box][inside] = canvas.rng.uniform(0, 60)
    canvas.label[box][inside] = NODULE


# --- the scanner ------------------------------------------------------------------------------------------------


def _scan(hu: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int16]:
    """Simulate the scanner: blur, correlated noise, and rounding to integers."""
    white = rng.standard_normal(hu.shape, dtype=np.float32)
    gain = np.prod([np.sqrt(np.sum(_gaussian(sigma) ** 2)) for sigma in NOISE_SIGMA])
    image = _blur(hu, BLUR_SIGMA) + _blur(white, NOISE_SIGMA) * np.float32(NOISE_SD / gain)
    return np.clip(np.rint(image), *HU_RANGE).astype(np.int16)


def _blur(volume: NDArray[np.float32], sigmas: Sequence[float]) -> NDArray[np.float32]:
    """Gaussian blur, one axis at a time, edges repeated; sigmas in voxels."""
    for axis, sigma in enumerate(sigmas):
        taps = _gaussian(sigma)
        reach = len(taps) // 2
        length = volume.shape[axis]
        padded = np.pad(volume, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
        windows = (np.take(padded, range(start, start + length), axis=axis) for start in range(len(taps)))
        volume = np.sum([tap * window for tap, window in zip(taps, windows, strict=True)], axis=0)
    return volume


def _gaussian(sigma: float) -> NDArray[np.float32]:
    """Five Gaussian weights that sum to 1; enough for a sigma below one voxel."""
    weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum(), dtype=np.float32)


# --- files ------------------------------------------------------------------------------------------------------


def _write_case(phantom: Phantom, root: Path, name: str, part: str) -> dict[str, str]:
    """Write one image and its label; return its entry in `dataset.json`."""
    entry = {"image": f"./images{part}/{name}.nii.gz", "label": f"./labels{part}/{name}.nii.gz"}
    for key, array in (("image", phantom.image), ("label", phantom.label)):
        with replacing(root / entry[key]) as temporary:
            temporary.write_bytes(_nifti_bytes(array, phantom.affine))
    return entry


def _nifti_bytes(array: NDArray[Any], affine: NDArray[np.float64]) -> bytes:
    """A gzipped NIfTI file with equal sform and qform, and without a time stamp: equal arrays give equal bytes."""
    nifti = nibabel.Nifti1Image(array, affine)
    nifti.set_sform(affine, code=1)
    nifti.set_qform(affine, code=1)
    nifti.header.set_xyzt_units("mm")
    return gzip.compress(nifti.to_bytes(), compresslevel=4, mtime=0)


def _listing(
    training: list[dict[str, str]], validation: list[dict[str, str]], test: list[dict[str, str]], seed: int
) -> dict[str, Any]:
    """Return the content of `dataset.json`."""
    return {
        "name": NAME,
        "description": "Synthetic torsos with exact labels; no patient data",
        "reference": f"medseg.studies.phantoms, seed {seed}",
        "licence": "Apache-2.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in LABELS.items()},
        "numTraining": len(training),
        "numTest": len(test),
        "training": training,
        "validation": validation,
        "test": test,
    }


def _refuse_foreign(listing: Path) -> None:
    """Refuse to overwrite the `dataset.json` of another data set."""
    if not listing.exists():
        return
    try:
        name = json.loads(listing.read_text(encoding="utf-8")).get("name")
    except (OSError, ValueError, AttributeError):
        name = None
    if name != NAME:
        raise OutputError(
            f"{listing.name} in {listing.parent.name!r} belongs to another data set: found {name!r}, expected "
            f"{NAME!r} or no file. Choose another folder."
        )


# --- checks -----------------------------------------------------------------------------------------------------


def _check_counts(cases: int, validation: int, unseen: int) -> None:
    if cases < 1 or unseen < 0 or not 0 <= validation < cases:
        raise RequestError(
            f"invalid counts: cases={cases}, validation={validation}, unseen={unseen}; expected at least 1 case, "
            "0 <= validation < cases and unseen >= 0"
        )


def _check_grid(case: int, seed: int, shape: Sequence[int], spacing: Sequence[float]) -> None:
    if case < 0 or seed < 0:
        raise RequestError(f"invalid case or seed: case={case}, seed={seed}; expected non-negative integers")
    if len(shape) != 3 or min(shape) < SMALLEST_SIDE:
        raise RequestError(f"invalid shape {tuple(shape)}: expected three sides of at least {SMALLEST_SIDE} voxels")
    if len(spacing) != 3 or not all(np.isfinite(spacing)) or min(spacing) < 0.1:
        raise RequestError(f"invalid spacing {tuple(spacing)}: expected three numbers in mm, at least 0.1 each")
