"""Overlays of a mask on its image, as PNG files for visual inspection.

A volume is shown as three orthogonal slices in radiological convention: the patient's right is on the left of the axial
and coronal slices, and anterior is on the left of the sagittal slice. Letters on each slice (R, L, A, P, S, I) mark the
directions. A 2D image is shown as stored.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from PIL import Image

from medseg.errors import CaseError, GeometryError, OutputError, RequestError
from medseg.files import replacing
from medseg.io.dicom.detect import is_dicom, split_series
from medseg.io.dicom.headers import read_headers
from medseg.io.dicom.sources import file_source
from medseg.io.geometry import Grid, grid_difference
from medseg.io.readers import load
from medseg.reporting.drawing import Panel, compose, legend_entries, volume_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["draw_image", "draw_volume", "write_overlay"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")


def write_overlay(
    image_path: str | Path,
    mask_path: str | Path,
    out_png: str | Path,
    *,
    truth_path: str | Path | None = None,
    labels: Mapping[int, str] | None = None,
    window: tuple[float, float] | None = None,
) -> Path:
    """Draw a mask over its image and write a PNG file.

    The overlay shows the image's file name, but neither its folder nor anything from its header.

    Args:
        image_path: Volume in any format of `medseg.io.load`, such as a DICOM folder, archive or `folder::series`, or a
            2D image. Of several channels the first is shown.
        mask_path: Mask in the image's geometry, with integers from 0; also a DICOM SEG, or the RT-STRUCT of a DICOM
            image. In a 2D mask with only 0 and 255, 255 means 1.
        out_png: Output file with the suffix `.png`; missing folders are created.
        truth_path: Reference mask in the image's geometry, drawn as a dashed contour.
        labels: Names of the labels by value. Without names the values are shown, or the number of objects if there are
            many values.
        window: Intensities shown as black and white, in HU for CT; the 0.5th and 99.5th percentile by default.

    Returns:
        The path of the PNG file.

    Raises:
        CaseError: A file that is unreadable or has invalid content.
        GeometryError: Different geometries of image and mask.
        RequestError: An empty window.
        OutputError: An output file that is not writable, not a PNG, or one of the inputs.
    """
    image_path, mask_path, target = Path(image_path), Path(mask_path), Path(out_png)
    truth_path = Path(truth_path) if truth_path else None
    _check_target(target, [image_path, mask_path, truth_path])
    if image_path.suffix.lower() in IMAGE_SUFFIXES and not image_path.is_dir():
        image = _read_flat_image(image_path)
        truth = _read_flat_mask(truth_path) if truth_path else None
        mask = _read_flat_mask(mask_path)
        drawing = draw_image(image, mask, title=image_path.name, truth=truth, labels=labels, window=window)
    else:
        drawing = _draw_loaded(image_path, mask_path, truth_path, labels=labels, window=window)
    with replacing(target) as temporary:
        drawing.save(temporary, format="PNG")
    return target


def draw_volume(
    image: NDArray[Any],
    mask: NDArray[Any],
    affine: NDArray[Any],
    *,
    title: str,
    truth: NDArray[Any] | None = None,
    labels: Mapping[int, str] | None = None,
    window: tuple[float, float] | None = None,
) -> Image.Image:
    """Draw the three orthogonal slices of a volume that show most of the labels.

    The score of a slice is the sum of the labels' areas, each relative to the label's largest area along that axis, so
    that a large organ does not outweigh a small lesion.

    Args:
        image: Intensities of shape (X, Y, Z).
        mask: Labels of shape (X, Y, Z), integers from 0 to 65535.
        affine: Affine of shape (4, 4), from voxel indices to RAS coordinates in mm.
        title: Text above the slices.
        truth: Reference labels of shape (X, Y, Z).
        labels: Names of the labels by value, as for `write_overlay`.
        window: Intensities shown as black and white, as for `write_overlay`.

    Raises:
        CaseError: A mask with values other than these integers.
        GeometryError: Different shapes, or a singular affine.
        RequestError: An empty window.
    """
    marks = _checked_labels(title, image.shape, mask, truth)
    low, high = _window(image, window)
    orientation, zooms = _canonical(affine, title)
    image, *marks = (apply_orientation(array, orientation) for array in (image, *marks))
    where = _best_slices(next((mark for mark in marks if mark.any()), marks[0]))
    panels = []
    for plane in _planes(image.shape):
        count = image.shape[plane.through]
        index = where[plane.through]
        gray = _to_gray(plane.cut(image, index), low, high)
        size = (float(zooms[plane.row]), float(zooms[plane.column]))
        caption = f"{plane.name}  {index + 1} / {count}"
        panels.append(Panel(gray, [plane.cut(mark, index) for mark in marks], size, plane.letters, caption))
    voxel = float(np.prod(zooms))
    legend = legend_entries([_tally(mark) for mark in marks], labels, lambda count: volume_text(count * voxel))
    return compose(title, panels, legend, RADIOLOGICAL)


def draw_image(
    image: NDArray[Any],
    mask: NDArray[Any],
    *,
    title: str,
    truth: NDArray[Any] | None = None,
    labels: Mapping[int, str] | None = None,
    window: tuple[float, float] | None = None,
) -> Image.Image:
    """Draw a 2D image with its mask.

    Args:
        image: Intensities of shape (H, W), or uint8 colors of shape (H, W, 3), which are shown without a window.
        mask: Labels of shape (H, W), integers from 0 to 65535.
        title: Text above the image.
        truth: Reference labels of shape (H, W).
        labels: Names of the labels by value, as for `write_overlay`.
        window: Intensities shown as black and white, as for `write_overlay`.

    Raises:
        CaseError: A mask with values other than these integers.
        GeometryError: Different shapes.
        RequestError: An empty window.
    """
    marks = _checked_labels(title, image.shape[:2], mask, truth)
    low, high = _window(image, window)
    shown = image if image.ndim == 3 else _to_gray(image, low, high)
    panel = Panel(shown, marks, None, "", f"{image.shape[1]} x {image.shape[0]} pixels")
    legend = legend_entries([_tally(mark) for mark in marks], labels, lambda count: f"{count:,} px")
    return compose(title, [panel], legend, "")


# --- slices -----------------------------------------------------------------------------------------------------

MOST_LABELS = 255  # more labels are objects, and slices are chosen by the foreground as a whole
RADIOLOGICAL = "Radiological view: the patient's right is on the left of axial and coronal slices."


@dataclass(frozen=True)
class _Plane:
    """A slice direction of an RAS array, with the orientation letters at left, right, top and bottom."""

    name: str
    column: int
    row: int
    through: int
    letters: str

    def cut(self, volume: NDArray[Any], index: int) -> NDArray[Any]:
        """Return a slice as rows and columns of pixels; both axes are reversed against RAS."""
        plane = np.moveaxis(volume, self.through, 0)[index]
        return np.asarray(plane.T[::-1, ::-1])


PLANES = (
    _Plane("axial", 0, 1, 2, "RLAP"),
    _Plane("coronal", 0, 2, 1, "RLSI"),
    _Plane("sagittal", 1, 2, 0, "APSI"),
)


def _planes(shape: Sequence[int]) -> list[_Plane]:
    """Return the slice directions to draw; only one for a volume of a single slice."""
    return [plane for plane in PLANES if min(shape[plane.row], shape[plane.column]) > 1] or [PLANES[0]]


def _canonical(affine: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return the nibabel orientation that brings the axes closest to RAS, and the voxel sizes in mm in that order."""
    zooms = np.sqrt((np.asarray(affine, dtype=float)[:3, :3] ** 2).sum(axis=0))
    orientation = io_orientation(affine) if np.isfinite(affine).all() and zooms.all() else np.full((3, 2), np.nan)
    if np.isnan(orientation).any():
        raise GeometryError(
            f"{name}: its affine is singular: {np.asarray(affine).tolist()}. Expected an invertible matrix; repair the "
            "header."
        )
    ordered = np.empty(3)
    ordered[orientation[:, 0].astype(int)] = zooms
    return orientation, ordered


