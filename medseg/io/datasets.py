"""Training and validation cases of a labeled data set on disk.

Three layouts are supported:

* a Medical Segmentation Decathlon folder: `dataset.json` with "training" and "validation" lists;
* an nnU-Net raw folder: `imagesTr/case_0000.nii.gz`, `labelsTr/case.nii.gz`;
* `images/` and `labels/` with equal stems and any suffix that medseg reads.

An image may be a folder of DICOM files, `images/case1/`, and a label a DICOM SEG or RT-STRUCT: `labels/case1.dcm`, or a
folder that holds one. `dataset.json` maps the names of their segments or ROIs to label values under "labels"
(`label_options`).

If `dataset.json` has no split, a file `split.json` beside it holds `{"train": [...], "val": [...]}` with the stems of
the cases; without one, the first fold of nnU-Net's `splits_final.json` is used. Only the standard library is imported,
and no image is opened.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg.errors import RequestError
from medseg.io.dicom.detect import is_dicom, named_file, split_series
from medseg.io.names import IMAGE_SUFFIXES, StrPath, absolute, file_kind, mask_name, split_suffix
from medseg.types import Case

__all__ = [
    "DATASET_FILE",
    "SPLIT_FILE",
    "Dataset",
    "common_folder",
    "entry_source",
    "find_dataset",
    "label_options",
    "list_dataset",
    "prediction_entries",
    "read_dataset",
    "read_json",
    "read_split",
    "split_stems",
]

SPLIT_FILE = "split.json"
_NNUNET_FOLDS = "splits_final.json"
DATASET_FILE = "dataset.json"
_SECTIONS = {"train": "training", "val": "validation"}
_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Dataset:
    """One data set on disk.

    Attributes:
        root: Folder of the data set.
        base: Folder that case names are relative to.
        images: Stem -> image of every labeled case.
        labels: Stem -> label file of the cases that have one.
        sections: Part ("train", "val") -> stems listed in `dataset.json`; empty if it lists none.
        label_options: Options for reading labels that are DICOM objects (see `label_options`).
    """

    root: Path
    base: Path
    images: Mapping[str, Path]
    labels: Mapping[str, Path]
    sections: Mapping[str, Sequence[str]]
    label_options: Mapping[str, Any] = field(default_factory=dict)

    def case(self, stem: str) -> Case:
        """Return one labeled case."""
        image = self.images[stem]
        if stem not in self.labels:
            raise RequestError(
                f"{image} has no label: expected a file '{stem}' with an image suffix beside the other labels of "
                f"{self.root}. Add it, or remove the case from the split."
            )
        label = self.labels[stem]
        name = mask_name(named_file(image).relative_to(self.base).as_posix())
        options = self.label_options if _may_be_object(label) else {}
        return Case(name, (str(image),), str(label), output=name, label_options=options)


def find_dataset(
    path: StrPath, split: str, *, labels: str = "labels", split_file: StrPath | None = None
) -> list[dict[str, Any]]:
    """List the cases of one part of a labeled data set as data dictionaries of MONAI; see `list_dataset`.

    Returns:
        One `{"image": ..., "label": ..., "name": ...}` per case: two absolute paths and the name of the result. A DICOM
        label adds "label_options" for `medseg.components.LoadCased`.
    """
    return [case.entry() for case in list_dataset(path, split, labels=labels, split_file=split_file)]


def list_dataset(
    path: StrPath, split: str, *, labels: str = "labels", split_file: StrPath | None = None
) -> tuple[Case, ...]:
    """List the cases of one part of a labeled data set, in the order of the split.

    Args:
        path: Folder of the data set, or its `dataset.json`.
        split: Part of the data set: "train", "val", or "test" if it lists test cases with labels.
        labels: Name of the folder of labels beside `images/`, for data sets with several observers.
        split_file: JSON file with the stems of each part, relative to the folder. By default the lists in
            `dataset.json`, or `split.json` if one of them is missing.

    Raises:
        RequestError: The data set, one of its files or the split is missing, incomplete or inconsistent.
    """
    if split not in (*_SECTIONS, "test"):
        raise RequestError(f"Unknown split {split!r}: expected 'train', 'val' or 'test'.")
    dataset = read_dataset(path, labels=labels, sections={"test": "test"} if split == "test" else _SECTIONS)
    stems = split_stems(dataset, split_file, parts=("test",) if split == "test" else tuple(_SECTIONS))[split]
    if not stems:
        raise RequestError(f"The {split!r} part of {dataset.root} is empty: list at least one case.")
    return tuple(dataset.case(stem) for stem in stems)


def read_dataset(path: StrPath, *, labels: str = "labels", sections: Mapping[str, str] = _SECTIONS) -> Dataset:
    """Detect the layout of a data set and list its files; of a `dataset.json`, the given `sections` are read."""
    given = absolute(path)
    if not given.exists():
        raise RequestError(f"No data set at {given}: check the path.")
    root = given if given.is_dir() else given.parent
    listing = given if given.is_file() else root / DATASET_FILE
    content = read_json(listing) if listing.is_file() else {}
    if "training" in content:
        dataset = _listed_dataset(root, listing, content, sections)
    else:
        dataset = _folder_dataset(root, *_find_folders(root, labels))
    if any(map(_may_be_object, dataset.labels.values())):
        return replace(dataset, label_options=label_options(content, listing))
    return dataset


def label_options(content: Mapping[str, Any], listing: Path) -> dict[str, Any]:
    """Return the options of a `dataset.json` for labels that are DICOM objects, as arguments of `load_label`.

    Args:
        content: Content of the file. "labels" maps values to names as in the Decathlon (`{"1": "liver"}`, with synonyms
            `{"1": ["liver", "Leber"]}`) or names to values as in nnU-Net (`{"liver": 1}`). "optional_labels" lists the
            names that may be missing from a file. "on_overlap" may be "later": of two overlapping segments, the later
            one in "labels" wins.
        listing: Path of the file, for messages.

    Raises:
        RequestError: One of these entries is malformed.
    """
    options: dict[str, Any] = {}
    if content.get("labels"):
        options["names"] = _named_values(content["labels"], listing)
    optional = content.get("optional_labels", [])
    if not isinstance(optional, list) or not all(isinstance(name, str) for name in optional):
        raise RequestError(f"{listing}: 'optional_labels' is {optional!r}: expected a list of names.")
    rule = content.get("on_overlap", "refuse")
    if rule not in ("refuse", "later"):
        raise RequestError(f"{listing}: 'on_overlap' is {rule!r}: expected 'refuse' or 'later'.")
    return {**options, "optional": optional, "on_overlap": rule}


def split_stems(
    dataset: Dataset, split_file: StrPath | None = None, *, parts: Sequence[str] = tuple(_SECTIONS)
) -> dict[str, list[str]]:
    """Return the stems of each part, each of them known, listed once, and in one part only."""
    path = absolute(dataset.root / (split_file or SPLIT_FILE))
    if split_file is None and set(parts) <= set(dataset.sections):
        path, listed = dataset.root / DATASET_FILE, {part: list(stems) for part, stems in dataset.sections.items()}
    else:
        listed = _read_split(path, dataset, parts)
    for stems in listed.values():
        _refuse_unknown(stems, dataset, path)
    _refuse_repeated([stem for stems in listed.values() for stem in stems], path)
    return listed


def prediction_entries(listing: Path) -> list[Path]:
    """Return the images that a `dataset.json` lists for prediction: its "test" list, else "validation"."""
    content = read_json(listing)
    for section in ("test", "validation"):
        if content.get(section):
            return [_entry_path(listing, section, entry, "image") for entry in _entries(listing, content, section)]
    raise RequestError(
        f"{listing} has no cases to predict: expected a 'test' or 'validation' list. Give the folder of the images."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top-level value is an object."""
    content = _json(path)
    if not isinstance(content, dict):
        raise RequestError(f"{path} has a {type(content).__name__} at its top level: expected a JSON object {{...}}.")
    return content


