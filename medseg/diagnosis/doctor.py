"""What a set of images and labels would be read as, and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.checks.dataset_checks import Examined, check_set
from medseg.checks.subjects import Collection, Finding, Subject, find_subjects
from medseg.checks.suitability import Needs, check_case, check_suitability
from medseg.errors import MedsegError
from medseg.io.geometry import Grid, corner_distance
from medseg.io.names import StrPath
from medseg.io.survey import FileFacts, Opened, foreground_inside, open_image, open_label, share_on_minimum
from medseg.notices import collect

if TYPE_CHECKING:
    from medseg.types import Progress

__all__ = ["Change", "Findings", "compare_grids", "examine"]

# In voxels: below the first, headers are equal but for rounding in the last place; below the second, for rounding.
_EQUAL = 1e-3
_ROUNDED = 0.1
_STRETCHED = 0.01
_THICK = 20.0
_THIN = 0.05
_UNEVEN = 20.0
_PADDING = (-3024, -2048, -2000)
_ON_MINIMUM = 0.5
_SHOWN = 5
# Warnings of reading that a finding below tells with a repair.
_REPAIRABLE = ("sform-qform-conflict",)


@dataclass(frozen=True)
class Change:
    """One change of one file in a repaired copy.

    Attributes:
        file: Name, relative to the data set.
        what: What was done.
        before: State before.
        after: State now.
    """

    file: str
    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Findings:
    """Result of an examination.

    Attributes:
        collection: What was examined.
        cases: Content of each file; without an image or label where that could not be read.
        findings: What is wrong or suspicious, errors first.
        changes: How a repaired copy differs from the original; empty where none was made.
        repaired: Findings of the repaired copy; None where none was made.
    """

    collection: Collection
    cases: tuple[Examined, ...]
    findings: tuple[Finding, ...]
    changes: tuple[Change, ...] = ()
    repaired: Findings | None = None

    @property
    def errors(self) -> int:
        """Number of findings that are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """What the command returns: 1 if errors remain, in the repaired copy where there is one."""
        return 1 if (self.repaired or self).errors else 0

    def __str__(self) -> str:
        counts = Counter(finding.severity for finding in self.findings)
        lines = [f"{len(self.cases)} cases, {counts['error']} errors, {counts['warning']} warnings"]
        lines += [f"{finding.severity}: {finding.kind}: {finding.message}" for finding in self.findings]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return cases and findings as JSON values; no hash of a patient is among them."""
        return {
            "cases": [
                {
                    "name": case.subject.name,
                    "part": case.subject.part,
                    "image": _facts_json(case.image),
                    "label": _facts_json(case.label),
                }
                for case in self.cases
            ],
            "findings": [asdict(finding) for finding in self.findings],
        }


def examine(path: StrPath, *, needs: Needs | None = None, report: Progress | None = None) -> Findings:
    """Open every image and label at a path, and say what they hold and what is wrong.

    Args:
        path: as for `find_subjects`.
        needs: what a bundle asks for, to have that checked as well.
        report: called with cases done, cases in all, and the name of the next.

    Raises:
        RequestError: there is nothing to examine.
    """
    collection = find_subjects(path)
    cases, findings = [], list(collection.findings)
    for number, subject in enumerate(collection.subjects):
        if report is not None:
            report(number, len(collection.subjects), subject.name)
        examined, found = _examine_case(subject, collection, needs)
        cases.append(examined)
        findings += found
    if report is not None:
        report(len(cases), len(cases), "comparing")
    findings += check_set(cases, collection)
    if needs is not None:
        findings += check_suitability(cases, collection, needs)
    order = {"error": 0, "warning": 1, "note": 2}
    return Findings(
        collection, tuple(cases), tuple(sorted(findings, key=lambda item: (order[item.severity], item.kind)))
    )


def compare_grids(label: Opened, image: FileFacts) -> tuple[str, str, str]:
    """Say how a label's grid differs from its image's.

    Returns:
        Kind of difference, description, and the repair that is no guess; all empty for equal grids. Where a label of
        the image's shape lies elsewhere, either the place or the voxels may be wrong, and nothing is repaired. Where
        the shapes differ, or both grids are the same points in another order, the headers can only be meant as they
        are.
    """
    facts = label.facts
    if not (facts.has_geometry and image.has_geometry):
        if facts.shape == image.shape:
            return "", "", ""
        return "other shape", f"the label has {_size(facts)}, the image {_size(image)}", ""
    step = min(image.grid.spacing)
    if facts.shape == image.shape:
        distance = corner_distance(facts.grid, image.grid)
        if distance <= _EQUAL * step:
            return "", "", ""
        if distance <= _ROUNDED * step:
            return "rounded header", f"the label's header is rounded: {distance:.2g} mm off at a corner", "header"
    if _same_points(facts.grid, image.grid, step):
        axes = f"{facts.orientation} instead of {image.orientation}"
        return "turned", f"the label's axes are stored in another order or direction ({axes})", "resample"
    if facts.shape == image.shape:
        return _moved(facts, image)
    if len(facts.shape) != 3 or len(image.shape) != 3:
        return "other shape", f"the label has {_size(facts)}, the image {_size(image)}", ""
    inside = foreground_inside(label.array, facts.grid, image.grid)
    text = (
        f"the label has {facts.grid.describe()}, the image {image.grid.describe()}; {inside:.1%} of the label's "
        "foreground lies within the image"
    )
    return "other shape", text, "resample" if inside >= 1 else ""


def _moved(label: FileFacts, image: FileFacts) -> tuple[str, str, str]:
    """Describe a label of the image's shape that lies elsewhere."""
    ours, theirs = label.grid.affine, image.grid.affine
    step = min(image.grid.spacing)
    far = np.abs((ours - theirs)[:3, :3] * (np.array(image.shape) - 1)).max() if len(image.shape) == 3 else 0.0
    if far <= _ROUNDED * step:
        shift = ours[:3, 3] - theirs[:3, 3]
        voxels = np.linalg.solve(theirs[:3, :3], shift)
        return "shifted", f"the label is shifted by {_numbers(shift)} mm, {_numbers(voxels)} voxels", ""
    if label.orientation != image.orientation:
        return "flipped", f"the label is flipped or turned: {label.orientation} instead of {image.orientation}", ""
    apart = corner_distance(label.grid, image.grid)
    return (
        "other place",
        f"the grids differ in spacing or angle ({label.grid.describe()}; {image.grid.describe()}), by {apart:.3g} mm "
        "at a corner",
        "",
    )


