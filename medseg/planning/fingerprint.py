"""Compute the fingerprint of a data set from its training cases.

One image and its label are in memory at a time. Validation cases are counted but never opened: a plan that used them
would leak validation data.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import SimpleITK as sitk
from nibabel.orientations import io_orientation
from PIL import Image

from medseg.errors import CaseError, GeometryError, RequestError
from medseg.io import find_dataset, grid_difference, read_grid
from medseg.io.datasets import DATASET_FILE, read_json
from medseg.io.dicom.detect import split_series
from medseg.io.names import absolute, case_kind
from medseg.io.survey import open_image, open_label
from medseg.planning.case_stats import CaseStats, Fingerprint, Intensity
from medseg.planning.labels import names_of_labels

if TYPE_CHECKING:
    from medseg.io.names import StrPath
    from medseg.io.survey import FileFacts, Opened

    Array = np.ndarray[Any, np.dtype[Any]]

__all__ = ["dataset_key", "take_fingerprint"]

Report: TypeAlias = Callable[[float, int, str], None]

# Foreground voxels sampled from one case, and from all cases: enough for percentiles, little memory.
_PER_CASE = 10_000
_IN_ALL = 4_000_000
# A label whose bounding box has more voxels is subsampled before its components are counted.
_COMPONENTS_LIMIT = 1 << 25
_SLAB = 1 << 22
_MAX_FAULTS = 3
# Pixel sizes of microscopes in micrometers; other values are mostly the default 72 dpi of screens.
_MICRONS = (0.05, 20.0)


def take_fingerprint(
    path: StrPath, *, spatial_dims: int | None = None, known: Fingerprint | None = None, report: Report | None = None
) -> Fingerprint:
    """Return the fingerprint of a data set's training cases.

    Args:
        path: Data set, as in `medseg.components.find_dataset`.
        spatial_dims: Required number of spatial dimensions, 2 or 3; that of the images by default.
        known: Earlier fingerprint, which is returned if the files have not changed.
        report: Called with the number of cases read, the number of all cases, and a note.

    Raises:
        RequestError: Cases unfit for training; the message names the first of them and their faults.
    """
    cases = find_dataset(path, "train")
    validation = find_dataset(path, "val")
    listing = _listing(path)
    key = dataset_key(cases, listing)
    if known is not None and known.key == key and known.validation_cases == len(validation):
        return known
    names = names_of_labels(listing)
    drawn: list[Array] = []
    facts: list[CaseStats] = []
    faults: list[str] = []
    for number, case in enumerate(cases):
        if report is not None:
            report(number, len(cases), case["name"])
        try:
            one, values = _case(case, spatial_dims, seed=number, draw=min(_PER_CASE, _IN_ALL // len(cases)))
            facts.append(one)
            drawn.append(values)
        except CaseError as error:
            faults.append(str(error))
    if report is not None:
        report(len(cases), len(cases), "read")
    _refuse(faults, len(cases))
    _refuse_mixed(facts)
    root = absolute(path)
    found = Fingerprint(
        dataset=root.name if root.is_dir() else root.parent.name,
        key=key,
        validation_cases=len(validation),
        label_names=names,
        channel_names=_channel_names(listing),
        cases=tuple(facts),
        intensities=(),
    )
    return Fingerprint(**{**vars(found), "intensities": _intensities(drawn, found.channels)})


def dataset_key(cases: list[dict[str, Any]], listing: dict[str, Any]) -> str:
    """Return a hash of the files' names, sizes and modification times, and of labels and channels in `dataset.json`."""
    digest = hashlib.sha256(repr([listing.get(part) for part in ("labels", "modality", "channel_names")]).encode())
    for case in cases:
        for part in ("image", "label"):
            digest.update(repr((case["name"], part, _state(case[part]))).encode())
    return digest.hexdigest()


def _state(path: str) -> list[tuple[str, int, int]]:
    """Return name, size and modification time of a file, or of each file of a DICOM folder."""
    source, _ = split_series(path)
    files = sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def _listing(path: StrPath) -> dict[str, Any]:
    given = absolute(path)
    file = given if given.is_file() else given / DATASET_FILE
    return read_json(file) if file.is_file() else {}


