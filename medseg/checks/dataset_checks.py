"""What is wrong with a set as a whole: copies, patients on both sides of the split, cases unlike the others.

Copies are told by their voxels, turned to RAS, so storing them otherwise does not hide them; parts of a volume by
axial slices that are equal bit for bit; a patient by DICOM PatientID and by names (see `medseg.io.patients`).
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
    """One case that was opened.

    Attributes:
        subject: the case.
        image: what its image holds; None where it could not be read.
        label: what its label holds; None where there is none, or it could not be read.
    """

    subject: Subject
    image: FileFacts | None
    label: FileFacts | None

    @property
    def name(self) -> str:
        """Its name."""
        return self.subject.name

    @property
    def part(self) -> str:
        """Its part of the data set."""
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
        but = "" if repair else "; their labels differ"
        if _crosses(group):
            text = f"{_joined(group)} are one image on both sides of the split{but}: the score would be wrong."
            yield Finding("error", "leak", text, names, repair)
        else:
            yield Finding("warning", "duplicate", f"{_joined(group)} are one image{but}.", names, repair)


def _equal_labels(cases: Sequence[Examined]) -> Iterator[Finding]:
    def key(case: Examined) -> str:
        return case.label.digest if case.label and len(case.label.labels) > 1 else ""

    for group in _groups(cases, key):
        if len({case.image.digest for case in group if case.image}) > 1:
            text = f"{_joined(group)} have other images but one label."
            yield Finding("warning", "one label twice", text, tuple(case.name for case in group))


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
    """Describe what two volumes share, unless they are copies or share next to nothing."""
    if one.image is None or other.image is None or one.image.digest == other.image.digest:
        return None
    if len(pairs) < min(_MIN_SLICES, len(one.image.slices), len(other.image.slices)):
        return None
    numbers = list(zip(*pairs, strict=True))
    spans = [f"{case.name} {min(run)}-{max(run)}" for case, run in zip((one, other), numbers, strict=True)]
    text = f"{_joined([one, other])} share {len(pairs)} slices ({spans[0]}, {spans[1]}, from the feet, from 0)"
    first = pairs[0]
    apart = float(np.linalg.norm(one.image.slice_position(first[0]) - other.image.slice_position(first[1])))
    if apart > min(one.image.spacing) / 2:
        text += f", which their affines place {apart:.4g} mm apart: at least one affine is wrong"
    crosses = _crosses([one, other])
    if crosses:
        text += ", and stand on both sides of the split"
    return Finding(
        "error" if crosses else "warning", "leak" if crosses else "duplicate", f"{text}.", (one.name, other.name)
    )


def _patients(cases: Sequence[Examined]) -> Iterator[Finding]:
    known = _groups(cases, lambda case: case.image.patient if case.image else "")
    for group in known:
        if _crosses(group):
            text = f"{_joined(group)} have one DICOM PatientID and stand on both sides of the split."
            yield Finding("error", "patient", text, tuple(case.name for case in group))
    for group in _groups(cases, lambda case: patient_of(case.name)):
        if _crosses(group):
            text = f"{_joined(group)} are one patient by their names and stand on both sides of the split."
            yield Finding("warning", "patient", text, tuple(case.name for case in group))


def _outliers(cases: Sequence[Examined]) -> Iterator[Finding]:
    """Volumes whose grid lies beyond five deviations, and beyond a factor, of the set's median."""
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
                theirs, usual = (" x ".join(f"{value:.3g}" for value in np.exp(item)) for item in (row, middle))
                text = f"{case.name} has the {what} {theirs} mm (sorted), the set {usual} mm."
                yield Finding("warning", f"unusual {what}", text, (case.name,))
    counts = Counter(facts.orientation for _, facts in volumes)
    usual, count = counts.most_common(1)[0]
    odd = tuple(case.name for case, facts in volumes if facts.orientation != usual)
    if odd and count >= _MANY * len(volumes):
        yield Finding("note", "unusual orientation", f"{len(odd)} of {len(volumes)} are not {usual}.", odd)


def _unused_labels(cases: Sequence[Examined], collection: Collection) -> Iterator[Finding]:
    labeled = [case.label for case in cases if case.label]
    if not labeled:
        return
    found = {value for label in labeled for value in label.labels}
    unused = [f"{value} ({name})" for value, name in collection.labels.items() if value not in found and value != 0]
    if unused:
        yield Finding("note", "unused label", f"No case holds the label {', '.join(unused)}.")


def _groups(cases: Sequence[Examined], key: Callable[[Examined], str]) -> list[list[Examined]]:
    """Return the cases that share a key, an empty one apart, where there are several."""
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