def _same_points(a: Grid, b: Grid, step: float) -> bool:
    """Tell whether two grids have the same voxel centers, in whatever order."""
    if sorted(a.shape) != sorted(b.shape) or len(a.shape) != 3:
        return False
    move = np.linalg.solve(b.affine, a.affine)
    turn = np.rint(move[:3, :3])
    if not (np.abs(turn).sum(axis=0) == 1).all() or not (np.abs(turn).sum(axis=1) == 1).all():
        return False
    if not np.array_equal(np.abs(turn) @ np.array(a.shape), np.array(b.shape)):
        return False
    offset = np.where(turn.sum(axis=1) < 0, np.array(b.shape) - 1, 0)
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = turn, offset
    return corner_distance(Grid(a.shape, b.affine @ exact), a) <= _ROUNDED * step


def _examine_case(subject: Subject, collection: Collection, needs: Needs | None) -> tuple[Examined, list[Finding]]:
    image, findings = _open(subject.name, collection, lambda: _open_image(subject, collection))
    label: Opened | None = None
    if subject.label is not None:
        label, found = _open(subject.name, collection, lambda: _open_label(subject, collection, needs))
        findings += found
    if image is not None:
        modality = (needs.modality if needs else "") or image.facts.modality or collection.modality
        findings += _image_findings(subject, image, modality)
        if needs is None:
            findings += _channel_findings(subject, image.facts, collection.channels)
        else:
            findings += check_case(subject, collection, image.facts, needs)
    if label is not None:
        findings += _label_findings(subject, label.facts, collection, needs)
    if image is not None and label is not None:
        findings += _pair_findings(subject, image, label)
    return Examined(subject, image.facts if image else None, label.facts if label else None), findings


