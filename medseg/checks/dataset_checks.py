"""Checks of a data set as a whole: duplicate or overlapping scans, patients in several parts of the split, outliers.

Duplicates are found by their voxels in RAS orientation, whatever their file format and orientation; overlapping volumes
by identical axial slices; patients by DICOM PatientID and by case names (see `medseg.io.patients`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from medseg.checks.subjects import Collection, Finding, Subject
from medseg.io.patients import patient_of
from medseg.io.survey import FileFacts

__all__ = ["Examined", "check_set"]

_MIN_CASES = 5
_COMMON_SLICE = 20
_MIN_SLICES = 3
_DEVIATIONS = 5 * 1.4826
_MANY = 0.8


@dataclass(frozen=True)
class Examined:
    """A case with the properties of its files.

    Attributes:
        subject: The case.
        image: Properties of its image; None if it could not be read.
        label: Properties of its label; None if there is none or it could not be read.
    """

    subject: Subject
    image: FileFacts | None
    label: FileFacts | None

    @property
    def name(self) -> str:
        """Name of the case."""
        return self.subject.name

    @property
    def part(self) -> str:
        """Part of the data set, such as "train"."""
        return self.subject.part


def check_set(cases: Sequence[Examined], collection: Collection) -> Iterator[Finding]:
    """Compare the cases of a set with each other."""
    yield from _duplicates(cases)
    yield from _equal_labels(cases)
    yield from _shared_slices(cases)
    yield from _patients(cases)
    yield from _outliers(cases)
    yield from _unused_labels(cases, collection)


def _duplicates(cases: Sequence[Examined]) -> Iterator[Finding]:
    for group in _groups(cases, lambda case: case.image.digest if case.image and _varies(case.image) else ""):
        names = tuple(case.name for case in group)
        labels = {case.label.digest if case.label else case.subject.label for case in group}
        repair = "duplicate" if len(labels) == 1 else ""
        but = "" if repair else ", but their labels differ"
        if _crosses(group):
            text = f"{_joined(group)} are the same image in different parts of the split{but}: scores would be biased."
            yield Finding("error", "leak", text, names, repair)
        else:
            yield Finding("warning", "duplicate", f"{_joined(group)} are the same image{but}.", names, repair)


def _equal_labels(cases: Sequence[Examined]) -> Iterator[Finding]:
    def key(case: Examined) -> str:
        return case.label.digest if case.label and len(case.label.labels) > 1 else ""

    for group in _groups(cases, key):
        if len({case.image.digest for case in group if case.image}) > 1:
            text = f"{_joined(group)} have different images but identical labels."
            yield Finding("warning", "identical labels", text, tuple(case.name for case in group))


def _shared_slices(cases: Sequence[Examined]) -> Iterator[Finding]:
    where: dict[bytes, list[tuple[int, int]]] = {}
    for index, case in enumerate(cases):
        for number, content in enumerate(case.image.slices if case.image else ()):
            if content is not None:
                where.setdefault(content, []).append((index, number))
    shared: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for places in where.values():
        if len(places) <= _COMMON_SLICE:
            for (first, a), (second, b) in combinations(places, 2):
                if first != second:
                    shared.setdefault((first, second), []).append((a, b))
    for (first, second), pairs in shared.items():
        finding = _shared(cases[first], cases[second], pairs)
        if finding is not None:
            yield finding


def _shared(one: Examined, other: Examined, pairs: Sequence[tuple[int, int]]) -> Finding | None:
    """Describe the overlap of two volumes; None if they are copies or share too few slices."""
    if one.image is None or other.image is None or one.image.digest == other.image.digest:
        return None
    if len(pairs) < min(_MIN_SLICES, len(one.image.slices), len(other.image.slices)):
        return None
    numbers = list(zip(*pairs, strict=True))
    spans = [f"{case.name} {min(run)}-{max(run)}" for case, run in zip((one, other), numbers, strict=True)]
    text = f"{_joined([one, other])} share {len(pairs)} slices ({spans[0]}, {spans[1]}, counted from the feet, from 0)"
    first = pairs[0]
    apart = float(np.linalg.norm(one.image.slice_position(first[0]) - other.image.slice_position(first[1])))
    if apart > min(one.image.spacing) / 2:
        text += f", which are {apart:.4g} mm apart by their affines: at least one affine is wrong"
    crosses = _crosses([one, other])
    if crosses:
        text += ", and are in different parts of the split"
    return Finding(
        "error" if crosses else "warning", "leak" if crosses else "duplicate", f"{text}.", (one.name, other.name)
    )


def _patients(cases: Sequence[Examined]) -> Iterator[Finding]:
    known = _groups(cases, lambda case: case.image.patient if case.image else "")
    for group in known:
        if _crosses(group):
            text = f"{_joined(group)} have the same DICOM PatientID but are in different parts of the split."
            yield Finding("error", "patient", text, tuple(case.name for case in group))
    for group in _groups(cases, lambda case: patient_of(case.name)):
        if _crosses(group):
            text = f"{_joined(group)} are the same patient by their names but are in different parts of the split."
            yield Finding("warning", "patient", text, tuple(case.name for case in group))


def _outliers(cases: Sequence[Examined]) -> Iterator[Finding]:
    """Find volumes whose spacing or extent deviates from the median by 5 robust SDs and by a factor of 2 or 3."""
    volumes = [
        (case, case.image) for case in cases if case.image and len(case.image.shape) == 3 and case.image.has_geometry
    ]
    if len(volumes) < _MIN_CASES:
        return
    spacings = np.log([np.sort(facts.spacing) for _, facts in volumes])
    extents = np.log([np.sort(np.multiply(facts.shape, facts.spacing)) for _, facts in volumes])
    for values, what, factor in ((spacings, "spacing", 2.0), (extents, "extent", 3.0)):
        middle = np.median(values, axis=0)
        deviation = np.median(np.abs(values - middle), axis=0)
        limit = np.maximum(_DEVIATIONS * deviation, np.log(factor))
        for (case, _), row in zip(volumes, values, strict=True):
            if (np.abs(row - middle) > limit).any():
                an = "an" if what == "extent" else "a"
                theirs, usual = (" x ".join(f"{value:.3g}" for value in np.exp(item)) for item in (row, middle))
                text = (
                    f"{case.name} has {an} {what} of {theirs} mm (sorted), while the median of the set is {usual} mm."
                )
                yield Finding("warning", f"unusual {what}", text, (case.name,))
    counts = Counter(facts.orientation for _, facts in volumes)
    usual, count = counts.most_common(1)[0]
    odd = tuple(case.name for case, facts in volumes if facts.orientation != usual)
    if odd and count >= _MANY * len(volumes):
        yield Finding(
            "note", "unusual orientation", f"{len(odd)} of {len(volumes)} volumes are not stored in {usual}.", odd
        )


def _unused_labels(cases: Sequence[Examined], collection: Collection) -> Iterator[Finding]:
    labeled = [case.label for case in cases if case.label]
    if not labeled:
        return
    found = {value for label in labeled for value in label.labels}
    unused = [f"{value} ({name})" for value, name in collection.labels.items() if value not in found and value != 0]
    if unused:
        yield Finding("note", "unused label", f"No case contains the label {', '.join(unused)}.")


def _groups(cases: Sequence[Examined], key: Callable[[Examined], str]) -> list[list[Examined]]:
    """Return the groups of two or more cases with the same, non-empty key."""
    groups: dict[str, list[Examined]] = {}
    for case in cases:
        if key(case):
            groups.setdefault(key(case), []).append(case)
    return [group for group in groups.values() if len(group) > 1]


def _crosses(group: Sequence[Examined]) -> bool:
    return len({case.part for case in group if case.part}) > 1


def _joined(group: Sequence[Examined]) -> str:
    return ", ".join(f"{case.name} ({case.part})" if case.part else case.name for case in group)


def _varies(facts: FileFacts) -> bool:
    return facts.minimum < facts.maximum
