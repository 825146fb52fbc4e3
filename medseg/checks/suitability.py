"""Does a set of images and labels suit a bundle: dimensions, channels, labels and their names, voxel size, values.

What a bundle would refuse, or would train on with the classes mixed up, is an error. A set that can be used but is
unlike what the bundle is made for gets warnings.
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

# Voxels so many times longer than the bundle's hold too little detail; so many times shorter, detail that it drops.
_COARSER = 2.0
_FINER = 3.0
_OPPOSITE = {"L": "R", "P": "A", "I": "S"}
_OTHER = "other"
_SHOWN = 5


@dataclass(frozen=True)
class Needs:
    """What a bundle asks of its data.

    Attributes:
        name: the bundle's.
        spatial_dims: 2 or 3.
        channels: values per voxel.
        mapping: label value, as text, -> class index; "other" takes the values that are not named. None where the
            bundle does not say.
        modality: such as "CT".
        label_names: name of a segment or region -> value, for DICOM labels of a set that names none itself.
        classes: class index -> name, of the foreground.
        spacing: mm between the voxels of the model grid; None for pictures, and where the bundle does not say.
        orientation: directions of the axes of that grid.
        intensity_range: the values that are told apart, such as a window in HU; None where images are standardized.
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
        """The label values that the mapping names; None if the bundle takes any."""
        if self.mapping is None or _OTHER in self.mapping:
            return None
        return frozenset(int(value) for value in self.mapping)

    def class_of(self, value: int) -> int | None:
        """Return the class index that a label value becomes, if the mapping says."""
        mapping = self.mapping or {}
        return mapping.get(str(value), mapping.get(_OTHER))


def check_case(subject: Subject, collection: Collection, facts: FileFacts, needs: Needs) -> Iterator[Finding]:
    """Say whether the bundle can read an image, and whether it is of the kind that the bundle is made for."""
    here = (subject.name,)
    if len(facts.shape) != needs.spatial_dims or facts.channels != needs.channels:
        try:
            open_image(subject.image, facts.file, spatial_dims=needs.spatial_dims, channels=needs.channels)
        except CaseError as error:
            text = f"{needs.name} cannot read it: {collection.shortened(str(error))}"
            yield Finding("error", "not for this bundle", text, here)
            return
    yield from _spacing(facts, here, needs)
    yield from _values(facts, here, needs)
    ours, theirs = _family(needs.modality), _family(facts.modality)
    if ours and theirs and ours != theirs:
        text = f"{facts.file} is {facts.modality}, {needs.name} is made for {needs.modality}"
        yield Finding("error", "other modality", f"{text}.", here)


def check_suitability(cases: Sequence[Examined], collection: Collection, needs: Needs) -> Iterator[Finding]:
    """Compare what a set says of itself, and holds as a whole, with what the bundle asks for."""
    ours, theirs = _family(needs.modality), _family(collection.modality)
    if ours and theirs and ours != theirs:
        text = f"dataset.json says {collection.modality}, {needs.name} is made for {needs.modality}"
        yield Finding("error", "other modality", f"{text}.")
    yield from _names(collection, needs)
    yield from _missing_classes(cases, needs)


def _spacing(facts: FileFacts, here: tuple[str, ...], needs: Needs) -> Iterator[Finding]:
    """Compare voxel sizes along the same anatomical axes."""
    if needs.spacing is None or not facts.has_geometry or len(facts.shape) != len(needs.spacing):
        return
    steps = dict(zip(map(_axis, facts.orientation), facts.spacing, strict=True))
    theirs = [steps.get(_axis(letter), math.nan) for letter in needs.orientation]
    ratios = [found / wanted for found, wanted in zip(theirs, needs.spacing, strict=True)]
    coarse, fine = max(ratios) >= _COARSER, min(ratios) * _FINER <= 1
    if not (coarse or fine):
        return
    text = f"{facts.file} has voxels of {_mm(theirs)} ({needs.orientation}), {needs.name} works on {_mm(needs.spacing)}"
    what = "detail that is not there cannot be added" if coarse else "finer detail is dropped"
    knob = "another bundle, or a training with --set spacing=[..], would suit better"
    yield Finding("warning", "far from the bundle's spacing", f"{text}: {what}; {knob}.", here)


def _values(facts: FileFacts, here: tuple[str, ...], needs: Needs) -> Iterator[Finding]:
    """Find images that the bundle's window turns into one value."""
    if needs.intensity_range is None or not facts.percentiles:
        return
    low, high = needs.intensity_range
    first, _, last = facts.percentiles
    if last <= low or first >= high:
        side = f"below {low:g}" if last <= low else f"above {high:g}"
        text = f"99 % of the values of {facts.file} lie {side}, and {needs.name} sees {low:g} to {high:g}"
        yield Finding("warning", "outside the window", f"{text}: check the units, such as HU.", here)


def _names(collection: Collection, needs: Needs) -> Iterator[Finding]:
    """Compare the names in `dataset.json` with those of the classes that the values become."""
    strange = []
    for value, name in collection.labels.items():
        own, meant = needs.class_of(value), _class_named(name, needs)
        if value == 0 or own is None or meant == own:
            continue
        taken = needs.classes.get(own, "background")
        if meant is not None:
            text = f"dataset.json calls the label {value} '{name}', but {needs.name} takes {value} for '{taken}'"
            way = "write another order into the labels, or --set label_mapping={..} for training"
            yield Finding("error", "label order", f"{text}: {way}.")
        elif own in needs.classes:
            strange.append(f"{value} ('{name}') for '{taken}'")
    if strange:
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        yield Finding("note", "label names", f"{needs.name} takes the label {', '.join(strange[:_SHOWN])}{more}.")


def _missing_classes(cases: Sequence[Examined], needs: Needs) -> Iterator[Finding]:
    """Find classes of the bundle that no label holds, of all cases and of those for training."""
    labeled = [case for case in cases if case.label is not None]
    training = [case for case in labeled if case.part == "train"]
    for group, whose in ((labeled, "No case"), (training, "No training case")):
        if not group or needs.mapping is None:
            continue
        found = {needs.class_of(value) for case in group if case.label for value in case.label.labels}
        missing = [f"'{name}'" for index, name in needs.classes.items() if index not in found]
        if missing:
            text = f"{whose} holds the class {', '.join(missing)} of {needs.name}, which cannot be learned from this"
            yield Finding("warning", "missing class", f"{text}.")
            return


def _class_named(name: str, needs: Needs) -> int | None:
    """Return the class that a name means, in whatever order and spelling its words come."""
    wanted = _keys(name)
    return next((index for index, known in needs.classes.items() if wanted & _keys(known)), None)


def _keys(name: str) -> set[str]:
    words = re.findall(r"[a-z0-9]+", name.lower())
    return {"".join(words), " ".join(sorted(words))}


def _family(modality: str) -> str:
    """Return "CT" or "MR" for a modality that is surely one of these."""
    words = set(re.findall(r"[A-Z]+", modality.upper()))
    return "CT" if "CT" in words else "MR" if words & {"MR", "MRI"} else ""


def _axis(letter: str) -> str:
    return _OPPOSITE.get(letter, letter)


def _mm(steps: Sequence[float]) -> str:
    return " x ".join(f"{step:.3g}" for step in steps) + " mm"