def _open_image(subject: Subject, collection: Collection) -> Opened:
    return open_image(subject.image, collection.relative(subject.image))


def _open_label(subject: Subject, collection: Collection, needs: Needs | None) -> Opened:
    path = str(subject.label)
    options = {"names": needs.label_names if needs else {}, **collection.label_options}
    return open_label(path, collection.relative(path), like=subject.image, options=options)


def _open(name: str, collection: Collection, opener: Callable[[], Opened]) -> tuple[Opened | None, list[Finding]]:
    with collect(deferred=True) as warnings:
        try:
            opened, findings = opener(), []
        except MedsegError as error:  # also a package that is not installed: the others may be read without it
            opened, findings = None, [Finding("error", "not read", collection.shortened(str(error)), (name,))]
    told = [warning for warning in warnings if warning.code not in _REPAIRABLE]
    return opened, findings + [Finding("warning", warning.code, f"{warning}.", (name,)) for warning in told]


def _channel_findings(subject: Subject, facts: FileFacts, listed: int | None) -> Iterator[Finding]:
    """Compare the values per voxel of a volume with what `dataset.json` says, or with one."""
    if not facts.has_geometry or facts.channels == (listed or 1):
        return
    text = f"{facts.file} has {facts.channels} values per voxel"
    if listed is not None:
        yield Finding("error", "channels", f"{text}, dataset.json names {listed}.", (subject.name,))
    else:
        text += "; only a bundle of as many channels reads it"
        yield Finding("warning", "several channels", f"{text}.", (subject.name,))


def _image_findings(subject: Subject, image: Opened, modality: str) -> Iterator[Finding]:
    facts, here = image.facts, (subject.name,)
    if facts.nonfinite:
        yield Finding(
            "error",
            "no numbers",
            f"{facts.nonfinite:,} values of {facts.file} are NaN or infinite; replace them by a background value.",
            here,
            "nan" if facts.header is not None and facts.channels == 1 else "",
        )
    if facts.minimum == facts.maximum:
        yield Finding("warning", "constant image", f"Every voxel of {facts.file} is {facts.minimum:g}.", here)
    yield from _header_findings(subject, facts)
    if facts.has_geometry and len(facts.shape) == 3:
        yield from _spacing_findings(facts, here, modality)
    if modality.upper() == "CT":
        yield from _ct_findings(image, here)


def _header_findings(subject: Subject, facts: FileFacts) -> Iterator[Finding]:
    header, here = facts.header, (subject.name,)
    if header is None:
        return
    if header.apart > _ROUNDED * header.step:
        yield Finding(
            "warning",
            "sform and qform",
            f"The sform and qform of {facts.file} lie up to {header.apart:.3g} mm apart; medseg takes the sform, other "
            "programs may take the qform.",
            here,
            "qform",
        )
    if header.stretch > _STRETCHED:
        yield Finding(
            "warning",
            "sform and pixdim",
            f"The pixdim of {facts.file} differs from the voxel size of its sform by {header.stretch:.1%}; medseg "
            "takes the sform, ITK and what is built on it take the pixdim.",
            here,
            "pixdim",
        )
    if len(header.shape) > 3 and all(size == 1 for size in header.shape[3:]):
        yield Finding("note", "extra axis", f"{facts.file} has axes of length 1: {header.shape}.", here, "squeeze")


def _spacing_findings(facts: FileFacts, here: tuple[str, ...], modality: str) -> Iterator[Finding]:
    low, high = min(facts.spacing), max(facts.spacing)
    shown = " x ".join(f"{step:.4g}" for step in facts.spacing)
    if low < _THIN or high > _THICK or high / low > _UNEVEN:
        yield Finding("warning", "odd spacing", f"{facts.file} has voxels of {shown} mm; check the units.", here)
    linear = facts.grid.affine[:3, :3]
    if modality.upper() == "CT" and np.array_equal(np.abs(linear), np.eye(3)):
        text = f"{facts.file} is CT with voxels of exactly 1 mm along the axes, which scanners do not make"
        yield Finding("warning", "made-up header", f"{text}: resampled, or the spacing was lost.", here)


