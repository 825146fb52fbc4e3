"""Check how images and labels are read, and what is wrong with them, before training or prediction."""

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

# Distances in voxels: up to the first, two headers are equal; up to the second, they are equal but for rounding.
_EQUAL = 1e-3
_ROUNDED = 0.1
_STRETCHED = 0.01
_THICK = 20.0
_THIN = 0.05
_UNEVEN = 20.0
_PADDING = (-3024, -2048, -2000)
_ON_MINIMUM = 0.5
_SHOWN = 5
# Warnings of the readers that a finding with a repair replaces.
_REPAIRABLE = ("sform-qform-conflict",)


@dataclass(frozen=True)
class Change:
    """One change of one file in a repaired copy.

    Attributes:
        file: Path of the file, relative to the data set.
        what: Description of the change.
        before: State before the change.
        after: State after the change.
    """

    file: str
    what: str
    before: str
    after: str


@dataclass(frozen=True)
class Findings:
    """Result of a check of images and labels.

    Attributes:
        collection: Cases that were checked.
        cases: Properties of each image and label; None for a file that could not be read.
        findings: Faults and suspicious content, errors first.
        changes: Changes in the repaired copy; empty without one.
        repaired: Findings of the repaired copy; None without one.
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
        """Exit code of the command: 1 if there are errors, in the repaired copy if one was made; otherwise 0."""
        return 1 if (self.repaired or self).errors else 0

    def __str__(self) -> str:
        counts = Counter(finding.severity for finding in self.findings)
        lines = [f"{len(self.cases)} cases, {counts['error']} errors, {counts['warning']} warnings"]
        lines += [f"{finding.severity}: {finding.kind}: {finding.message}" for finding in self.findings]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return cases and findings as JSON values, without hashes of patient IDs."""
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
    """Open and check every image and label at a path.

    Args:
        path: Image, folder or data set, as for `find_subjects`.
        needs: Requirements of a bundle to check the data against; None for general checks only.
        report: Called with the number of cases checked, the number of all cases, and the name of the next case.

    Raises:
        RequestError: No images at `path`.
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
    """Describe the difference between the geometries of a label and its image.

    Returns:
        Kind of mismatch, description, and repair; all empty for equal geometries. A label of the image's shape but
        another geometry is not repaired, because either its header or its voxels may be wrong. A label of another
        shape, or with the same voxel centers in another order, can be resampled.
    """
    facts = label.facts
    if not (facts.has_geometry and image.has_geometry):
        if facts.shape == image.shape:
            return "", "", ""
        return "shape", f"the label has {_size(facts)}, the image {_size(image)}", ""
    step = min(image.grid.spacing)
    if facts.shape == image.shape:
        distance = corner_distance(facts.grid, image.grid)
        if distance <= _EQUAL * step:
            return "", "", ""
        if distance <= _ROUNDED * step:
            return (
                "rounded header",
                f"the label's affine is rounded and deviates by {distance:.2g} mm at a corner",
                "header",
            )
    if _same_points(facts.grid, image.grid, step):
        axes = f"{facts.orientation} instead of {image.orientation}"
        return "reoriented", f"the label's axes are stored in another order or direction ({axes})", "resample"
    if facts.shape == image.shape:
        return _moved(facts, image)
    if len(facts.shape) != 3 or len(image.shape) != 3:
        return "shape", f"the label has {_size(facts)}, the image {_size(image)}", ""
    inside = foreground_inside(label.array, facts.grid, image.grid)
    text = (
        f"the label has {facts.grid.describe()}, the image {image.grid.describe()}; {inside:.1%} of the label's "
        "foreground is inside the image"
    )
    return "shape", text, "resample" if inside >= 1 else ""


def _moved(label: FileFacts, image: FileFacts) -> tuple[str, str, str]:
    """Describe the mismatch of a label with the image's shape but another geometry."""
    ours, theirs = label.grid.affine, image.grid.affine
    step = min(image.grid.spacing)
    far = np.abs((ours - theirs)[:3, :3] * (np.array(image.shape) - 1)).max() if len(image.shape) == 3 else 0.0
    if far <= _ROUNDED * step:
        shift = ours[:3, 3] - theirs[:3, 3]
        voxels = np.linalg.solve(theirs[:3, :3], shift)
        return "shifted", f"the label is shifted by {_numbers(shift)} mm, {_numbers(voxels)} voxels", ""
    if label.orientation != image.orientation:
        return "flipped", f"the label is flipped or reoriented: {label.orientation} instead of {image.orientation}", ""
    apart = corner_distance(label.grid, image.grid)
    return (
        "affine",
        f"the affines differ in spacing or rotation (label {label.grid.describe()}; image {image.grid.describe()}), by "
        f"{apart:.3g} mm at a corner",
        "",
    )


