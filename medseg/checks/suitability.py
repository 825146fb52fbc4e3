"""Compatibility of images and labels with a bundle: dimensions, channels, label values and names, spacing, intensities.

Data that the bundle would refuse, or whose classes it would mix up, are errors. Data that it accepts but was not made
for get warnings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from medseg.checks.dataset_checks import Examined
from medseg.checks.subjects import Collection, Finding, Subject
from medseg.errors import CaseError
from medseg.io.survey import FileFacts, open_image

__all__ = ["Needs", "check_case", "check_suitability"]

# Ratios of an image's spacing to the bundle's: above the first, detail is missing; below 1 / the second, it is lost.
_COARSER = 2.0
_FINER = 3.0
_OPPOSITE = {"L": "R", "P": "A", "I": "S"}
_OTHER = "other"
_SHOWN = 5


@dataclass(frozen=True)
class Needs:
    """Requirements of a bundle on its data.

    Attributes:
        name: Name of the bundle.
        spatial_dims: Number of spatial dimensions, 2 or 3.
        channels: Number of channels.
        mapping: Class index by label value as text, where "other" stands for all values without an entry; None if
            unknown.
        modality: Modality, such as "CT"; empty if unknown.
        label_names: Label value by name of a segment or region, for DICOM labels of a set without names.
        classes: Names of the foreground classes by index.
        spacing: Spacing of the model's input in mm; None for 2D images, and if unknown.
        orientation: Axis codes of the model's input.
        intensity_range: Range of intensities that are not clipped, such as a window in HU; None if images are
            standardized.
    """

    name: str
    spatial_dims: int
    channels: int
    mapping: Mapping[str, int] | None
    modality: str
    label_names: Mapping[str, int] = field(default_factory=dict)
    classes: Mapping[int, str] = field(default_factory=dict)
    spacing: tuple[float, ...] | None = None
    orientation: str = "RAS"
    intensity_range: tuple[float, float] | None = None

    @property
    def labels(self) -> frozenset[int] | None:
        """Label values in the mapping; None if the bundle accepts any value."""
        if self.mapping is None or _OTHER in self.mapping:
            return None
        return frozenset(int(value) for value in self.mapping)

    def class_of(self, value: int) -> int | None:
        """Return the class index of a label value; None if the mapping lacks it."""
        mapping = self.mapping or {}
        return mapping.get(str(value), mapping.get(_OTHER))


def check_case(subject: Subject, collection: Collection, facts: FileFacts, needs: Needs) -> Iterator[Finding]:
    """Check whether a bundle can read an image and is made for images of its kind."""
    here = (subject.name,)
    if len(facts.shape) != needs.spatial_dims or facts.channels != needs.channels:
        try:
            open_image(subject.image, facts.file, spatial_dims=needs.spatial_dims, channels=needs.channels)
        except CaseError as error:
            text = f"Incompatible with bundle {needs.name}: {collection.shortened(str(error))}"
            yield Finding("error", "incompatible image", text, here)
            return
    yield from _spacing(facts, here, needs)
    yield from _values(facts, here, needs)
    ours, theirs = _family(needs.modality), _family(facts.modality)
    if ours and theirs and ours != theirs:
        text = f"{facts.file} is {facts.modality}, but {needs.name} is made for {needs.modality}"
        yield Finding("error", "modality mismatch", f"{text}.", here)


def check_suitability(cases: Sequence[Examined], collection: Collection, needs: Needs) -> Iterator[Finding]:
    """Compare the `dataset.json` and the labels of a set with the requirements of a bundle."""
    ours, theirs = _family(needs.modality), _family(collection.modality)
    if ours and theirs and ours != theirs:
        text = f"dataset.json states {collection.modality}, but {needs.name} is made for {needs.modality}"
        yield Finding("error", "modality mismatch", f"{text}.")
    yield from _names(collection, needs)
    yield from _missing_classes(cases, needs)


def _spacing(facts: FileFacts, here: tuple[str, ...], needs: Needs) -> Iterator[Finding]:
    """Compare the spacing with the bundle's, along the same anatomical axes."""
    if needs.spacing is None or not facts.has_geometry or len(facts.shape) != len(needs.spacing):
        return
    steps = dict(zip(map(_axis, facts.orientation), facts.spacing, strict=True))
    theirs = [steps.get(_axis(letter), math.nan) for letter in needs.orientation]
    ratios = [found / wanted for found, wanted in zip(theirs, needs.spacing, strict=True)]
    coarse, fine = max(ratios) >= _COARSER, min(ratios) * _FINER <= 1
    if not (coarse or fine):
        return
    text = f"{facts.file} has voxels of {_mm(theirs)} ({needs.orientation}), but {needs.name} uses {_mm(needs.spacing)}"
    effect = "upsampling adds no detail" if coarse else "finer detail is lost"
    advice = "Use another bundle, or train one with --set spacing=[..]"
    yield Finding("warning", "spacing mismatch", f"{text}: {effect}. {advice}.", here)


