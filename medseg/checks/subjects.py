"""The cases of a folder or data set for `medseg doctor`, listed even if the listing itself is faulty.

Training refuses a data set at its first fault; here each fault becomes a finding, and all other cases are still
checked. Nothing beyond the standard library is imported, and no image is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from medseg.errors import RequestError, shortened
from medseg.io.cases import list_cases
from medseg.io.datasets import (
    DATASET_FILE,
    common_folder,
    entry_source,
    label_options,
    read_dataset,
    read_json,
    read_split,
    split_stems,
)
from medseg.io.names import StrPath, absolute, split_suffix
from medseg.types import Skipped

__all__ = ["PARTS", "Collection", "Finding", "Subject", "find_subjects"]

Severity: TypeAlias = Literal["error", "warning", "note"]

# Part of the data set by section of a dataset.json.
PARTS: Mapping[str, str] = {"training": "train", "validation": "val", "test": "test"}
_LAYOUTS = (("imagesTr", "labelsTr"), ("images", "labels"))
_SHOWN = 3
_NUMBER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class Finding:
    """A fault or suspicious property of some cases.

    Attributes:
        severity: "error" for data that are refused or give wrong results, "warning" for suspicious data, "note" for
            information.
        kind: Short name by which findings are grouped, such as "empty mask".
        message: What was found in these cases, and what to do.
        cases: Names of the cases.
        repair: Repair by `medseg doctor --fix`; empty if there is none.
    """

    severity: Severity
    kind: str
    message: str
    cases: tuple[str, ...] = ()
    repair: str = ""


@dataclass(frozen=True)
class Subject:
    """A case of a data set.

    Attributes:
        name: Short, unique name.
        image: Path of the image, a DICOM folder, or `folder::series`.
        label: Path of the label; None without one.
        part: "train", "val" or "test"; empty if unknown.
    """

    name: str
    image: str
    label: str | None = None
    part: str = ""


@dataclass(frozen=True)
class Collection:
    """The cases at a path, with the content of their `dataset.json`.

    Attributes:
        root: Folder that file names are relative to.
        subjects: Cases.
        findings: Faults of the listing.
        labels: Class name of each label value in `dataset.json`.
        modality: Modality in `dataset.json`, such as "CT"; empty if unknown.
        channels: Number of channels in `dataset.json`; None if unknown.
        listings: The `dataset.json` and the split file (see `read_split`), as far as they exist.
        label_options: Options for reading DICOM labels (see `medseg.io.datasets.label_options`).
    """

    root: Path
    subjects: tuple[Subject, ...]
    findings: tuple[Finding, ...] = ()
    labels: dict[int, str] = field(default_factory=dict)
    modality: str = ""
    channels: int | None = None
    listings: tuple[Path, ...] = ()
    label_options: Mapping[str, Any] = field(default_factory=dict)

    def relative(self, path: StrPath) -> str:
        """Return a path relative to the root, as text."""
        text, start = str(path), f"{self.root}/"
        return text.removeprefix(start) if text.startswith(start) else Path(text).name

    def shortened(self, text: str) -> str:
        """Return a message with its paths relative to the root."""
        return shortened(text, self.root)


def find_subjects(path: StrPath) -> Collection:
    """List the cases at a path.

    Args:
        path: Data set (Medical Segmentation Decathlon, nnU-Net raw, or `images/` with `labels/`), its `dataset.json`,
            or an image or folder of images as for `medseg.io.list_cases`.

    Raises:
        RequestError: No images at `path`.
    """
    given = absolute(path)
    root = given.parent if given.name.endswith(".json") else given
    listing = given if root != given else root / DATASET_FILE
    content = read_json(listing) if listing.is_file() else {}
    if "training" in content:
        return _listed(root, listing, content)
    if root.is_dir() and any((root / images).is_dir() and (root / labels).is_dir() for images, labels in _LAYOUTS):
        return _paired(root, listing, content)
    return _plain(given)


def _plain(given: Path) -> Collection:
    """List images without labels."""
    found = list_cases(given)
    root = given if given.is_dir() else given.parent
    subjects = tuple(Subject(split_suffix(case.name)[0], case.image) for case in found.cases)
    return Collection(root, subjects, tuple(_skipped(found.skipped)))


def _skipped(items: Sequence[Skipped]) -> Iterator[Finding]:
    reasons: dict[str, list[str]] = {}
    for item in items:
        reasons.setdefault(item.reason, []).append(Path(item.path).name)
    for reason, names in reasons.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN])
        yield Finding("note", "skipped", f"{len(names)} files are skipped ({reason}): {shown}{more}.")


def _listed(root: Path, listing: Path, content: Mapping[str, Any]) -> Collection:
    """List a data set by its `dataset.json`."""
    findings: list[Finding] = []
    entries: list[tuple[str, Path, Path | None]] = []
    for section, part in PARTS.items():
        for entry in _section(content, section, listing, findings):
            image, label = (_entry_file(root, entry, key, listing, findings) for key in ("image", "label"))
            if image is not None:
                entries.append((part, image, label))
    if not entries:
        raise RequestError(
            f"None of the images listed in {listing} exists. Check its paths, which are relative to its folder."
        )
    base = common_folder(image for _, image, _ in entries)
    parts, listings = _parts_of(root, base, {image: part for part, image, _ in entries}, content, findings)
    findings += _refusals(listing)
    # An image that is listed in two parts belongs to both.
    decided = [(parts[image] if listings else part, image, label) for part, image, label in entries]
    subjects = _named(decided, root)
    return _collection(root, subjects, findings, content, [listing, *listings])


def _section(content: Mapping[str, Any], section: str, listing: Path, findings: list[Finding]) -> list[Any]:
    entries = content.get(section) or []
    if isinstance(entries, list):
        return entries
    text = f"{listing.name}: '{section}' is a {type(entries).__name__}; expected a list of cases."
    findings.append(Finding("error", "listing", text))
    return []


def _paired(root: Path, listing: Path, content: Mapping[str, Any]) -> Collection:
    """List a data set by its folders."""
    try:
        dataset = read_dataset(root)
    except RequestError as error:
        image_folder = next(images for images, labels in _LAYOUTS if (root / images).is_dir())
        plain = _plain(root / image_folder)
        fault = Finding("error", "listing", shortened(error, root))
        return Collection(plain.root, plain.subjects, (fault, *plain.findings))
    findings: list[Finding] = []
    images = dict(dataset.images)
    parts, listings = _parts_of(root, dataset.base, dict.fromkeys(images.values(), ""), content, findings)
    entries = [(parts[image], image, dataset.labels.get(stem)) for stem, image in images.items()]
    subjects = _named(entries, dataset.base)
    lonely = sorted(set(dataset.labels) - set(images))
    if lonely:
        shown = ", ".join(lonely[:_SHOWN])
        findings.append(
            Finding(
                "warning",
                "label without image",
                f"{len(lonely)} labels have no image of the same name: {shown}.",
                tuple(lonely),
            )
        )
    findings += _refusals(root)
    return _collection(root, subjects, findings, content, [path for path in (listing, *listings) if path.is_file()])


def _collection(
    root: Path, subjects: list[Subject], findings: list[Finding], content: Mapping[str, Any], listings: list[Path]
) -> Collection:
    for subject in subjects:
        if subject.label is None and subject.part != "test":
            findings.append(
                Finding(
                    "error" if subject.part else "warning", "missing label", "The image has no label.", (subject.name,)
                )
            )
    modality = content.get("modality") or content.get("channel_names") or {}
    kinds = list(modality.values()) if isinstance(modality, dict) else [modality]
    return Collection(
        root,
        tuple(subjects),
        tuple(findings),
        _label_names(content.get("labels")),
        str(kinds[0]) if kinds else "",
        len(kinds) if isinstance(modality, dict) and kinds else None,
        tuple(listings),
        _label_options(root, content),
    )


def _label_options(root: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return label_options(content, root / DATASET_FILE)
    except RequestError:  # `_refusals` reports it
        return {}


def _entry_file(root: Path, entry: Any, key: str, listing: Path, findings: list[Finding]) -> Path | None:
    """Return the file of an entry of a `dataset.json`; None, with a finding, if there is none."""
    text = entry.get(key) if isinstance(entry, dict) else entry if key == "image" else None
    if text is None and key == "label":
        return None
    if not isinstance(text, str) or not text:
        findings.append(Finding("error", "listing", f"{listing.name}: the entry {entry!r} has no {key}."))
        return None
    path = absolute(root / text)
    if Path(text).is_absolute() or not path.is_relative_to(root):
        findings.append(Finding("error", "listing", f"{listing.name}: {text!r} is outside the data set's folder."))
        return None
    if entry_source(path) is None:
        findings.append(Finding("error", "missing file", f"{text} is listed in {listing.name} but does not exist."))
        return None
    return path


def _parts_of(
    root: Path, base: Path, images: Mapping[Path, str], content: Mapping[str, Any], findings: list[Finding]
) -> tuple[dict[Path, str], list[Path]]:
    """Return the part of each image: from `dataset.json` if it lists validation cases, else from the split file."""
    if content.get("validation"):
        return dict(images), []
    try:
        found = read_split(root)
    except RequestError as error:
        findings.append(Finding("error", "listing", shortened(error, root)))
        return dict(images), []
    if found is None:
        return dict(images), []
    path, split = found
    listed = {part: split[part] for part in PARTS.values() if isinstance(split.get(part), list)}
    part_of = {str(stem): part for part, stems in listed.items() for stem in stems}
    stems = {image: split_suffix(image.relative_to(base).as_posix())[0] for image in images}
    # Case names of nnU-Net lack the channel number, such as "_0000".
    return {image: part_of.get(stem, part_of.get(stem[:-5], "")) for image, stem in stems.items()}, [path]


def _refusals(source: Path) -> Iterator[Finding]:
    """Find the faults for which training would refuse the listing."""
    try:
        split_stems(read_dataset(source))
    except RequestError as error:
        undecided = error.code == "no-split"
        text = shortened(error, source if source.is_dir() else source.parent)
        yield Finding("warning" if undecided else "error", "no split" if undecided else "listing", text)


def _named(entries: list[tuple[str, Path, Path | None]], base: Path) -> list[Subject]:
    """Name cases by their file names, or by their paths if file names repeat."""
    short = [split_suffix(image.name)[0] for _, image, _ in entries]
    long = [split_suffix(image.relative_to(base).as_posix())[0] for _, image, _ in entries]
    names = short if len(set(short)) == len(short) else long
    # A file that is listed twice remains two cases.
    unique = [
        f"{name} ({names[:index].count(name) + 1})" if name in names[:index] else name
        for index, name in enumerate(names)
    ]
    return [
        Subject(name, str(image), None if label is None else str(label), part)
        for name, (part, image, label) in zip(unique, entries, strict=True)
    ]


def _label_names(labels: Any) -> dict[int, str]:
    """Return the name of each value in the `labels` of the Decathlon, or of nnU-Net, which map names to values."""
    names: dict[int, str] = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if _NUMBER.fullmatch(str(key)):
            names[int(key)] = " or ".join(map(str, value)) if isinstance(value, list) else str(value)
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int):
                names.setdefault(number, str(key))
    return names