def _same_points(a: Grid, b: Grid, step: float) -> bool:
    """Return whether two grids have the same voxel centers, in any order of axes and directions."""
    if sorted(a.shape) != sorted(b.shape) or len(a.shape) != 3:
        return False
    move = np.linalg.solve(b.affine, a.affine)
    rotation = np.rint(move[:3, :3])
    if not (np.abs(rotation).sum(axis=0) == 1).all() or not (np.abs(rotation).sum(axis=1) == 1).all():
        return False
    if not np.array_equal(np.abs(rotation) @ np.array(a.shape), np.array(b.shape)):
        return False
    offset = np.where(rotation.sum(axis=1) < 0, np.array(b.shape) - 1, 0)
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = rotation, offset
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
        except MedsegError as error:  # even a missing package, which other files may not need
            opened, findings = None, [Finding("error", "unreadable", collection.shortened(str(error)), (name,))]
    others = [warning for warning in warnings if warning.code not in _REPAIRABLE]
    return opened, findings + [Finding("warning", warning.code, f"{warning}.", (name,)) for warning in others]


def _channel_findings(subject: Subject, facts: FileFacts, listed: int | None) -> Iterator[Finding]:
    """Compare the number of channels of a volume with that in `dataset.json`, or with one."""
    if not facts.has_geometry or facts.channels == (listed or 1):
        return
    text = f"{facts.file} has {facts.channels} channels"
    if listed is not None:
        yield Finding("error", "channels", f"{text}, but dataset.json names {listed}.", (subject.name,))
    else:
        text += "; it can only be used with a bundle of as many channels"
        yield Finding("warning", "multiple channels", f"{text}.", (subject.name,))


def _image_findings(subject: Subject, image: Opened, modality: str) -> Iterator[Finding]:
    facts, here = image.facts, (subject.name,)
    if facts.nonfinite:
        yield Finding(
            "error",
            "non-finite values",
            f"{facts.file} contains {facts.nonfinite:,} non-finite values (NaN or Inf); replace them with a background "
            "value.",
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
            f"The sform and qform of {facts.file} differ by up to {header.apart:.3g} mm; medseg uses the sform, other "
            "programs may use the qform.",
            here,
            "qform",
        )
    if header.stretch > _STRETCHED:
        yield Finding(
            "warning",
            "sform and pixdim",
            f"The pixdim of {facts.file} differs from the voxel size of its sform by {header.stretch:.1%}; medseg uses "
            "the sform, ITK and programs based on it use the pixdim.",
            here,
            "pixdim",
        )
    if len(header.shape) > 3 and all(size == 1 for size in header.shape[3:]):
        text = f"{facts.file} has singleton dimensions: its shape is {header.shape}"
        yield Finding("note", "singleton dimension", f"{text}.", here, "squeeze")


