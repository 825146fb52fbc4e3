"""What `medseg doctor` looks at: the cases of a folder or data set, listed even where the listing itself is faulty.

Training refuses a data set at its first fault; here each fault becomes a finding, and the rest is looked at all the
same. Nothing beyond the standard library is imported and no image is opened.
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

# Sections of a dataset.json -> the part of the data set.
PARTS: Mapping[str, str] = {"training": "train", "validation": "val", "test": "test"}
_LAYOUTS = (("imagesTr", "labelsTr"), ("images", "labels"))
_SHOWN = 3
_NUMBER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth a look.

    Attributes:
        severity: "error" would be refused, or spoils results; "warning" is suspicious; "note" is for information.
        kind: a short name that findings are grouped by, such as "empty mask".
        message: what was found in these cases, and what to do.
        cases: names of the cases.
        repair: what `medseg doctor --fix` does about it; empty where that would be a guess.
    """

    severity: Severity
    kind: str
    message: str
    cases: tuple[str, ...] = ()
    repair: str = ""


@dataclass(frozen=True)
class Subject:
    """One case.

    Attributes:
        name: short and unique.
        image: path, also of a DICOM folder or `folder::series`.
        label: path of the label, if there is one.
        part: "train", "val", "test", or empty where nothing says.
    """

    name: str
    image: str
    label: str | None = None
    part: str = ""


@dataclass(frozen=True)
class Collection:
    """All cases of a path, and what is known of them before a file is opened.

    Attributes:
        root: the folder that file names are relative to.
        subjects: the cases.
        findings: what is wrong with the listing.
        labels: value -> name, where `dataset.json` has them.
        modality: such as "CT", where `dataset.json` says.
        channels: values per voxel, where `dataset.json` says.
        listings: the `dataset.json` and the file of the split (see `read_split`) that were read.
        label_options: how labels that are DICOM objects are read (see `medseg.io.datasets.label_options`).
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
        """Return a message with the root taken off the paths in it."""
        return shortened(text, self.root)


def find_subjects(path: StrPath) -> Collection:
    """List the cases at a path.

    Args:
        path: a data set (Medical Segmentation Decathlon, nnU-Net raw, or `images/` with `labels/`), its `dataset.json`,
            or whatever `medseg.io.list_cases` takes.

    Raises:
        RequestError: there is nothing, or nothing that can be an image.
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
    """Images without labels."""
    found = list_cases(given)
    root = given if given.is_dir() else given.parent
    subjects = tuple(Subject(split_suffix(case.name)[0], case.image) for case in found.cases)
    return Collection(root, subjects, tuple(_left_out(found.skipped)))


def _left_out(items: Sequence[Skipped]) -> Iterator[Finding]:
    reasons: dict[str, list[str]] = {}
    for item in items:
        reasons.setdefault(item.reason, []).append(Path(item.path).name)
    for reason, names in reasons.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN])
        yield Finding("note", "left out", f"{len(names)} files are not read ({reason}): {shown}{more}.")


def _listed(root: Path, listing: Path, content: Mapping[str, Any]) -> Collection:
    """A data set by its `dataset.json`."""
    findings: list[Finding] = []
    entries: list[tuple[str, Path, Path | None]] = []
    for section, part in PARTS.items():
        for entry in _section(content, section, listing, findings):
            image, label = (_entry_file(root, entry, key, listing, findings) for key in ("image", "label"))
            if image is not None:
                entries.append((part, image, label))
    if not entries:
        raise RequestError(f"{listing} lists no image that exists: check its paths, which are relative to it.")
    base = common_folder(image for _, image, _ in entries)
    parts, listings = _parts_of(root, base, {image: part for part, image, _ in entries}, content, findings)
    findings += _refusals(listing)
    # An image that is listed in two parts is in both.
    decided = [(parts[image] if listings else part, image, label) for part, image, label in entries]
    subjects = _named(decided, root)
    return _collection(root, subjects, findings, content, [listing, *listings])