def _channel_names(listing: dict[str, Any]) -> tuple[str, ...]:
    names = listing.get("channel_names") or listing.get("modality") or {}
    return tuple(map(str, names.values())) if isinstance(names, dict) else (str(names),)


def _case(case: dict[str, Any], spatial_dims: int | None, *, seed: int, draw: int) -> tuple[CaseStats, Array]:
    """Return the statistics of a case, and intensities sampled from its foreground, `(C, n)` float32."""
    dims = _axes(case["image"], spatial_dims)
    image = open_image(case["image"], case["name"], spatial_dims=dims)
    label = open_label(
        case["label"], case["name"], spatial_dims=dims, like=case["image"], options=case.get("label_options")
    )
    difference = grid_difference(image.facts.grid, label.facts.grid)
    if difference:
        raise GeometryError(f"Geometry mismatch between {case['image']} and {case['label']}: {difference}.")
    if image.facts.nonfinite:
        raise CaseError(f"{case['image']} contains {image.facts.nonfinite:,} non-finite values (NaN or Inf).")
    return _facts(case, image, label), _draw(image.array, label.array, draw, np.random.default_rng(seed))


def _axes(path: str, wanted: int | None) -> int | None:
    """Return the number of spatial dimensions to read a file with; refuse a `--dims` that does not match it."""
    is_image = case_kind(path) == "image"
    if wanted == 3 and is_image:
        raise CaseError(f"{path} is a 2D image, which does not match --dims 3. Omit --dims.")
    if wanted == 2 and not is_image:
        try:
            read_grid(path, spatial_dims=2)
        except CaseError as error:
            raise CaseError(
                f"{error} medseg does not train 2D models on slices of volumes: omit --dims for a 3D model, or store "
                "the slices as 2D images."
            ) from error
    return wanted


def _facts(case: dict[str, Any], image: Opened, label: Opened) -> CaseStats:
    facts = image.facts
    axes = _file_axes(facts)
    values = label.facts.labels
    foreground = [value for value in values if value > 0]
    objects, single, sizes = _components(label.array)
    return CaseStats(
        name=case["name"],
        shape=tuple(facts.shape[axis] for axis in axes),
        spacing=tuple(facts.spacing[axis] for axis in axes) if facts.spacing else (),
        orientation=facts.orientation,
        dtype=facts.dtype,
        channels=facts.channels,
        color=bool((image.array != image.array[:1]).any()) if facts.channels > 1 else False,
        low=facts.minimum,
        high=facts.maximum,
        percentiles=facts.percentiles,
        modality=facts.modality,
        microns=_microns(case["image"]),
        values=dict(values),
        distinct=len(foreground),
        contiguous=foreground == list(range(1, len(foreground) + 1)),
        objects=objects,
        single=single,
        object_sizes=sizes,
    )


def _file_axes(facts: FileFacts) -> list[int]:
    """Return the file's axis for each axis of the model, which are R, A, S for a volume."""
    if len(facts.shape) < 3 or not facts.has_geometry:
        return list(range(len(facts.shape)))
    nearest = [int(axis) for axis in io_orientation(facts.grid.affine)[:, 0]]
    return [nearest.index(axis) for axis in range(3)]


def _microns(path: str) -> float:
    """Return the pixel size of a 2D image in micrometers; 0 where it is unknown or not that of a microscope."""
    if case_kind(path) != "image":
        return 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # already given when the pixels were read
            with Image.open(path) as image:
                dots = float(image.info.get("dpi", (0.0,))[0])
    except (OSError, ValueError, TypeError, ZeroDivisionError, Image.DecompressionBombError):
        return 0.0
    microns = 25_400 / dots if dots > 0 else 0.0
    return round(microns, 4) if _MICRONS[0] <= microns <= _MICRONS[1] else 0.0