def _values(facts: FileFacts, here: tuple[str, ...], needs: Needs) -> Iterator[Finding]:
    """Find images that the bundle's intensity window clips to one value."""
    if needs.intensity_range is None or not facts.percentiles:
        return
    low, high = needs.intensity_range
    first, _, last = facts.percentiles
    if last <= low or first >= high:
        side = f"below {low:g}" if last <= low else f"above {high:g}"
        text = f"99% of the values of {facts.file} are {side}, and {needs.name} clips values to {low:g} to {high:g}"
        yield Finding("warning", "outside the window", f"{text}: check the units, such as HU.", here)


def _names(collection: Collection, needs: Needs) -> Iterator[Finding]:
    """Compare the class names in `dataset.json` with those of the bundle, value by value."""
    different = []
    for value, name in collection.labels.items():
        own, meant = needs.class_of(value), _class_named(name, needs)
        if value == 0 or own is None or meant == own:
            continue
        taken = needs.classes.get(own, "background")
        if meant is not None:
            text = f"dataset.json names the label {value} '{name}', but {needs.name} uses {value} for '{taken}'"
            way = "reorder the values in the labels, or train with --set label_mapping={..}"
            yield Finding("error", "label order", f"{text}: {way}.")
        elif own in needs.classes:
            different.append(f"{value} ('{name}') as '{taken}'")
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        yield Finding("note", "label names", f"{needs.name} uses the label {', '.join(different[:_SHOWN])}{more}.")


def _missing_classes(cases: Sequence[Examined], needs: Needs) -> Iterator[Finding]:
    """Find classes of the bundle that no label contains, among all cases or among the training cases."""
    labeled = [case for case in cases if case.label is not None]
    training = [case for case in labeled if case.part == "train"]
    for group, whose in ((labeled, "No case"), (training, "No training case")):
        if not group or needs.mapping is None:
            continue
        found = {needs.class_of(value) for case in group if case.label for value in case.label.labels}
        missing = [f"'{name}'" for index, name in needs.classes.items() if index not in found]
        if missing:
            text = (
                f"{whose} contains the class {', '.join(missing)} of {needs.name}, so it cannot be trained on this set"
            )
            yield Finding("warning", "missing class", f"{text}.")
            return


def _class_named(name: str, needs: Needs) -> int | None:
    """Return the class with a name, whatever its case, punctuation and word order."""
    wanted = _keys(name)
    return next((index for index, known in needs.classes.items() if wanted & _keys(known)), None)


def _keys(name: str) -> set[str]:
    words = re.findall(r"[a-z0-9]+", name.lower())
    return {"".join(words), " ".join(sorted(words))}


def _family(modality: str) -> str:
    """Return "CT" or "MR" for a modality that names one of these, otherwise an empty text."""
    words = set(re.findall(r"[A-Z]+", modality.upper()))
    return "CT" if "CT" in words else "MR" if words & {"MR", "MRI"} else ""


def _axis(letter: str) -> str:
    return _OPPOSITE.get(letter, letter)


def _mm(steps: Sequence[float]) -> str:
    return " x ".join(f"{step:.3g}" for step in steps) + " mm"
