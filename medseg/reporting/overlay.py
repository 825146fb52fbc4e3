"""Pictures of a mask on its image, for people to look at: PNG files from numpy and Pillow alone.

A volume is shown as three orthogonal slices in radiological convention: the viewer stands at the patient's feet or in
front of the patient, so the patient's right is on the left of the axial and coronal slices; in the sagittal slice
anterior is on the left. Letters on each slice say so (R, L, A, P, S, I). A picture is shown as it lies in its file.
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

__all__ = ["draw_picture", "draw_volume", "write_overlay"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")


def write_overlay(
    image_path: str | Path,
    mask_path: str | Path,
    out_png: str | Path,
    *,
    truth_path: str | Path | None = None,
    labels: Mapping[int, str] | None = None,
    window: tuple[float, float] | None = None,
) -> Path:
    """Draw a mask over its image and write a PNG.

    Only the image's file name appears on the picture, no folder and nothing from its header.

    Args:
        image_path: a volume that `medseg.io.load` reads, also a DICOM folder, archive or `folder::series` (the first
            channel of several is shown), or a picture.
        mask_path: labels on the same grid, whole numbers from 0; or DICOM SEG, or an RT-STRUCT of a DICOM image. In a
            picture 0 and 255 alone mean 0 and 1.
        out_png: where to write, ending in `.png`; missing folders are made.
        truth_path: reference labels on the same grid, drawn as a thin dashed line.
        labels: names by value. Without them values are shown, or, if there are many, a count of objects.
        window: lowest and highest intensity to tell apart (HU for CT); by default the 0.5th and 99.5th percentile.

    Returns:
        The path of the PNG.

    Raises:
        CaseError: a file cannot be read or is not what it should be; GeometryError: the grids differ.
        RequestError: the window is empty.
        OutputError: the PNG cannot be written, or would replace one of the inputs.
    """
    image_path, mask_path, target = Path(image_path), Path(mask_path), Path(out_png)
    truth_path = Path(truth_path) if truth_path else None
    _check_target(target, [image_path, mask_path, truth_path])
    if image_path.suffix.lower() in PICTURE_SUFFIXES and not image_path.is_dir():
        picture = _read_picture(image_path)
        truth = _read_picture_mask(truth_path) if truth_path else None
        mask = _read_picture_mask(mask_path)
        drawing = draw_picture(picture, mask, title=image_path.name, truth=truth, labels=labels, window=window)
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
    """Draw three orthogonal slices of a volume, each where it shows most of the labels.

    A slice's score is the sum over the labels of their area in it, each relative to the label's largest area along
    that axis; so a small lesion is not outvoted by a large organ.

    Args:
        image: `(X, Y, Z)` intensities.
        mask: `(X, Y, Z)` labels, whole numbers from 0 to 65535.
        affine: `(4, 4)`, voxel index to world millimeters (RAS).
        title: text above the slices.
        truth: reference labels, `(X, Y, Z)`.
        labels: as for `write_overlay`.
        window: as for `write_overlay`.

    Raises:
        CaseError: the mask is not of whole numbers; GeometryError: shapes differ or the affine is singular.
        RequestError: the window is empty.
    """
    marks = _checked_labels(title, image.shape, mask, truth)
    low, high = _window(image, window)
    turn, zooms = _canonical(affine, title)
    image, *marks = (apply_orientation(array, turn) for array in (image, *marks))
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


def draw_picture(
    picture: NDArray[Any],
    mask: NDArray[Any],
    *,
    title: str,
    truth: NDArray[Any] | None = None,
    labels: Mapping[int, str] | None = None,
    window: tuple[float, float] | None = None,
) -> Image.Image:
    """Draw a picture with its mask.

    Args:
        picture: `(H, W)` intensities, or `(H, W, 3)` uint8 colors (shown as they are, without a window).
        mask: `(H, W)` labels, whole numbers from 0 to 65535.
        title: text above the picture.
        truth: reference labels, `(H, W)`.
        labels: as for `write_overlay`.
        window: as for `write_overlay`.

    Raises:
        CaseError: the mask is not of whole numbers; GeometryError: shapes differ.
        RequestError: the window is empty.
    """
    marks = _checked_labels(title, picture.shape[:2], mask, truth)
    low, high = _window(picture, window)
    shown = picture if picture.ndim == 3 else _to_gray(picture, low, high)
    panel = Panel(shown, marks, None, "", f"{picture.shape[1]} x {picture.shape[0]} pixels")
    legend = legend_entries([_tally(mark) for mark in marks], labels, lambda count: f"{count:,} px")
    return compose(title, [panel], legend, "")


# --- slices -----------------------------------------------------------------------------------------------------

MOST_LABELS = 255  # with more, they are objects, and slices are chosen by the foreground alone
RADIOLOGICAL = "Radiological view: the patient's right is on the left of axial and coronal slices."


@dataclass(frozen=True)
class _Plane:
    """One of the slice directions of an RAS array; letters stand at left, right, top, bottom."""

    name: str
    column: int
    row: int
    through: int
    letters: str

    def cut(self, volume: NDArray[Any], index: int) -> NDArray[Any]:
        """The slice as rows and columns of a picture: both axes run against RAS."""
        plane = np.moveaxis(volume, self.through, 0)[index]
        return np.asarray(plane.T[::-1, ::-1])


PLANES = (
    _Plane("axial", 0, 1, 2, "RLAP"),
    _Plane("coronal", 0, 2, 1, "RLSI"),
    _Plane("sagittal", 1, 2, 0, "APSI"),
)


def _planes(shape: Sequence[int]) -> list[_Plane]:
    """The slice directions worth showing: a volume of a single slice has one."""
    return [plane for plane in PLANES if min(shape[plane.row], shape[plane.column]) > 1] or [PLANES[0]]


def _canonical(affine: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The reordering that brings the axes closest to RAS, and the voxel sizes (mm) in that order."""
    zooms = np.sqrt((np.asarray(affine, dtype=float)[:3, :3] ** 2).sum(axis=0))
    turn = io_orientation(affine) if np.isfinite(affine).all() and zooms.all() else np.full((3, 2), np.nan)
    if np.isnan(turn).any():
        raise GeometryError(
            f"{name}: its affine has no three directions {np.asarray(affine).tolist()}; expected an invertible "
            "matrix. Repair the header."
        )
    ordered = np.empty(3)
    ordered[turn[:, 0].astype(int)] = zooms
    return turn, ordered