def _components(label: Array) -> tuple[int, int, tuple[float, ...]]:
    """Return the number of connected components of equal label, of values with a single one, and their sizes."""
    foreground = label > 0
    if not foreground.any():
        return 0, 0, ()
    axes = range(label.ndim)
    lines = [np.asarray(foreground.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    box = tuple(_extent(line) for line in lines)
    part = label[box]
    step = 1
    while part.size / step**label.ndim > _COMPONENTS_LIMIT:
        step += 1
    part = np.ascontiguousarray(part[(slice(None, None, step),) * label.ndim])
    components = sitk.GetArrayFromImage(sitk.ScalarConnectedComponent(sitk.GetImageFromArray(part.astype(np.int32))))
    counts = np.bincount(components.ravel())
    values = np.zeros(len(counts), np.int64)
    values[components.ravel()] = part.ravel()
    inside = (counts > 0) & (values > 0)
    _, per_value = np.unique(values[inside], return_counts=True)
    sizes = np.percentile(counts[inside] * step**label.ndim, (10, 50, 90))
    return int(inside.sum()), int((per_value == 1).sum()), tuple(float(size) for size in sizes)


def _extent(line: Array) -> slice:
    places = np.flatnonzero(line)
    return slice(int(places[0]), int(places[-1]) + 1)


def _draw(image: Array, label: Array, count: int, rng: np.random.Generator) -> Array:
    """Sample `count` foreground voxels, or all if there are fewer, slab by slab; return `(C, n)` float32."""
    total = int(sum(int((part > 0).sum()) for part, _ in _slabs(label, image)))
    ranks = np.sort(rng.choice(total, min(count, total), replace=False)) if total else np.empty(0, np.int64)
    found: list[Array] = []
    passed = 0
    for part, values in _slabs(label, image):
        inside = part > 0
        here = int(inside.sum())
        mine = ranks[(ranks >= passed) & (ranks < passed + here)] - passed
        if mine.size:
            found.append(values[:, inside][:, mine].astype(np.float32))
        passed += here
    return np.concatenate(found, axis=1) if found else np.empty((len(image), 0), np.float32)


def _slabs(label: Array, image: Array) -> Iterator[tuple[Array, Array]]:
    parts = max(1, min(label.shape[-1], -(-label.size // _SLAB)))
    yield from zip(np.array_split(label, parts, axis=-1), np.array_split(image, parts, axis=-1), strict=True)


def _intensities(drawn: list[Array], channels: int) -> tuple[Intensity, ...]:
    """Return the foreground intensities of each channel; a grayscale image among color ones counts for each."""
    result = []
    for channel in range(channels):
        values = np.concatenate([case[min(channel, len(case) - 1)] for case in drawn]).astype(np.float64)
        if not values.size:
            raise RequestError("All training labels are empty (background only): there is nothing to learn.")
        low, median, high = np.percentile(values, (0.5, 50, 99.5))
        mean, std, low, median, high = (round(float(n), 6) for n in (values.mean(), values.std(), low, median, high))
        result.append(Intensity(mean, std, low, median, high, values.size))
    return tuple(result)


def _refuse(faults: list[str], count: int) -> None:
    if faults:
        more = f" And {len(faults) - _MAX_FAULTS} more." if len(faults) > _MAX_FAULTS else ""
        raise RequestError(
            f"{len(faults)} of {count} training cases are unfit for training: {' '.join(faults[:_MAX_FAULTS])}{more} "
            "`medseg doctor` lists all of them."
        )


def _refuse_mixed(cases: list[CaseStats]) -> None:
    for case in cases:
        if len(case.shape) != len(cases[0].shape):
            raise RequestError(
                f"Mixed dimensions: {cases[0].name} is {len(cases[0].shape)}D and {case.name} is {len(case.shape)}D. "
                "Split the data set: a model segments either 2D images or volumes."
            )
        if case.channels != cases[0].channels and (
            len(case.shape) == 3 or {case.channels, cases[0].channels} != {1, 3}
        ):
            raise RequestError(
                f"Mixed channels: {cases[0].name} has {cases[0].channels} and {case.name} has {case.channels}. All "
                "cases of a data set need the same channels."
            )
