"""Saved labels as a data set: on the image's own grid, in the bundle's values, under pseudonyms."""

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
    """A label that somebody saved.

    Attributes:
        name: the image's id.
        image: file or DICOM folder.
        label: file, in any format that medseg reads.
        info: what the viewer said of the values in the file: `[{"name": "liver", "idx": 1}, ...]`. Empty where it said
            nothing; then the values count as they are.
    """

    name: str
    image: Path
    label: Path
    info: Sequence[Mapping[str, Any]] = ()


@dataclass
class Collected:
    """A data set that was made of saved labels.

    Attributes:
        root: its folder, for `medseg.components.find_dataset`.
        train: pseudonyms of the cases to train on.
        val: pseudonyms of the cases to validate on.
        left_out: pseudonym of each label that cannot be used, to the reason.
    """

    root: Path
    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def label_mapping(info: Sequence[Mapping[str, Any]], labels: Mapping[str, int]) -> dict[int, int] | None:
    """Return a value in a saved file -> the bundle's value, or None where the values are the bundle's own.

    Viewers number the segments of a file by their place in a list, so only the names tell what a value means. The list
    may name more than the bundle knows, since viewers list the labels of every bundle; those names are left out here.

    Args:
        info: names and values, as the viewer gave them; a value may stand under "idx", "id" or "labelID".
        labels: the bundle's names and values.

    Raises:
        CaseError: a value that is no whole number.
    """
    known = {name.lower(): value for name, value in labels.items()} | {"background": 0}
    named = _named_values(info)
    if named is None:
        return None
    return {value: known[name.lower()] for value, name in named.items() if name.lower() in known}


def _named_values(info: Sequence[Mapping[str, Any]]) -> dict[int, str] | None:
    """Return the name of each value; None where the viewer gave none."""
    named: dict[int, str] = {}
    for entry in info:
        name, value = str(entry.get("name", "")), _value(entry)
        if value is None:
            return None
        if isinstance(value, bool) or not str(value).lstrip("-").isdigit():
            raise CaseError(f"the saved label gives {name!r} the value {value!r}: expected a whole number")
        named[int(value)] = name
    return named or None


def segment_infos(info: Sequence[Mapping[str, Any]], values: Sequence[int]) -> list[dict[str, Any]]:
    """Return what a viewer said of the values that a mask holds, in their order.

    MONAI Label names the first value of a mask by the first entry, whatever value the entry is about.

    Args:
        info: as for `label_mapping`; entries without a value are about 1, 2, ... in turn.
        values: that the mask holds, without 0.
    """
    named = {_value(entry): entry for entry in info if _value(entry) is not None}
    if not named:
        named = dict(enumerate(info, 1))
    known = {int(value): dict(entry) for value, entry in named.items() if str(value).isdigit()}
    return [known.get(value, {"name": f"label {value}"}) for value in values]


def _value(entry: Mapping[str, Any]) -> Any:
    return next((entry[key] for key in ("idx", "id", "labelID") if entry.get(key) is not None), None)


def read_annotation(annotation: Annotation, labels: Mapping[str, int]) -> NDArray[np.int32]:
    """Return a saved label `(*spatial)` in the bundle's values, on the grid of its image.

    Viewers and converters may store the axes in another order or direction than the image; they are brought back.

    Args:
        annotation: what was saved.
        labels: the bundle's names and values.

    Raises:
        CaseError: the file cannot be used, or holds values that nothing explains.
        GeometryError: its voxels are not those of the image.
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
            f"the saved label has voxels of {', '.join(foreign)}, which the bundle does not know: {list(labels)}"
        )
    if surplus:
        raise CaseError(f"the saved label holds the values {surplus}, which have no name: expected {sorted(known)}")
    if mapping is None:
        return array.astype(np.int32)
    recoded: NDArray[np.int32] = np.zeros(array.shape, np.int32)
    for value, wanted in mapping.items():
        recoded[array == value] = wanted
    return recoded


def _names_in_file(label: Path) -> list[dict[str, Any]]:
    """Return names and values of a segmentation that 3D Slicer stored as such (.seg.nrrd).

    Its values are its own, whatever the places in the list are that comes with it.
    """
    if not label.name.lower().endswith(".nrrd"):
        return []
    with label.open("rb") as file:
        head = file.read(_LONGEST_HEAD).partition(b"\n\n")[0].decode("utf-8", "replace")
    fields = dict(line.strip().split(":=", 1) for line in head.splitlines() if ":=" in line)
    numbers = [match[1] for key in fields if (match := _SEGMENT.fullmatch(key))]
    return [{"name": fields.get(f"Segment{n}_Name", ""), "idx": fields[f"Segment{n}_LabelValue"]} for n in numbers]


def _aligned(array: NDArray[Any], affine: NDArray[np.float64], grid: Grid) -> NDArray[Any]:
    """Return the array with its axes in the order and direction of the grid."""
    if array.ndim == len(grid.shape) == 3:
        turn = nibabel.orientations.io_orientation(np.linalg.solve(grid.affine, affine))
        affine = affine @ nibabel.orientations.inv_ornt_aff(turn, array.shape)
        array = np.asarray(nibabel.orientations.apply_orientation(array, turn))
    if array.ndim == len(grid.shape) + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    difference = grid_difference(Grid(array.shape, affine if array.ndim == 3 else grid.affine), grid)
    if difference:
        raise GeometryError(f"the saved label does not lie on its image: {difference}")
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
    """Lay saved labels out as a data set that `medseg train` takes.

    Which part a case belongs to depends on the pseudonyms and on earlier trainings alone: equal labels give an equal
    split, and a case that weights were trained on does not judge them as long as there are others.

    Args:
        annotations: all that was saved.
        labels: the bundle's names and values.
        folder: made if missing; images are linked, labels written anew.
        val_split: share of the cases that are for validation, above 0 and below 1.
        pseudonym: gives the name of a case.
        trained_on: pseudonyms of cases that the present weights were trained on.

    Raises:
        RequestError: fewer than two labels can be used, or an unknown share.
    """
    if isinstance(val_split, bool) or not isinstance(val_split, int | float) or not 0 < val_split < 1:
        raise RequestError(f"val_split is {val_split!r}: use a share above 0 and below 1")
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
            f"{len(used)} saved label(s) can be used, and training needs two: one to train on and one to validate on. "
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
        raise CaseError("the image is no single file; training needs one of the formats that medseg reads")
    suffix = split_suffix(annotation.image.name)[1]
    label = folder / "labels" / mask_name(f"{name}{suffix}")
    write_mask(read_annotation(annotation, labels), label, like=annotation.image)
    image = folder / "images" / f"{name}{suffix}"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.symlink_to(annotation.image.resolve())


def dice(truth: NDArray[Any], predicted: NDArray[Any], labels: Mapping[str, int]) -> dict[str, float | None]:
    """Return the Dice overlap of each label, `2 |A n B| / (|A| + |B|)`; None where both masks lack it."""
    found: dict[str, float | None] = {}
    for name, value in labels.items():
        a, b = truth == value, predicted == value
        total = int(a.sum()) + int(b.sum())
        found[name] = 2 * int((a & b).sum()) / total if total else None
    return found
