"""Open the training cases of a data set, one after the other, and write down what a plan needs to know.

One image and its label are in memory at a time. The cases for validation are counted and never opened: what a plan
knew of them would be a leak.
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

# Values drawn from the foreground of one case, and of all together: enough for percentiles, little to hold.
_PER_CASE = 10_000
_IN_ALL = 4_000_000
# Above this many voxels of its bounding box a label is thinned before its pieces are counted.
_PIECES_LIMIT = 1 << 25
_SLAB = 1 << 22
_MAX_FAULTS = 3
# Microscopes; what lies outside is the 72 dots per inch of a screen.
_MICRONS = (0.05, 20.0)


def take_fingerprint(
    path: StrPath, *, spatial_dims: int | None = None, known: Fingerprint | None = None, report: Report | None = None
) -> Fingerprint:
    """Return the fingerprint of a data set's training cases.

    Args:
        path: data set as `medseg.components.find_dataset` takes it.
        spatial_dims: 2 or 3 to refuse everything else; by default what the images are.
        known: an earlier fingerprint; it is returned if the files are still those.
        report: told about each case that is done.

    Raises:
        RequestError: the data set cannot be trained on; the message names the first cases and what is wrong with them.
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
    """Return a hash of the files' names, sizes and times of change, and of what `dataset.json` says of labels."""
    digest = hashlib.sha256(repr([listing.get(part) for part in ("labels", "modality", "channel_names")]).encode())
    for case in cases:
        for part in ("image", "label"):
            digest.update(repr((case["name"], part, _state(case[part]))).encode())
    return digest.hexdigest()


def _state(path: str) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of a file, or of the files of a DICOM folder."""
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
    """Return the facts of a case, and values drawn from its foreground, `(C, n)` float32."""
    dims = _axes(case["image"], spatial_dims)
    image = open_image(case["image"], case["name"], spatial_dims=dims)
    label = open_label(
        case["label"], case["name"], spatial_dims=dims, like=case["image"], options=case.get("label_options")
    )
    difference = grid_difference(image.facts.grid, label.facts.grid)
    if difference:
        raise GeometryError(f"{case['image']} and {case['label']} do not lie on one grid: {difference}.")
    if image.facts.nonfinite:
        raise CaseError(f"{case['image']} holds {image.facts.nonfinite:,} values that are no numbers.")
    return _facts(case, image, label), _draw(image.array, label.array, draw, np.random.default_rng(seed))


def _axes(path: str, wanted: int | None) -> int | None:
    """Return how many axes to ask for, so that a wrong `--dims` is refused with its reason."""
    picture = case_kind(path) == "image"
    if wanted == 3 and picture:
        raise CaseError(f"{path} is a picture: it cannot be planned with --dims 3. Leave --dims out.")
    if wanted == 2 and not picture:
        try:
            read_grid(path, spatial_dims=2)
        except CaseError as error:
            raise CaseError(
                f"{error} A 2D model of volumes would be trained on slices, which medseg does not do: leave --dims out "
                "for a 3D one, or store the slices as pictures."
            ) from error
    return wanted


def _facts(case: dict[str, Any], image: Opened, label: Opened) -> CaseStats:
    facts = image.facts
    turn = _turn(facts)
    values = label.facts.labels
    marked = [value for value in values if value > 0]
    objects, single, sizes = _pieces(label.array)
    return CaseStats(
        name=case["name"],
        shape=tuple(facts.shape[axis] for axis in turn),
        spacing=tuple(facts.spacing[axis] for axis in turn) if facts.spacing else (),
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
        distinct=len(marked),
        contiguous=marked == list(range(1, len(marked) + 1)),
        objects=objects,
        single=single,
        object_sizes=sizes,
    )


def _turn(facts: FileFacts) -> list[int]:
    """Return which axis of the file each axis of the model is: R, A, S of a volume."""
    if len(facts.shape) < 3 or not facts.has_geometry:
        return list(range(len(facts.shape)))
    nearest = [int(axis) for axis in io_orientation(facts.grid.affine)[:, 0]]
    return [nearest.index(axis) for axis in range(3)]


def _microns(path: str) -> float:
    """Return what a picture's resolution tells; 0 where it tells nothing that a microscope would."""
    if case_kind(path) != "image":
        return 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about size and metadata; reading it has told of both
            with Image.open(path) as picture:
                dots = float(picture.info.get("dpi", (0.0,))[0])
    except (OSError, ValueError, TypeError, ZeroDivisionError, Image.DecompressionBombError):
        return 0.0
    microns = 25_400 / dots if dots > 0 else 0.0
    return round(microns, 4) if _MICRONS[0] <= microns <= _MICRONS[1] else 0.0


def _pieces(label: Array) -> tuple[int, int, tuple[float, ...]]:
    """Count the connected pieces of equal label; return them, the values that are one piece, and their sizes."""
    marked = label > 0
    if not marked.any():
        return 0, 0, ()
    axes = range(label.ndim)
    lines = [np.asarray(marked.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    box = tuple(_extent(line) for line in lines)
    part = label[box]
    step = 1
    while part.size / step**label.ndim > _PIECES_LIMIT:
        step += 1
    part = np.ascontiguousarray(part[(slice(None, None, step),) * label.ndim])
    pieces = sitk.GetArrayFromImage(sitk.ScalarConnectedComponent(sitk.GetImageFromArray(part.astype(np.int32))))
    counts = np.bincount(pieces.ravel())
    values = np.zeros(len(counts), np.int64)
    values[pieces.ravel()] = part.ravel()
    inside = (counts > 0) & (values > 0)
    _, per_value = np.unique(values[inside], return_counts=True)
    sizes = np.percentile(counts[inside] * step**label.ndim, (10, 50, 90))
    return int(inside.sum()), int((per_value == 1).sum()), tuple(float(size) for size in sizes)


def _extent(line: Array) -> slice:
    places = np.flatnonzero(line)
    return slice(int(places[0]), int(places[-1]) + 1)


def _draw(image: Array, label: Array, count: int, rng: np.random.Generator) -> Array:
    """Draw `count` voxels of the foreground, all if there are fewer, slab by slab; `(C, n)` float32."""
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
    """Describe the values of each channel; grey among color pictures counts for each."""
    result = []
    for channel in range(channels):
        values = np.concatenate([case[min(channel, len(case) - 1)] for case in drawn]).astype(np.float64)
        if not values.size:
            raise RequestError("No training label marks anything: there is nothing to learn.")
        low, median, high = np.percentile(values, (0.5, 50, 99.5))
        mean, std, low, median, high = (round(float(n), 6) for n in (values.mean(), values.std(), low, median, high))
        result.append(Intensity(mean, std, low, median, high, values.size))
    return tuple(result)


def _refuse(faults: list[str], count: int) -> None:
    if faults:
        more = f" and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        raise RequestError(
            f"{len(faults)} of {count} training cases cannot be used: {' '.join(faults[:_MAX_FAULTS])}{more} "
            "`medseg doctor` shows all of them."
        )


def _refuse_mixed(cases: list[CaseStats]) -> None:
    for case in cases:
        if len(case.shape) != len(cases[0].shape):
            raise RequestError(
                f"{cases[0].name} has {len(cases[0].shape)} axes and {case.name} has {len(case.shape)}: a model is for "
                "pictures or for volumes."
            )
        if case.channels != cases[0].channels and (
            len(case.shape) == 3 or {case.channels, cases[0].channels} != {1, 3}
        ):
            raise RequestError(
                f"{cases[0].name} has {cases[0].channels} channels and {case.name} has {case.channels}: a model reads "
                "the same channels of every case."
            )
