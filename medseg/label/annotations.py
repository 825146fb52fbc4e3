"""Data sets of saved labels: in the image's geometry, with the bundle's label values, under pseudonyms."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import nibabel
import numpy as np

from medseg.errors import CaseError, GeometryError, MedsegError, RequestError
from medseg.files import replace_text
from medseg.io import Grid, grid_difference, load, read_grid, write_mask
from medseg.io.datasets import SPLIT_FILE
from medseg.io.names import file_kind, mask_name, split_suffix
from medseg.io.writers import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["Annotation", "Collected", "collect", "dice", "label_mapping", "read_annotation", "segment_infos"]

_SEGMENT: Final = re.compile(r"Segment(\d+)_LabelValue")
_LONGEST_HEAD: Final = 2**20


@dataclass(frozen=True)
class Annotation:
    """A saved label.

    Attributes:
        name: Id of the image.
        image: File or DICOM folder of the image.
        label: File of the label, in any format that medseg reads.
        info: Names that the viewer gave to the values in the file: `[{"name": "liver", "idx": 1}, ...]`. If empty, the
            values are those of the bundle.
    """

    name: str
    image: Path
    label: Path
    info: Sequence[Mapping[str, Any]] = ()


@dataclass
class Collected:
    """A data set of saved labels.

    Attributes:
        root: Folder of the data set, for `medseg.components.find_dataset`.
        train: Pseudonyms of the training cases.
        val: Pseudonyms of the validation cases.
        left_out: Reason for each skipped label, by pseudonym.
    """

    root: Path
    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def label_mapping(info: Sequence[Mapping[str, Any]], labels: Mapping[str, int]) -> dict[int, int] | None:
    """Return the mapping of values in a saved file to the bundle's values, or None if they are the bundle's already.

    Viewers number the segments of a file by their position in a list, so only the names define what a value means. The
    list may contain names unknown to the bundle, since viewers list the labels of every bundle; these are skipped.

    Args:
        info: Names and values from the viewer; the key of a value may be "idx", "id" or "labelID".
        labels: Value of each label of the bundle, by name.

    Raises:
        CaseError: A value is not an integer.
    """
    known = {name.lower(): value for name, value in labels.items()} | {"background": 0}
    named = _named_values(info)
    if named is None:
        return None
    return {value: known[name.lower()] for value, name in named.items() if name.lower() in known}


def _named_values(info: Sequence[Mapping[str, Any]]) -> dict[int, str] | None:
    """Return the name of each value, or None if the viewer gave no values."""
    named: dict[int, str] = {}
    for entry in info:
        name, value = str(entry.get("name", "")), _value(entry)
        if value is None:
            return None
        if isinstance(value, bool) or not str(value).lstrip("-").isdigit():
            raise CaseError(f"invalid value {value!r} of {name!r} in the saved label: expected an integer")
        named[int(value)] = name
    return named or None


def segment_infos(info: Sequence[Mapping[str, Any]], values: Sequence[int]) -> list[dict[str, Any]]:
    """Return the viewer's description of each value in a mask, in the order of the values.

    MONAI Label itself assigns entries to values by position and ignores the values of the entries.

    Args:
        info: Descriptions as for `label_mapping`; entries without a value describe 1, 2, ... in turn.
        values: Values in the mask, without 0.
    """
    named = {_value(entry): entry for entry in info if _value(entry) is not None}
    if not named:
        named = dict(enumerate(info, 1))
    known = {int(value): dict(entry) for value, entry in named.items() if str(value).isdigit()}
    return [known.get(value, {"name": f"label {value}"}) for value in values]


def _value(entry: Mapping[str, Any]) -> Any:
    return next((entry[key] for key in ("idx", "id", "labelID") if entry.get(key) is not None), None)


def read_annotation(annotation: Annotation, labels: Mapping[str, int]) -> NDArray[np.int32]:
    """Return a saved label `(*spatial)` with the bundle's values, in the geometry of its image.

    Viewers and converters may store the axes in another order or direction than the image; the array is reoriented.

    Args:
        annotation: Saved label.
        labels: Value of each label of the bundle, by name.

    Raises:
        CaseError: Unreadable file, or values without a name.
        GeometryError: Geometry mismatch between label and image.
    """
    grid = read_grid(annotation.image)
    loaded = load(annotation.label, label=True)
    array, affine = to_numpy(loaded[0]), np.asarray(loaded.affine.numpy(), dtype=np.float64)
    array = _aligned(array, affine, grid)
    info = _names_in_file(annotation.label) or annotation.info
    mapping = label_mapping(info, labels)
    values = [int(value) for value in np.unique(array)]
    known = {0, *labels.values()} if mapping is None else {0, *mapping}
    surplus = [value for value in values if value not in known]
    named = _named_values(info) or {}
    foreign = [f"{named[value]!r} ({value})" for value in surplus if value in named]
    if foreign:
        raise CaseError(
            f"unknown labels {', '.join(foreign)} in the saved label: expected the bundle's labels {list(labels)}"
        )
    if surplus:
        raise CaseError(f"values {surplus} of the saved label have no name: expected {sorted(known)}")
    if mapping is None:
        return array.astype(np.int32)
    recoded: NDArray[np.int32] = np.zeros(array.shape, np.int32)
    for value, wanted in mapping.items():
        recoded[array == value] = wanted
    return recoded


def _names_in_file(label: Path) -> list[dict[str, Any]]:
    """Return names and values from the header of a 3D Slicer segmentation (.seg.nrrd).

    They take precedence over the values in the viewer's list, which are positions.
    """
    if not label.name.lower().endswith(".nrrd"):
        return []
    with label.open("rb") as file:
        head = file.read(_LONGEST_HEAD).partition(b"\n\n")[0].decode("utf-8", "replace")
    fields = dict(line.strip().split(":=", 1) for line in head.splitlines() if ":=" in line)
    numbers = [match[1] for key in fields if (match := _SEGMENT.fullmatch(key))]
    return [{"name": fields.get(f"Segment{n}_Name", ""), "idx": fields[f"Segment{n}_LabelValue"]} for n in numbers]


def _aligned(array: NDArray[Any], affine: NDArray[np.float64], grid: Grid) -> NDArray[Any]:
    """Return the array reoriented to the axes of the grid."""
    if array.ndim == len(grid.shape) == 3:
        turn = nibabel.orientations.io_orientation(np.linalg.solve(grid.affine, affine))
        affine = affine @ nibabel.orientations.inv_ornt_aff(turn, array.shape)
        array = np.asarray(nibabel.orientations.apply_orientation(array, turn))
    if array.ndim == len(grid.shape) + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    difference = grid_difference(Grid(array.shape, affine if array.ndim == 3 else grid.affine), grid)
    if difference:
        raise GeometryError(f"geometry mismatch between the saved label and its image: {difference}")
    return array


def collect(
    annotations: Sequence[Annotation],
    labels: Mapping[str, int],
    folder: Path,
    *,
    val_split: float = 0.2,
    pseudonym: Callable[[str], str],
    trained_on: Collection[str] = (),
) -> Collected:
    """Write saved labels as a data set for `medseg train`.

    The split depends only on the pseudonyms and on earlier trainings: the same labels produce the same split, and cases
    that the weights were trained on are used for validation only if there are no others.

    Args:
        annotations: All saved labels.
        labels: Value of each label of the bundle, by name.
        folder: Folder of the data set, created if missing. Images are linked, labels are rewritten.
        val_split: Fraction of the cases for validation, above 0 and below 1.
        pseudonym: Function that returns the pseudonym of an image id.
        trained_on: Pseudonyms of the cases that the current weights were trained on.

    Raises:
        RequestError: Fewer than two usable labels, or an invalid fraction.
    """
    if isinstance(val_split, bool) or not isinstance(val_split, int | float) or not 0 < val_split < 1:
        raise RequestError(f"invalid val_split {val_split!r}: use a fraction above 0 and below 1")
    collected, used = Collected(folder), []
    for annotation in annotations:
        name = pseudonym(annotation.name)
        try:
            _add(annotation, labels, folder, name)
            used.append(name)
        except MedsegError as error:
            collected.left_out[name] = str(error)
    if len(used) < 2:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in collected.left_out.items())
        raise RequestError(
            f"{len(used)} saved label(s) usable, training needs at least two: one for training and one for validation. "
            + (reasons or "Save more corrected labels first.")
        )
    used.sort(key=lambda name: (name in trained_on, name))
    count = min(max(1, round(val_split * len(used))), len(used) - 1)
    collected.val, collected.train = sorted(used[:count]), sorted(used[count:])
    replace_text(folder / SPLIT_FILE, json.dumps({"train": collected.train, "val": collected.val}, indent=2) + "\n")
    return collected


def _add(annotation: Annotation, labels: Mapping[str, int], folder: Path, name: str) -> None:
    kind = file_kind(annotation.image)
    if kind is None:
        raise CaseError("the image is not a single file: training needs a file in a format that medseg reads")
    suffix = split_suffix(annotation.image.name)[1]
    label = folder / "labels" / mask_name(f"{name}{suffix}")
    write_mask(read_annotation(annotation, labels), label, like=annotation.image)
    image = folder / "images" / f"{name}{suffix}"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.symlink_to(annotation.image.resolve())


def dice(truth: NDArray[Any], predicted: NDArray[Any], labels: Mapping[str, int]) -> dict[str, float | None]:
    """Return the Dice coefficient of each label, `2 |A n B| / (|A| + |B|)`, or None if both masks lack it."""
    found: dict[str, float | None] = {}
    for name, value in labels.items():
        a, b = truth == value, predicted == value
        total = int(a.sum()) + int(b.sum())
        found[name] = 2 * int((a & b).sum()) / total if total else None
    return found
