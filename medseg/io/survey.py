"""What a file holds, gathered without judging: grid, intensities, label values, and marks that tell copies apart.

One image and one label are in memory at a time, in the narrowest type that holds them; statistics go slab by slab.
Nothing that names a patient leaves this module: a DICOM PatientID is kept as a keyed hash whose key ends with the
process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

from medseg.errors import CaseError
from medseg.io.dicom.detect import image_kind
from medseg.io.formats import FORMATS
from medseg.io.geometry import Grid, corner_distance
from medseg.io.labels import load_label
from medseg.io.names import StrPath, absolute
from medseg.io.readers import find_reader, load
from medseg.io.voxels import ReadOptions

__all__ = [
    "FileFacts",
    "Header",
    "Opened",
    "count_values",
    "foreground_inside",
    "nifti_header",
    "open_image",
    "open_label",
    "share_on_minimum",
]

PERCENTILES = (1, 50, 99)
_SAMPLES = 1_000_000
_SLAB_VALUES = 1 << 22
_MAX_CHANNELS = 16
_TABLE = 1 << 16
_KEY = os.urandom(16)


@dataclass(frozen=True)
class Header:
    """What a NIfTI header says beyond what reading needs.

    Attributes:
        dtype: type of the stored values.
        shape: all axes, those of length 1 included.
        apart: mm between the corners of sform and qform where both are set; 0 where they agree.
        step: smallest distance of voxels, mm.
        stretch: by which part pixdim differs from the voxel sizes of the sform, if that counts alone.
    """

    dtype: str
    shape: tuple[int, ...]
    apart: float
    step: float
    stretch: float


@dataclass(frozen=True)
class FileFacts:
    """What one file holds.

    Attributes:
        file: its name, relative to what was examined.
        format: family of formats, a key of `medseg.io.formats.FORMATS`.
        shape: voxels along each axis in space.
        channels: values per voxel.
        spacing: mm between voxel centers.
        orientation: such as "LPS"; empty for a picture, which has no place in space.
        dtype: type of the stored values.
        minimum: lowest value, of a label too.
        percentiles: the 1st, 50th and 99th of a sample of a million values; empty for a label.
        maximum: highest value.
        nonfinite: values that are NaN or infinite.
        labels: label value -> voxels, ascending; empty for an image.
        digest: hash of shape and values in RAS order; equal for copies, however they are stored.
        modality: of a DICOM image, such as "CT".
        grid: the grid itself.
        slices: hash of each axial slice, of which constant ones have none.
        header: of a NIfTI file.
        patient: keyed hash of PatientID.
    """

    file: str
    format: str
    shape: tuple[int, ...]
    channels: int
    spacing: tuple[float, ...]
    orientation: str
    dtype: str
    minimum: float
    percentiles: tuple[float, ...]
    maximum: float
    nonfinite: int
    labels: dict[int, int]
    digest: str
    modality: str = ""
    grid: Grid = field(repr=False, kw_only=True)
    slices: tuple[bytes | None, ...] = field(default=(), repr=False)
    header: Header | None = None
    patient: str = field(default="", repr=False)

    @property
    def has_geometry(self) -> bool:
        """Whether it says where it lies."""
        return bool(self.orientation)

    def slice_position(self, number: int) -> NDArray[np.float64]:
        """Return where the first voxel of an axial slice of `slices` lies, RAS+ mm."""
        turn = io_orientation(self.grid.affine)
        affine = self.grid.affine @ inv_ornt_aff(turn, self.shape)
        position: NDArray[np.float64] = (affine @ [0, 0, number, 1])[:3]
        return position


@dataclass(frozen=True)
class Opened:
    """A file that was read.

    Attributes:
        facts: what it holds.
        array: its values, channel first; of a label without channels.
    """

    facts: FileFacts
    array: NDArray[Any]


def open_image(path: StrPath, file: str, *, spatial_dims: int | None = None, channels: int | None = None) -> Opened:
    """Read an image and gather its facts.

    Args:
        path: as for `medseg.io.load`.
        file: what it is to be called.
        spatial_dims: as for `medseg.io.load`.
        channels: values per voxel that are due; where that is None, any number up to 16 is taken.

    Raises:
        CaseError: it cannot be read, for another reason than values that are no numbers.
    """
    array, grid, nonfinite = _read_image(path, spatial_dims, channels)
    return Opened(_facts(path, file, array, grid, nonfinite=nonfinite), array)


def open_label(
    path: StrPath,
    file: str,
    *,
    spatial_dims: int | None = None,
    like: StrPath | None = None,
    options: Mapping[str, Any] | None = None,
) -> Opened:
    """Read a label and gather its facts; the array has no channels and is of whole numbers.

    Args:
        path: as for `medseg.io.load_label`.
        file: what it is to be called.
        spatial_dims: as for `medseg.io.load_label`.
        like: the image that it belongs to.
        options: how DICOM SEG and RT-STRUCT are read, as more arguments of `medseg.io.load_label`.

    Raises:
        CaseError: it cannot be read, or holds other values than whole numbers.
    """
    loaded = load_label(path, spatial_dims=spatial_dims, like=like, **(options or {}))
    array: NDArray[Any] = loaded.as_tensor().numpy()
    grid = Grid(array.shape[1:], loaded.affine.numpy())
    return Opened(_facts(path, file, array, grid, label=True), array[0])


def nifti_header(path: StrPath) -> Header | None:
    """Return what a NIfTI header says; None for other formats, and where it cannot be parsed."""
    if image_kind(path) != "nifti":
        return None
    try:
        image = cast("Any", nib.load(absolute(path)))
        header, shape = image.header, tuple(int(size) for size in image.shape)
        apart = 0.0
        if header["sform_code"] and header["qform_code"]:
            space = shape[:3] if len(shape) > 2 else (*shape, 1)
            apart = corner_distance(Grid(space, header.get_sform()), Grid(space, header.get_qform()))
        zooms = np.asarray(header.get_zooms()[: min(3, len(shape))], dtype=np.float64)
        stretch = 0.0
        if header["sform_code"] and not header["qform_code"]:
            stretch = float(np.abs(zooms / np.linalg.norm(header.get_sform()[:3, : len(zooms)], axis=0) - 1).max())
        return Header(str(header.get_data_dtype()), shape, apart, float(zooms.min()), stretch)
    except Exception:  # a damaged header raises many types; what is wrong with it is told by reading the file
        return None


def count_values(array: NDArray[Any]) -> dict[int, int]:
    """Return how often each whole number occurs, ascending."""
    if array.size == 0:
        return {}
    low, high = int(array.min()), int(array.max())
    if high - low < _TABLE:
        table = sum(np.bincount((slab - low).ravel(), minlength=high - low + 1) for slab in _slabs(array))
        counts = np.asarray(table)
        return {int(index) + low: int(counts[index]) for index in np.flatnonzero(counts)}
    found: dict[int, int] = {}
    for slab in _slabs(array):
        for value, count in zip(*np.unique(slab, return_counts=True), strict=True):
            found[int(value)] = found.get(int(value), 0) + int(count)
    return dict(sorted(found.items()))


def share_on_minimum(image: NDArray[Any], label: NDArray[Any]) -> float:
    """Return which part of a label's foreground lies on voxels of the image's lowest value; 0 without foreground.

    Args:
        image: `(C, *spatial)`.
        label: `(*spatial)`.
    """
    lowest = image[0].min()
    marked = on_lowest = 0
    for part, values in zip(_slabs(label), _slabs(image[0], like=label), strict=True):
        inside = part > 0
        marked += int(inside.sum())
        on_lowest += int((values[inside] == lowest).sum())
    return on_lowest / marked if marked else 0.0


def foreground_inside(label: NDArray[Any], grid: Grid, image: Grid) -> float:
    """Return which part of a label's foreground has its voxel centers within the box of the image's grid.

    Args:
        label: `(x, y, z)` on `grid`.
        grid: the label's grid.
        image: the image's grid.
    """
    to_image = np.linalg.inv(image.affine) @ grid.affine
    limits = np.array(image.shape) - 0.5
    total = inside = 0
    for number in range(label.shape[-1]):
        flat = np.argwhere(label[..., number] > 0)
        points = np.column_stack([flat, np.full(len(flat), number), np.ones(len(flat))]) @ to_image.T
        total += len(flat)
        inside += int(((points[:, :3] >= -0.5) & (points[:, :3] <= limits)).all(axis=1).sum())
    return inside / total if total else 0.0


def _read_image(path: StrPath, spatial_dims: int | None, channels: int | None) -> tuple[NDArray[Any], Grid, int]:
    first: CaseError | None = None
    for count in [channels] if channels else [None, *range(2, _MAX_CHANNELS + 1)]:
        try:
            loaded = load(path, spatial_dims=spatial_dims, channels=count, dtype="stored")
        except CaseError as error:
            first = first or error
            if error.code == "nonfinite":
                return _read_nonfinite(path, spatial_dims, count)
            if error.code != "channels":
                break
            continue
        array: NDArray[Any] = loaded.as_tensor().numpy()
        return array, Grid(array.shape[1:], loaded.affine.numpy()), 0
    raise first or CaseError(f"{path} cannot be read.")


def _read_nonfinite(path: StrPath, spatial_dims: int | None, channels: int | None) -> tuple[NDArray[Any], Grid, int]:
    """Read a file that `load` refuses for its values alone."""
    file = absolute(path)
    reader = find_reader(str(image_kind(file)))
    array, grid = reader.read(file, ReadOptions(spatial_dims=spatial_dims, channels=channels, stored=True))
    return array, grid, sum(int((~np.isfinite(slab)).sum()) for slab in _slabs(array))


def _facts(
    path: StrPath, file: str, array: NDArray[Any], grid: Grid, *, nonfinite: int = 0, label: bool = False
) -> FileFacts:
    kind = str(image_kind(path))
    has_geometry = FORMATS[kind].kind != "image" and not (
        len(grid.shape) == 2 and np.array_equal(grid.affine, np.eye(4))
    )
    header = nifti_header(path)
    low, high, parts = _statistics(array, sampled=not label)
    digest, slices = _digests(array, grid if has_geometry and len(grid.shape) == 3 else None)
    modality, patient = _dicom_facts(path) if kind == "dicom" and not label else ("", "")
    return FileFacts(
        file=file,
        format=kind,
        shape=grid.shape,
        channels=len(array),
        spacing=tuple(round(step, 6) for step in grid.spacing) if has_geometry else (),
        orientation=grid.orientation if has_geometry else "",
        dtype=header.dtype if header else str(array.dtype),
        minimum=low,
        percentiles=parts,
        maximum=high,
        nonfinite=nonfinite,
        labels=count_values(array) if label else {},
        digest=digest,
        slices=() if label else slices,
        grid=grid,
        header=header,
        modality=modality,
        patient=patient,
    )


def _statistics(array: NDArray[Any], *, sampled: bool) -> tuple[float, float, tuple[float, ...]]:
    """Return lowest and highest finite value, and percentiles of a sample."""
    lows, highs = [], []
    for slab in _slabs(array):
        values = slab[np.isfinite(slab)] if slab.dtype.kind == "f" and not np.isfinite(slab.sum()) else slab
        if values.size:
            lows.append(float(values.min()))
            highs.append(float(values.max()))
    if not lows:
        return 0.0, 0.0, ()
    if not sampled:
        return min(lows), max(highs), ()
    step = max(1, round((array.size / _SAMPLES) ** (1 / (array.ndim - 1))))
    sample = np.asarray(array[(slice(None), *(slice(None, None, step),) * (array.ndim - 1))], dtype=np.float64)
    sample = sample[np.isfinite(sample)]
    parts = tuple(float(value) for value in np.percentile(sample, PERCENTILES)) if sample.size else ()
    return min(lows), max(highs), parts


def _digests(array: NDArray[Any], grid: Grid | None) -> tuple[str, tuple[bytes | None, ...]]:
    """Return a hash of all values, and one of each axial slice; both after turning a volume to RAS."""
    views = list(array)
    if grid is not None:
        turn = io_orientation(grid.affine)
        views = [apply_orientation(channel, turn) for channel in array]
    whole = hashlib.blake2b(repr((len(views), *views[0].shape)).encode(), digest_size=16)
    slices: list[bytes | None] = []
    for number in range(views[0].shape[-1]):
        # Adding 0 makes -0 and 0 one value; as float32 an image is the same in whatever type it is stored.
        stack = np.stack([view[..., number] for view in views])
        plane = np.ascontiguousarray(stack, dtype="<f4") + np.float32(0)
        content = hashlib.blake2b(plane.data, digest_size=16).digest()
        whole.update(content)
        slices.append(content if plane.max() > plane.min() else None)
    return whole.hexdigest(), tuple(slices) if grid is not None else ()


def _dicom_facts(path: StrPath) -> tuple[str, str]:
    """Return the modality and a keyed hash of the patient's number."""
    from medseg.io.dicom import open_series

    series = open_series(path)
    header = next(series.headers())
    number = str(header.get("PatientID") or "").strip()
    return series.modality, hashlib.blake2b(number.encode(), key=_KEY).hexdigest() if number else ""


def _slabs(array: NDArray[Any], *, like: NDArray[Any] | None = None) -> Iterator[NDArray[Any]]:
    """Cut along the last axis into views of a few million values; `like` sets the cuts."""
    size = (array if like is None else like).size
    parts = max(1, min(array.shape[-1], -(-size // _SLAB_VALUES)))
    yield from np.array_split(array, parts, axis=-1)