def _spacing_findings(facts: FileFacts, here: tuple[str, ...], modality: str) -> Iterator[Finding]:
    low, high = min(facts.spacing), max(facts.spacing)
    shown = " x ".join(f"{step:.4g}" for step in facts.spacing)
    if low < _THIN or high > _THICK or high / low > _UNEVEN:
        yield Finding(
            "warning", "implausible spacing", f"{facts.file} has voxels of {shown} mm; check the units.", here
        )
    linear = facts.grid.affine[:3, :3]
    if modality.upper() == "CT" and np.array_equal(np.abs(linear), np.eye(3)):
        text = f"{facts.file} is a CT with an identity affine (voxels of exactly 1 mm), which scanners do not produce"
        yield Finding("warning", "suspicious affine", f"{text}: it was resampled, or its geometry was lost.", here)


def _ct_findings(image: Opened, here: tuple[str, ...]) -> Iterator[Finding]:
    facts = image.facts
    if facts.minimum in _PADDING:
        share = float(np.mean([(channel == facts.minimum).mean() for channel in image.array]))
        yield Finding(
            "note", "padding value", f"{share:.1%} of {facts.file} is the padding value {facts.minimum:g}.", here
        )
    elif facts.minimum < -1500 or facts.maximum > 35000:
        text = f"{facts.file} has values from {facts.minimum:g} to {facts.maximum:g}, which are not Hounsfield units"
        yield Finding("warning", "not Hounsfield units", f"{text}.", here)
    if facts.minimum >= 0 and facts.maximum > facts.minimum:
        reason = "8-bit gray values" if facts.maximum <= 255 else "the intercept of -1024 may not have been applied"
        text = f"{facts.file} is a CT without negative values ({facts.minimum:g} to {facts.maximum:g})"
        yield Finding("warning", "not Hounsfield units", f"{text}: {reason}.", here)


def _label_findings(
    subject: Subject, facts: FileFacts, collection: Collection, needs: Needs | None
) -> Iterator[Finding]:
    here, values = (subject.name,), facts.labels
    if set(values) == {0}:
        yield Finding("warning", "empty mask", f"{facts.file} has no foreground.", here)
    elif 0 not in values and len(values) == 1:
        yield Finding(
            "warning", "full mask", f"Every voxel of {facts.file} is {next(iter(values))}; it has no background.", here
        )
    if min(values, default=0) < 0:
        yield Finding(
            "error",
            "negative label",
            f"{facts.file} contains the label value {min(values)}; expected values from 0 up.",
            here,
        )
    if facts.header is not None and facts.header.dtype.startswith(("float", ">f", "<f")):
        yield Finding("note", "floating-point label", f"{facts.file} stores labels as {facts.dtype}.", here, "integers")
    # In a DICOM segmentation, voxels outside all segments are background even where no name is given for 0.
    implied = {0} if facts.format == "dicom" else set()
    known = {"dataset.json": frozenset(collection.labels) | implied if collection.labels else None}
    if needs is not None:
        known[f"the mapping of {needs.name}"] = needs.labels
    for source, names in known.items():
        unknown = [value for value in values if names is not None and value not in names]
        if unknown:
            text = f"{facts.file} contains the label value {_listed(unknown)}, which is missing in {source}"
            yield Finding("error", "unknown label", f"{text}.", here)
    yield from _header_findings(subject, facts)


def _pair_findings(subject: Subject, image: Opened, label: Opened) -> Iterator[Finding]:
    here = (subject.name,)
    kind, text, repair = compare_grids(label, image.facts)
    if kind == "rounded header":
        yield Finding("note", kind, f"{subject.name}: {text}.", here, repair)
    elif kind:
        yield Finding("error", f"geometry mismatch: {kind}", f"{subject.name}: {text}.", here, repair)
    if image.array.shape[1:] == label.array.shape and image.facts.minimum < image.facts.maximum:
        share = share_on_minimum(image.array, label.array)
        if share >= _ON_MINIMUM:
            text = (
                f"{share:.0%} of the label's foreground is on voxels with the image's minimum, {image.facts.minimum:g}"
            )
            yield Finding("warning", "label on padding", f"{subject.name}: {text}: padding or air.", here)


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