def _ct_findings(image: Opened, here: tuple[str, ...]) -> Iterator[Finding]:
    facts = image.facts
    if facts.minimum in _PADDING:
        share = float(np.mean([(channel == facts.minimum).mean() for channel in image.array]))
        yield Finding("note", "padding", f"{share:.1%} of {facts.file} is the padding value {facts.minimum:g}.", here)
    elif facts.minimum < -1500 or facts.maximum > 35000:
        text = f"{facts.file} reaches from {facts.minimum:g} to {facts.maximum:g}, which are no Hounsfield units"
        yield Finding("warning", "no Hounsfield units", f"{text}.", here)
    if facts.minimum >= 0 and facts.maximum > facts.minimum:
        reason = "8-bit grey values" if facts.maximum <= 255 else "the offset of -1024 was perhaps not applied"
        text = f"{facts.file} is CT without negative values ({facts.minimum:g} to {facts.maximum:g})"
        yield Finding("warning", "no Hounsfield units", f"{text}: {reason}.", here)


def _label_findings(
    subject: Subject, facts: FileFacts, collection: Collection, needs: Needs | None
) -> Iterator[Finding]:
    here, values = (subject.name,), facts.labels
    if set(values) == {0}:
        yield Finding("warning", "empty mask", f"{facts.file} marks nothing.", here)
    elif 0 not in values and len(values) == 1:
        yield Finding("warning", "full mask", f"Every voxel of {facts.file} is {next(iter(values))}.", here)
    if min(values, default=0) < 0:
        yield Finding("error", "negative label", f"{facts.file} holds the label {min(values)}.", here)
    if facts.header is not None and facts.header.dtype.startswith(("float", ">f", "<f")):
        yield Finding("note", "label as float", f"{facts.file} stores labels as {facts.dtype}.", here, "integers")
    # In an object of segments what no segment covers is background, whether a name is given for it or not.
    implied = {0} if facts.format == "dicom" else set()
    known = {"dataset.json": frozenset(collection.labels) | implied if collection.labels else None}
    if needs is not None:
        known[f"the mapping of {needs.name}"] = needs.labels
    for source, names in known.items():
        unknown = [value for value in values if names is not None and value not in names]
        if unknown:
            text = f"{facts.file} holds the label {_listed(unknown)}, which {source} does not name"
            yield Finding("error", "unknown label", f"{text}.", here)
    yield from _header_findings(subject, facts)


def _pair_findings(subject: Subject, image: Opened, label: Opened) -> Iterator[Finding]:
    here = (subject.name,)
    kind, text, repair = compare_grids(label, image.facts)
    if kind == "rounded header":
        yield Finding("note", kind, f"{subject.name}: {text}.", here, repair)
    elif kind:
        yield Finding("error", f"grids: {kind}", f"{subject.name}: {text}.", here, repair)
    if image.array.shape[1:] == label.array.shape and image.facts.minimum < image.facts.maximum:
        share = share_on_minimum(image.array, label.array)
        if share >= _ON_MINIMUM:
            text = f"{share:.0%} of the label lies where the image is at its minimum, {image.facts.minimum:g}"
            yield Finding("warning", "label on nothing", f"{subject.name}: {text}; it marks padding or air.", here)


def _facts_json(facts: FileFacts | None) -> dict[str, Any] | None:
    if facts is None:
        return None
    names = ("file", "format", "shape", "channels", "spacing", "orientation", "dtype", "minimum", "percentiles")
    more = ("maximum", "nonfinite", "modality", "digest")
    content = {name: getattr(facts, name) for name in (*names, *more)}
    affine = facts.grid.affine.tolist() if facts.has_geometry else None
    return {**content, "affine": affine, "labels": {str(value): count for value, count in facts.labels.items()}}


def _size(facts: FileFacts) -> str:
    return " x ".join(str(size) for size in facts.shape) + " voxels"


def _numbers(values: NDArray[np.floating[Any]]) -> str:
    return "(" + ", ".join(f"{value + 0.0:.4g}" for value in np.round(values, 4)) + ")"


def _listed(values: Sequence[int]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(str(value) for value in values[:_SHOWN]) + more
