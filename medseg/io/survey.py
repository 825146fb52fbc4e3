"""Facts about files for data set checks: grid, intensities, label values, and hashes that find duplicates.

One image and one label are in memory at a time, in the smallest type that holds them; statistics are computed slab by
slab. Nothing that identifies a patient leaves this module: a DICOM PatientID is kept as a keyed hash whose key is lost
with the process.
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
    """Facts from a NIfTI header that reading does not need.

    Attributes:
        dtype: Type of the stored values.
        shape: Size of every axis, singleton dimensions included.
        apart: Largest distance in mm between the grid corners of sform and qform, if both are set; 0 if they agree.
        step: Smallest voxel spacing in mm.
        stretch: Relative difference between pixdim and the voxel sizes of the sform, if only the sform is set.
    """

    dtype: str
    shape: tuple[int, ...]
    apart: float
    step: float
    stretch: float


@dataclass(frozen=True)
class FileFacts:
    """Facts about one file.

    Attributes:
        file: File name, relative to the folder examined.
        format: File format, a key of `medseg.io.formats.FORMATS`.
        shape: Number of voxels along each spatial axis.
        channels: Number of channels.
        spacing: Distance between voxel centers in mm.
        orientation: Axis codes such as "LPS"; empty for a 2D image without geometry.
        dtype: Type of the stored values.
        minimum: Minimum intensity or label.
        percentiles: 1st, 50th and 99th percentile of a sample of a million values; empty for a label.
        maximum: Maximum intensity or label.
        nonfinite: Number of non-finite values (NaN or Inf).
        labels: Label value -> number of voxels, ascending; empty for an image.
        digest: Hash of shape and values in RAS orientation; equal for copies, whatever their format and orientation.
        modality: Modality of a DICOM image, such as "CT".
        grid: Voxel grid.
        slices: Hash of each axial slice; None for a constant slice.
        header: Facts from the header of a NIfTI file.
        patient: Keyed hash of the PatientID of a DICOM image.
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
        """Whether the file has a geometry."""
        return bool(self.orientation)

    def slice_position(self, number: int) -> NDArray[np.float64]:
        """Return the position of the first voxel of an axial slice of `slices`, in RAS+ mm."""
        orientation = io_orientation(self.grid.affine)
        affine = self.grid.affine @ inv_ornt_aff(orientation, self.shape)
        position: NDArray[np.float64] = (affine @ [0, 0, number, 1])[:3]
        return position


@dataclass(frozen=True)
class Opened:
    """A file that was read.

    Attributes:
        facts: Facts about the file.
        array: Values, channel first; for a label without a channel axis.
    """

    facts: FileFacts
    array: NDArray[Any]


def open_image(path: StrPath, file: str, *, spatial_dims: int | None = None, channels: int | None = None) -> Opened:
    """Read an image and gather its facts.

    Args:
        path: Image, as for `medseg.io.load`.
        file: Name of the file in the facts.
        spatial_dims: Required number of spatial dimensions, as for `medseg.io.load`.
        channels: Expected number of channels; None accepts any number up to 16.

    Raises:
        CaseError: The image cannot be read. Non-finite values are no reason: they are counted in the facts.
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
    """Read a label and gather its facts; the array is of an integer type and has no channel axis.

    Args:
        path: Label, as for `medseg.io.load_label`.
        file: Name of the file in the facts.
        spatial_dims: Required number of spatial dimensions, as for `medseg.io.load_label`.
        like: Image that the label belongs to.
        options: Options for DICOM SEG and RT-STRUCT, as further arguments of `medseg.io.load_label`.

    Raises:
        CaseError: The label cannot be read, or has values that are not integers.
    """
    loaded = load_label(path, spatial_dims=spatial_dims, like=like, **(options or {}))
    array: NDArray[Any] = loaded.as_tensor().numpy()
    grid = Grid(array.shape[1:], loaded.affine.numpy())
    return Opened(_facts(path, file, array, grid, label=True), array[0])


def nifti_header(path: StrPath) -> Header | None:
    """Return facts from a NIfTI header; None for other formats, or if it cannot be parsed."""
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
    except Exception:  # a damaged header raises many types; reading the file reports the fault
        return None


def count_values(array: NDArray[Any]) -> dict[int, int]:
    """Return the number of occurrences of each integer, ascending."""
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
    """Return the fraction of a label's foreground on voxels with the image's minimum; 0 without foreground.

    Args:
        image: Image `(C, *spatial)`.
        label: Label map `(*spatial)`.
    """
    lowest = image[0].min()
    marked = on_lowest = 0
    for part, values in zip(_slabs(label), _slabs(image[0], like=label), strict=True):
        inside = part > 0
        marked += int(inside.sum())
        on_lowest += int((values[inside] == lowest).sum())
    return on_lowest / marked if marked else 0.0


def foreground_inside(label: NDArray[Any], grid: Grid, image: Grid) -> float:
    """Return the fraction of a label's foreground whose voxel centers are inside the extent of the image.

    Args:
        label: Label map `(x, y, z)` on `grid`.
        grid: Grid of the label.
        image: Grid of the image.
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
    """Read a file that `load` refuses only for its non-finite values."""
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
    """Return the minimum and maximum of the finite values, and percentiles of a sample."""
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
    """Return a hash of all values and one of each axial slice, both after reorienting a volume to RAS."""
    views = list(array)
    if grid is not None:
        orientation = io_orientation(grid.affine)
        views = [apply_orientation(channel, orientation) for channel in array]
    whole = hashlib.blake2b(repr((len(views), *views[0].shape)).encode(), digest_size=16)
    slices: list[bytes | None] = []
    for number in range(views[0].shape[-1]):
        # Adding 0 turns -0 into 0; as float32 an image has the same bytes whatever its stored type.
        stack = np.stack([view[..., number] for view in views])
        plane = np.ascontiguousarray(stack, dtype="<f4") + np.float32(0)
        content = hashlib.blake2b(plane.data, digest_size=16).digest()
        whole.update(content)
        slices.append(content if plane.max() > plane.min() else None)
    return whole.hexdigest(), tuple(slices) if grid is not None else ()


def _dicom_facts(path: StrPath) -> tuple[str, str]:
    """Return the modality and a keyed hash of the PatientID."""
    from medseg.io.dicom import open_series

    series = open_series(path)
    header = next(series.headers())
    number = str(header.get("PatientID") or "").strip()
    return series.modality, hashlib.blake2b(number.encode(), key=_KEY).hexdigest() if number else ""


def _slabs(array: NDArray[Any], *, like: NDArray[Any] | None = None) -> Iterator[NDArray[Any]]:
    """Split along the last axis into views of a few million values, in the same places as `like` if given."""
    size = (array if like is None else like).size
    parts = max(1, min(array.shape[-1], -(-size // _SLAB_VALUES)))
    yield from np.array_split(array, parts, axis=-1)