def read_split(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the split file of a data set and its unchecked content; None if it has none.

    The split file is `split.json`, or else the first fold of nnU-Net's `splits_final.json`.
    """
    path, folds = root / SPLIT_FILE, root / _NNUNET_FOLDS
    if path.is_file():
        return path, read_json(path)
    return (folds, _first_fold(folds)) if folds.is_file() else None


def entry_source(path: Path) -> Path | None:
    """Return the file or folder of an entry of a listing, without `::series`; None if it does not exist."""
    try:
        source = split_series(path)[0]
        return source if source.exists() else None
    except OSError:  # an impossible file name, such as one of thousands of characters
        return None


def common_folder(paths: Iterable[Path]) -> Path:
    """Return the deepest common folder of `paths`."""
    folders = [path.parent for path in paths]
    return next(c for c in (folders[0], *folders[0].parents) if all(f.is_relative_to(c) for f in folders))


def _listed_dataset(root: Path, listing: Path, content: Mapping[str, Any], sections: Mapping[str, str]) -> Dataset:
    found: dict[str, list[dict[str, Path]]] = {}
    for part, section in sections.items():
        if section in content:
            found[part] = [_pair(listing, section, entry) for entry in _entries(listing, content, section)]
    pool = [pair for pairs in found.values() for pair in pairs]
    if not pool:
        raise RequestError(f"{listing} lists no cases: its {next(iter(sections.values()))!r} list is empty.")
    base = common_folder(pair["image"] for pair in pool)
    stems = {part: [_stem(pair["image"], base) for pair in pairs] for part, pairs in found.items()}
    _refuse_repeated([stem for part in stems.values() for stem in part], listing)
    images = {_stem(pair["image"], base): pair["image"] for pair in pool}
    labels = {_stem(pair["image"], base): pair["label"] for pair in pool if "label" in pair}
    return Dataset(root, base, images, labels, {part: names for part, names in stems.items() if names})


def _entries(listing: Path, content: Mapping[str, Any], section: str) -> list[Any]:
    entries = content[section]
    if not isinstance(entries, list):
        raise RequestError(f"{listing}: '{section}' is a {type(entries).__name__}: expected a list of cases.")
    return entries


def _pair(listing: Path, section: str, entry: Any) -> dict[str, Path]:
    if not isinstance(entry, dict) or "label" not in entry:
        raise RequestError(f"{listing}: entry {entry!r} of '{section}' has no 'label': expected image and label.")
    return {key: _entry_path(listing, section, entry, key) for key in ("image", "label")}


def _entry_path(listing: Path, section: str, entry: Any, key: str) -> Path:
    """Return the path of an entry, which is a path or an object of paths, relative to the listing.

    It may be a file, a folder of DICOM files, or `folder::series`.
    """
    text = entry.get(key) if isinstance(entry, dict) else entry
    if not isinstance(text, str) or not text:
        raise RequestError(f"{listing}: entry {entry!r} of '{section}' has no {key}: expected one path as a string.")
    root = listing.parent
    path = absolute(root / text)
    if Path(text).is_absolute() or not path.is_relative_to(root):
        raise RequestError(
            f"{listing}: {text!r} in '{section}' is outside {root}: use relative paths below that folder."
        )
    source = entry_source(path)
    if source is None:
        raise RequestError(f"{listing}: {text!r} in '{section}' does not exist: {path} is missing.")
    if source.is_dir() and not any(is_dicom(where / name) for where, _, names in _walk(source) for name in names):
        raise RequestError(f"{listing}: {text!r} in '{section}' is a folder without DICOM files: give a file.")
    return path


def _named_values(labels: Any, listing: Path) -> dict[str, int]:
    """Return name -> value of the labels in a `dataset.json`, without the background."""
    if not isinstance(labels, dict):
        raise RequestError(f"{listing}: 'labels' is {labels!r}: expected an object of values and names.")
    values: dict[str, int] = {}
    known: set[str] = set()
    for key, item in labels.items():
        value_first = _NUMBER.fullmatch(key) and not isinstance(item, int)
        value, names = (int(key), item if isinstance(item, list) else [item]) if value_first else (item, [key])
        if type(value) is not int or not all(isinstance(name, str) for name in names):
            raise RequestError(
                f"{listing}: 'labels' has {key!r}: {item!r}. Labels that are DICOM objects need a value and a name, "
                'such as "1": "liver".'
            )
        for name in names if value else ():
            if name.strip().casefold() in known:
                raise RequestError(f"{listing}: 'labels' has the name {name!r} twice (names are case-insensitive).")
            known.add(name.strip().casefold())
            values[name] = value
    return values


def _may_be_object(label: Path) -> bool:
    """Return whether a label is DICOM, so that it may be a SEG or RT-STRUCT."""
    return label.is_dir() or (file_kind(label) in (None, "dicom") and is_dicom(label))


def _find_folders(root: Path, labels: str) -> tuple[str, str]:
    for image_folder, label_folder in (("imagesTr", "labelsTr"), ("images", labels)):
        if (root / image_folder).is_dir():
            return image_folder, label_folder
    raise RequestError(
        f"{root} is not a data set in a supported layout: expected a {DATASET_FILE} with a 'training' list, or folders "
        f"images/ and {labels}/, or imagesTr/ and labelsTr/."
    )


def _folder_dataset(root: Path, image_folder: str, label_folder: str) -> Dataset:
    base, label_base = root / image_folder, root / label_folder
    if not label_base.is_dir():
        raise RequestError(f"{root} has {image_folder}/ but no folder {label_folder}/ with the labels.")
    images = _by_stem(base, _file_stems(label_base))
    if image_folder == "imagesTr":
        images = _single_channel(images, base)
    if not images:
        raise RequestError(f"{base} has no images: expected files ending in {', '.join(IMAGE_SUFFIXES)}.")
    return Dataset(root, base, images, _by_stem(label_base, _file_stems(base)), {})


def _by_stem(folder: Path, partners: set[str]) -> dict[str, Path]:
    """Return the images below a folder by stem.

    A folder of DICOM files is one image, unless its files have `partners`, which makes each of them an image.
    """
    found: dict[str, Path] = {}
    for where, subfolders, names in _walk(folder):
        stems = _stems(where, names, folder)
        if where != folder and _are_dicom(where, names) and partners.isdisjoint(stems.values()):
            entries = {where: _stem(where, folder)}
            subfolders.clear()
        else:
            entries = {where / name: stem for name, stem in stems.items() if (where / name).is_file()}
        for path, stem in entries.items():
            if stem in found:
                raise RequestError(f"{found[stem]} and {path} have the same stem: keep one of them.")
            found[stem] = path
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _are_dicom(where: Path, names: Sequence[str]) -> bool:
    """Return whether a folder has DICOM files and no other images."""
    kinds = set(map(file_kind, names))
    return kinds <= {None, "dicom"} and ("dicom" in kinds or any(is_dicom(where / name) for name in names))


def _stems(where: Path, names: Sequence[str], base: Path) -> dict[str, str]:
    """Return the stem of each file in a folder that has an image suffix; no file is opened."""
    start = "" if where == base else f"{where.relative_to(base).as_posix()}/"
    return {name: f"{start}{split_suffix(name)[0]}" for name in names if file_kind(name) is not None}


def _file_stems(folder: Path) -> set[str]:
    return {stem for where, _, names in _walk(folder) for stem in _stems(where, names, folder).values()}


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder with its subfolders, which the caller may prune, and its files, without hidden ones."""
    for where, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(where), subfolders, sorted(name for name in names if not name.startswith("."))


def _single_channel(images: Mapping[str, Path], base: Path) -> dict[str, Path]:
    """Remove nnU-Net's channel number from the stems, if all of them have one."""
    if not all(stem[-5:-4] == "_" and stem[-4:].isdigit() for stem in images):
        return dict(images)
    found = {stem[:-5]: path for stem, path in images.items()}
    if len(found) < len(images):
        raise RequestError(
            f"{base} stores the channels of a case in several files (_0000, _0001, ...): expected one file per case. "
            "Stack the channels along a fourth axis first."
        )
    return found


def _stem(path: Path, base: Path) -> str:
    return split_suffix(path.relative_to(base).as_posix())[0]


def _read_split(path: Path, dataset: Dataset, wanted: Sequence[str]) -> dict[str, list[str]]:
    found = read_split(path.parent) if path.name == SPLIT_FILE else None
    if found is not None:
        path, content = found
    elif path.is_file():
        content = read_json(path)
    else:
        example = next(iter(sorted(dataset.images)))
        raise RequestError(
            f"{dataset.root} has no split into training and validation cases: expected {path} with "
            f'{{"train": [...], "val": [...]}} and the names of the cases, such as "{example}".',
            code="no-split",
            path=path,
        )
    parts = {part: content.get(part) for part in wanted}
    for part, stems in parts.items():
        if not isinstance(stems, list) or not all(isinstance(stem, str) for stem in stems):
            raise RequestError(f"{path}: '{part}' is {stems!r}: expected a list of case names.")
    return parts  # type: ignore[return-value]  # checked above


def _first_fold(path: Path) -> dict[str, Any]:
    """Return the first of nnU-Net's folds, an object with "train" and "val"."""
    folds = _json(path)
    if not isinstance(folds, list) or not folds or not isinstance(folds[0], dict):
        raise RequestError(f'{path} is not a list of folds: expected [{{"train": [...], "val": [...]}}, ...].')
    return folds[0]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}.") from error
    except RecursionError as error:
        raise RequestError(f"{path} cannot be read as JSON: it is nested too deeply.") from error


def _refuse_unknown(stems: Iterable[str], dataset: Dataset, source: Path) -> None:
    for stem in stems:
        if stem not in dataset.images:
            near = difflib.get_close_matches(stem, dataset.images, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"{source} lists the case {stem!r}, which has no image in {dataset.base}.{hint}")


def _refuse_repeated(stems: Sequence[str], source: Path) -> None:
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1}) if len(set(stems)) < len(stems) else []
    if repeated:
        raise RequestError(
            f"{source} lists {', '.join(repeated[:5])} more than once: expected each case once and in one part, so "
            "that no training case is used for validation."
        )