def _tally(mark: NDArray[np.uint16]) -> NDArray[np.int64]:
    """How often each label value occurs, one row of the first axis at a time, because counting widens its input."""
    total = np.zeros(int(mark.max(initial=0)) + 1, dtype=np.int64)
    for part in mark:
        total += np.bincount(part.ravel(), minlength=len(total))
    return total


def _areas(mark: NDArray[np.uint16]) -> list[NDArray[np.int64]]:
    """For each axis `(slices, labels)`: voxels of each label in each slice, found one axial slice at a time."""
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
    """For each axis the slice that shows most of the labels: the middle one of equals, of all if there is no label."""
    best = []
    for area in _areas(mark if mark.max(initial=0) <= MOST_LABELS else (mark > 0).astype(np.uint16)):
        foreground = area[:, 1:]
        score = (foreground / np.maximum(foreground.max(axis=0, initial=0), 1)).sum(axis=1)
        equals = np.flatnonzero(score >= score.max() - 1e-9)
        best.append(int(equals[len(equals) // 2]))
    return best


def _window(image: NDArray[Any], window: tuple[float, float] | None) -> tuple[float, float]:
    """The intensities to show as black and white."""
    if window is not None:
        if not window[0] < window[1]:
            raise RequestError(f"window={window}; expected a lowest and a higher highest intensity. Swap or widen it.")
        return window
    step = max(1, round((image.size / 1e6) ** (1 / image.ndim)))
    sample = np.asarray(image[(slice(None, None, step),) * image.ndim], dtype=np.float64)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(sample, (0.5, 99.5))
    return float(low), float(high)


def _to_gray(plane: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Map low..high to 0..255; what is not finite becomes black."""
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
    """Draw what `medseg.io.load` reads: a volume, or a DICOM picture without a place in space."""
    image, grid = _read_image(image_path)
    mask = _read_mask(mask_path, image_path, grid, labels)
    truth = _read_mask(truth_path, image_path, grid, labels) if truth_path else None
    source, series = split_series(image_path)
    title = f"{source.name} {series}".strip()
    if len(grid.shape) == 2 and np.array_equal(grid.affine, np.eye(4)):
        picture = image[0].T if len(image) != 3 else image.T.astype(np.uint8)
        return draw_picture(
            picture, mask.T, title=title, truth=None if truth is None else truth.T, labels=labels, window=window
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
    """Channels `(C, *spatial)` of an image, of a series the first volume, and their grid."""
    _refuse_missing(path)
    try:
        loaded = load(path, index=0, dtype="stored")
    except CaseError as error:
        try:
            loaded = load(path, channels=3, dtype="stored")  # slices in color
        except CaseError:
            raise error from None
    return np.asarray(loaded), Grid(loaded.shape[1:], loaded.affine.numpy())


def _read_mask(path: Path, image_path: Path, image: Grid, labels: Mapping[int, str] | None) -> NDArray[Any]:
    """Labels `(*spatial)`, after a check that they lie where the image lies."""
    _refuse_missing(path)
    if is_dicom(path):
        array, grid = _read_object(path, image_path, image, labels)
    else:
        loaded = load(path, label=True)
        array, grid = np.asarray(loaded)[0], Grid(loaded.shape[1:], loaded.affine.numpy())
    if (*grid.shape, 1) == image.shape:  # one slice, kept flat
        array, grid = array[..., None], Grid(image.shape, grid.affine)
    difference = grid_difference(grid, image)
    if difference:
        raise GeometryError(
            f"{path.name} does not lie on {image_path.name}: {difference}. Expected equal grids; resample the mask."
        )
    return array


def _read_object(
    path: Path, image_path: Path, image: Grid, labels: Mapping[int, str] | None
) -> tuple[NDArray[np.int32], Grid]:
    """Labels from a DICOM SEG or RT-STRUCT, by the names of the labels, or where those are others, by number."""
    from medseg.io.dicom.rtstruct import read_rtstruct
    from medseg.io.dicom.seg import read_seg

    kind = read_headers([file_source(path)])[0].other
    drawn = image_path if split_series(image_path)[1] or image_path.is_dir() or is_dicom(image_path) else None
    if "Structure Set" in kind and drawn is None:
        raise GeometryError(f"{path.name} is {kind}, drawn on DICOM slices: expected their series as the image.")
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
    raise CaseError(f"{path.name} cannot be read: expected DICOM SEG or RT-STRUCT.")


def _refuse_missing(path: Path) -> None:
    if not split_series(path)[0].exists():
        raise _unreadable(path, FileNotFoundError(), "an image and its mask")


def _open_picture(path: Path, expected: str) -> Image.Image:
    """A decoded picture, its file closed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata and size, neither of which matters here
            with Image.open(path) as file:
                return file.copy()
    except Exception as error:  # decoders raise many types on damaged files
        raise _unreadable(path, error, expected) from error


def _read_picture(path: Path) -> NDArray[Any]:
    """A picture as `(H, W)` intensities or `(H, W, 3)` colors."""
    picture = _open_picture(path, "a picture that Pillow reads")
    as_stored = picture.mode in ("1", "L", "I", "F", "RGB") or picture.mode.startswith("I;16")
    return np.asarray(picture if as_stored else picture.convert("RGB"))


def _read_picture_mask(path: Path) -> NDArray[Any]:
    """A label picture; gray stored as color is taken, and 0/255 becomes 0/1."""
    mark = np.asarray(_open_picture(path, "a label picture that Pillow reads"))
    if mark.ndim == 3:
        if (mark[..., :3] != mark[..., :1]).any():
            raise CaseError(f"{path.name} is a color picture; expected one label number per pixel. Save it as gray.")
        mark = mark[..., 0]
    white = mark == 255
    return white if white.any() and not ((mark > 0) & ~white).any() else mark


def _checked_labels(
    name: str, shape: Sequence[int], mask: NDArray[Any], truth: NDArray[Any] | None
) -> list[NDArray[np.uint16]]:
    """Mask and, if there is one, truth as uint16, after a check of their shapes and values."""
    marks = []
    for what, mark in (("mask", mask), ("truth", truth)):
        if mark is None:
            continue
        if mark.shape != tuple(shape):
            raise GeometryError(
                f"{name}: the {what} has shape {mark.shape}; expected the image's, {tuple(shape)}. "
                "Give the mask of this image."
            )
        with np.errstate(invalid="ignore"):
            whole = mark.astype(np.uint16)
        if not np.array_equal(whole, mark):
            raise CaseError(
                f"{name}: the {what} holds values from {mark.min()} to {mark.max()} that are no labels; expected whole "
                "numbers from 0 to 65535. Give a label map, not probabilities."
            )
        marks.append(whole)
    return marks


def _unreadable(path: Path, error: BaseException, expected: str) -> CaseError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
    return CaseError(f"{path.name} cannot be read ({reason}); expected {expected}. Check the name and the file.")


def _check_target(target: Path, inputs: Iterable[Path | None]) -> None:
    """Refuse a name that is no PNG, or that is one of the inputs."""
    if target.suffix.lower() != ".png":
        raise OutputError(f"{target.name} does not end in .png; expected a PNG file name. Change the ending.")
    for path in inputs:
        if path is not None and path.resolve() == target.resolve():
            raise OutputError(f"{target.name} is also an input; expected a new file. Choose another name.")