def _section(content: Mapping[str, Any], section: str, listing: Path, findings: list[Finding]) -> list[Any]:
    entries = content.get(section) or []
    if isinstance(entries, list):
        return entries
    text = f"{listing.name}: '{section}' is a {type(entries).__name__}: expected a list of cases."
    findings.append(Finding("error", "listing", text))
    return []


def _paired(root: Path, listing: Path, content: Mapping[str, Any]) -> Collection:
    """A data set by its folders."""
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
            Finding("warning", "label without image", f"{len(lonely)} labels have no image: {shown}.", tuple(lonely))
        )
    findings += _refusals(root)
    return _collection(root, subjects, findings, content, [path for path in (listing, *listings) if path.is_file()])


def _collection(
    root: Path, subjects: list[Subject], findings: list[Finding], content: Mapping[str, Any], listings: list[Path]
) -> Collection:
    for subject in subjects:
        if subject.label is None and subject.part != "test":
            findings.append(
                Finding("error" if subject.part else "warning", "no label", "The image has no label.", (subject.name,))
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
    except RequestError:  # where there are labels that it matters for, `_refusals` tells it
        return {}


def _entry_file(root: Path, entry: Any, key: str, listing: Path, findings: list[Finding]) -> Path | None:
    """Return the file that an entry of a `dataset.json` names, if it is there."""
    text = entry.get(key) if isinstance(entry, dict) else entry if key == "image" else None
    if text is None and key == "label":
        return None
    if not isinstance(text, str) or not text:
        findings.append(Finding("error", "listing", f"{listing.name}: the entry {entry!r} names no {key}."))
        return None
    path = absolute(root / text)
    if Path(text).is_absolute() or not path.is_relative_to(root):
        findings.append(Finding("error", "listing", f"{listing.name}: {text!r} leads out of the data set's folder."))
        return None
    if entry_source(path) is None:
        findings.append(Finding("error", "missing file", f"{text} is listed in {listing.name} and is not there."))
        return None
    return path


def _parts_of(
    root: Path, base: Path, images: Mapping[Path, str], content: Mapping[str, Any], findings: list[Finding]
) -> tuple[dict[Path, str], list[Path]]:
    """Return the part of each image: that of `dataset.json` if it has both, else of the file of the split."""
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
    # nnU-Net's channel number is no part of a case's name.
    return {image: part_of.get(stem, part_of.get(stem[:-5], "")) for image, stem in stems.items()}, [path]


def _refusals(source: Path) -> Iterator[Finding]:
    """What training would refuse about the listing."""
    try:
        split_stems(read_dataset(source))
    except RequestError as error:
        undecided = error.code == "no-split"
        text = shortened(error, source if source.is_dir() else source.parent)
        yield Finding("warning" if undecided else "error", "no split" if undecided else "listing", text)


def _named(entries: list[tuple[str, Path, Path | None]], base: Path) -> list[Subject]:
    """Name cases by their file, and where two share that by their path."""
    short = [split_suffix(image.name)[0] for _, image, _ in entries]
    long = [split_suffix(image.relative_to(base).as_posix())[0] for _, image, _ in entries]
    names = short if len(set(short)) == len(short) else long
    # A file that is listed twice stays two cases.
    unique = [
        f"{name} ({names[:index].count(name) + 1})" if name in names[:index] else name
        for index, name in enumerate(names)
    ]
    return [
        Subject(name, str(image), None if label is None else str(label), part)
        for name, (part, image, label) in zip(unique, entries, strict=True)
    ]


def _label_names(labels: Any) -> dict[int, str]:
    """Return value -> name from a Decathlon's `labels`, or from nnU-Net's, which are the other way round."""
    names: dict[int, str] = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if _NUMBER.fullmatch(str(key)):
            names[int(key)] = " or ".join(map(str, value)) if isinstance(value, list) else str(value)
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int):
                names.setdefault(number, str(key))
    return names