def _tally(mark: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Count the voxels of each label value, slice by slice, because `bincount` converts its input to int64."""
    total = np.zeros(int(mark.max(initial=0)) + 1, dtype=np.int64)
    for part in mark:
        total += np.bincount(part.ravel(), minlength=len(total))
    return total


def _areas(mark: NDArray[np.uint16]) -> list[NDArray[np.int64]]:
    """Return for each axis an array (slices, labels) with the number of voxels of each label in each slice."""
    count = int(mark.max(initial=0)) + 1
    areas = [np.zeros((n, count), dtype=np.int64) for n in mark.shape]
    for k in range(mark.shape[2]):
        plane = mark[:, :, k]
        for axis in (0, 1):
            starts = np.expand_dims(np.arange(plane.shape[axis]) * count, 1 - axis)
            tally = np.bincount((plane + starts).ravel(), minlength=areas[axis].size).reshape(-1, count)
            areas[axis] += tally
        areas[2][k] = tally.sum(axis=0)
    return areas


def _best_slices(mark: NDArray[np.uint16]) -> list[int]:
    """Return for each axis the slice with the highest score, the middle one of equal scores."""
    best = []
    for area in _areas(mark if mark.max(initial=0) <= MOST_LABELS else (mark > 0).astype(np.uint16)):
        foreground = area[:, 1:]
        score = (foreground / np.maximum(foreground.max(axis=0, initial=0), 1)).sum(axis=1)
        equals = np.flatnonzero(score >= score.max() - 1e-9)
        best.append(int(equals[len(equals) // 2]))
    return best


def _window(image: NDArray[Any], window: tuple[float, float] | None) -> tuple[float, float]:
    """Return the intensities shown as black and white."""
    if window is not None:
        if not window[0] < window[1]:
            raise RequestError(f"Empty window={window}. Expected the lowest intensity, then a higher one.")
        return window
    step = max(1, round((image.size / 1e6) ** (1 / image.ndim)))
    sample = np.asarray(image[(slice(None, None, step),) * image.ndim], dtype=np.float64)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(sample, (0.5, 99.5))
    return float(low), float(high)


def _to_gray(plane: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Map intensities from low to high to 0..255; non-finite values become black."""
    values = np.where(np.isfinite(plane), plane, low).astype(np.float64)
    return np.rint(255 * np.clip((values - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)


# --- files ------------------------------------------------------------------------------------------------------


def _draw_loaded(
    image_path: Path,
    mask_path: Path,
    truth_path: Path | None,
    *,
    labels: Mapping[int, str] | None,
    window: tuple[float, float] | None,
) -> Image.Image:
    """Draw a file that `medseg.io.load` reads: a volume, or a 2D DICOM image without geometry."""
    image, grid = _read_image(image_path)
    mask = _read_mask(mask_path, image_path, grid, labels)
    truth = _read_mask(truth_path, image_path, grid, labels) if truth_path else None
    source, series = split_series(image_path)
    title = f"{source.name} {series}".strip()
    if len(grid.shape) == 2 and np.array_equal(grid.affine, np.eye(4)):
        flat = image[0].T if len(image) != 3 else image.T.astype(np.uint8)
        return draw_image(
            flat, mask.T, title=title, truth=None if truth is None else truth.T, labels=labels, window=window
        )
    shape = (*grid.shape, 1)[:3]
    truth = None if truth is None else truth.reshape(shape)
    return draw_volume(
        image[0].reshape(shape),
        mask.reshape(shape),
        grid.affine,
        title=title,
        truth=truth,
        labels=labels,
        window=window,
    )


def _read_image(path: Path) -> tuple[NDArray[Any], Grid]:
    """Read an image, the first volume of a series, as an array (C, *spatial) with its grid."""
    _refuse_missing(path)
    try:
        loaded = load(path, index=0, dtype="stored")
    except CaseError as error:
        try:
            loaded = load(path, channels=3, dtype="stored")  # color slices
        except CaseError:
            raise error from None
    return np.asarray(loaded), Grid(loaded.shape[1:], loaded.affine.numpy())


def _read_mask(path: Path, image_path: Path, image: Grid, labels: Mapping[int, str] | None) -> NDArray[Any]:
    """Read a mask as an array (*spatial), after a check that its geometry is the image's."""
    _refuse_missing(path)
    if is_dicom(path):
        array, grid = _read_object(path, image_path, image, labels)
    else:
        loaded = load(path, label=True)
        array, grid = np.asarray(loaded)[0], Grid(loaded.shape[1:], loaded.affine.numpy())
    if (*grid.shape, 1) == image.shape:  # a single slice stored in 2D
        array, grid = array[..., None], Grid(image.shape, grid.affine)
    difference = grid_difference(grid, image)
    if difference:
        raise GeometryError(
            f"Geometry mismatch between {path.name} and {image_path.name}: {difference}. Resample the mask to the "
            "image."
        )
    return array


def _read_object(
    path: Path, image_path: Path, image: Grid, labels: Mapping[int, str] | None
) -> tuple[NDArray[np.int32], Grid]:
    """Read a DICOM SEG or RT-STRUCT, with segments matched by name or, if the names differ, by number."""
    from medseg.io.dicom.rtstruct import read_rtstruct
    from medseg.io.dicom.seg import read_seg

    kind = read_headers([file_source(path)])[0].other
    drawn = image_path if split_series(image_path)[1] or image_path.is_dir() or is_dicom(image_path) else None
    if "Structure Set" in kind and drawn is None:
        raise GeometryError(
            f"{path.name} is {kind}, whose contours refer to DICOM slices: the image must be its DICOM series."
        )
    names = {name: value for value, name in (labels or {}).items()}
    for keys in (names, None) if names else (None,):
        try:
            if "Structure Set" in kind:
                return read_rtstruct(path, like=str(drawn), labels=keys, on_overlap="later")
            return read_seg(path, like=image if drawn is None else drawn, labels=keys, on_overlap="later")
        except GeometryError:
            raise
        except CaseError:
            if keys is None:
                raise
    raise CaseError(f"{path.name} cannot be read as a DICOM SEG or RT-STRUCT.")


def _refuse_missing(path: Path) -> None:
    if not split_series(path)[0].exists():
        raise _unreadable(path, FileNotFoundError(), "an image and its mask")


def _decode(path: Path, expected: str) -> Image.Image:
    """Return a decoded 2D image, with its file closed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata and size, which do not matter here
            with Image.open(path) as file:
                return file.copy()
    except Exception as error:  # decoders raise many types on damaged files
        raise _unreadable(path, error, expected) from error


def _read_flat_image(path: Path) -> NDArray[Any]:
    """Read a 2D image as intensities (H, W) or colors (H, W, 3)."""
    image = _decode(path, "an image that Pillow reads")
    as_stored = image.mode in ("1", "L", "I", "F", "RGB") or image.mode.startswith("I;16")
    return np.asarray(image if as_stored else image.convert("RGB"))


def _read_flat_mask(path: Path) -> NDArray[Any]:
    """Read a 2D mask; gray values stored as RGB are accepted, and 0 and 255 become 0 and 1."""
    mark = np.asarray(_decode(path, "a mask that Pillow reads"))
    if mark.ndim == 3:
        if (mark[..., :3] != mark[..., :1]).any():
            raise CaseError(
                f"{path.name} is a color image; expected a mask with one label per pixel. Save it as grayscale."
            )
        mark = mark[..., 0]
    white = mark == 255
    return white if white.any() and not ((mark > 0) & ~white).any() else mark


def _checked_labels(
    name: str, shape: Sequence[int], mask: NDArray[Any], truth: NDArray[Any] | None
) -> list[NDArray[np.uint16]]:
    """Return mask and, if given, reference as uint16, after a check of their shapes and values."""
    marks = []
    for what, mark in (("mask", mask), ("reference", truth)):
        if mark is None:
            continue
        if mark.shape != tuple(shape):
            raise GeometryError(
                f"Shape mismatch in {name}: the {what} has shape {mark.shape}, and the image {tuple(shape)}. Pass the "
                "mask of this image."
            )
        with np.errstate(invalid="ignore"):
            whole = mark.astype(np.uint16)
        if not np.array_equal(whole, mark):
            raise CaseError(
                f"Invalid labels in {name}: the {what} has values from {mark.min()} to {mark.max()}. Expected integers "
                "from 0 to 65535; pass a label map, not probabilities."
            )
        marks.append(whole)
    return marks


def _unreadable(path: Path, error: BaseException, expected: str) -> CaseError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
    return CaseError(f"{path.name} cannot be read ({reason}); expected {expected}. Check the name and the file.")


def _check_target(target: Path, inputs: Iterable[Path | None]) -> None:
    """Refuse an output file that is not a PNG, or is one of the inputs."""
    if target.suffix.lower() != ".png":
        raise OutputError(f"Overlays are written as PNG: {target.name} does not end in .png. Change the suffix.")
    for path in inputs:
        if path is not None and path.resolve() == target.resolve():
            raise OutputError(f"{target.name} is also an input and would be overwritten. Choose another name.")
