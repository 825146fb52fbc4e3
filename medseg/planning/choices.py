"""Choices that follow from the data alone: template, classes, spacing, intensity scaling, name. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import RequestError
from medseg.planning.case_stats import quantile
from medseg.planning.geometry import target_spacing
from medseg.planning.labels import Classes, classes_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from medseg.planning.case_stats import Fingerprint
    from medseg.planning.request import PlanRequest

__all__ = ["DatasetAnalysis", "analyze", "bundle_name"]

_HOUNSFIELD_LOW = -100.0
_HOUNSFIELD_HIGH = 35_000.0
_MOST = 0.9
# Fraction of the window added on each side, so that intensities at the edge of structures are not clipped.
_MARGIN = 0.1
_NARROWEST = 100.0
# The 99th percentile of images from one scanner varies by less than this factor.
_COMPARABLE = 1.5
_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+){2,}")
_SHORT: Final = {"ct_volume": "ct", "mr_volume": "mri", "rgb_image": "rgb", "grey_image": "grey"}


@dataclass
class DatasetAnalysis:
    """Choices that follow from the data, whatever the memory, the time and the network.

    Attributes:
        template: Name of the bundle's template.
        channels: Channel names by index.
        classes: Classes of the model.
        spacing: Spacing to which images are resampled, in mm; empty for 2D images.
        shape: Median shape of the training images at that spacing, in voxels.
        knobs: Settings chosen so far.
        blocks: Blocks of the template that the bundle replaces.
        reasons: Reason of each setting or block.
    """

    template: str
    channels: dict[str, str]
    classes: Classes
    spacing: tuple[float, ...]
    shape: tuple[int, ...]
    knobs: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions, 2 or 3."""
        return len(self.shape)

    @property
    def norm(self) -> str:
        """Normalization of the network: "batch" for 2D images on a common scale, where means matter."""
        return "batch" if self.spatial_dims == 2 and "intensity_range" in self.knobs else "instance"


def analyze(fingerprint: Fingerprint, request: PlanRequest) -> DatasetAnalysis:
    """Derive template, classes, spacing and intensity scaling from the data.

    Raises:
        RequestError: Labels that are no valid classes, or images of other dimensions than requested.
    """
    dims = fingerprint.spatial_dims
    if request.dims not in (None, dims):
        raise RequestError(
            f"--dims {request.dims} does not match the data: the images have {dims} dimensions, for example "
            f"{' x '.join(map(str, fingerprint.cases[0].shape))} in case {fingerprint.cases[0].name}. Omit --dims."
        )
    template, why = _template(fingerprint)
    spacing, reason = _spacing(fingerprint, request.settings)
    analysis = DatasetAnalysis(
        template,
        _channel_names(fingerprint, template),
        classes_of(fingerprint),
        spacing,
        fingerprint.median_shape(spacing),
    )
    analysis.reasons["template"] = why
    analysis.reasons["labels"] = analysis.classes.reason
    if spacing:
        analysis.knobs["spacing"] = list(spacing)
        analysis.reasons["spacing"] = reason
    _set_intensities(analysis, fingerprint)
    _set_microns(analysis, fingerprint)
    return analysis


def bundle_name(request: PlanRequest, folder: str, analysis: DatasetAnalysis, fingerprint: Fingerprint) -> str:
    """Return the bundle's name: the given one, the folder's if it is valid, or `<dataset>_<modality>_<network>`."""
    if request.name:
        return request.name
    if _NAME.fullmatch(folder):
        return folder
    plain = re.sub(r"[^a-z0-9]+", "_", fingerprint.dataset.lower()).strip("_") or "dataset"
    return f"{plain}_{_SHORT[analysis.template]}_{request.network_name}"


def _template(fingerprint: Fingerprint) -> tuple[str, str]:
    cases = fingerprint.cases
    if fingerprint.spatial_dims == 2:
        colored = sum(case.color for case in cases)
        if fingerprint.channels == 3:
            grey = len(cases) - colored
            note = f"; the channel of the {grey} grayscale images is repeated three times" if grey else ""
            return "rgb_image", f"{colored} of {len(cases)} training images are in color{note}"
        return "grey_image", f"all {len(cases)} training images are grayscale, with {fingerprint.channels} channel(s)"
    units = sum(case.low < _HOUNSFIELD_LOW and case.high <= _HOUNSFIELD_HIGH for case in cases)
    said = _said_ct(fingerprint)
    share = f"{units} of {len(cases)} training volumes contain values below {_HOUNSFIELD_LOW:g}"
    if units >= _MOST * len(cases) and (said or (not fingerprint.channel_names and _whole_numbers(fingerprint))):
        source = "the data set states CT" if said else "all are integers, with no other modality stated"
        return "ct_volume", f"CT: {share}, as Hounsfield units do, and {source}"
    if said:
        return (
            "mr_volume",
            f"the data set states CT, but only {share}: not Hounsfield units, so each volume is standardized",
        )
    return "mr_volume", f"not CT ({share}): the intensity scale differs between volumes, so each volume is standardized"


def _said_ct(fingerprint: Fingerprint) -> bool:
    named = [name.strip().upper() for name in fingerprint.channel_names] or [c.modality for c in fingerprint.cases]
    return bool(named) and all(name == "CT" for name in named)


def _whole_numbers(fingerprint: Fingerprint) -> bool:
    return all("int" in case.dtype for case in fingerprint.cases)


def _channel_names(fingerprint: Fingerprint, template: str) -> dict[str, str]:
    count = fingerprint.channels
    if template == "rgb_image":
        return {"0": "red", "1": "green", "2": "blue"}
    if len(fingerprint.channel_names) == count:
        return {str(index): name for index, name in enumerate(fingerprint.channel_names)}
    first = {"ct_volume": "CT", "mr_volume": "MRI"}.get(template, "grey")
    return {str(index): first if count == 1 else f"channel {index}" for index in range(count)}


def _spacing(fingerprint: Fingerprint, settings: Mapping[str, Any]) -> tuple[tuple[float, ...], str]:
    if fingerprint.spatial_dims == 2:
        return (), ""
    given = settings.get("spacing")
    if given is None:
        return target_spacing(fingerprint)
    if not isinstance(given, list) or len(given) != 3 or not all(isinstance(v, int | float) and v > 0 for v in given):
        raise RequestError(f"Invalid spacing={given!r}: expected three numbers above 0, in mm, such as [1, 1, 2.5].")
    return tuple(float(value) for value in given), "set by the user"


def _set_intensities(analysis: DatasetAnalysis, fingerprint: Fingerprint) -> None:
    if analysis.template == "ct_volume":
        _set_window(analysis, fingerprint)
    elif analysis.template == "rgb_image":
        _set_color(analysis, fingerprint)
    else:
        tops = [case.percentiles[-1] for case in fingerprint.cases if case.percentiles]
        analysis.reasons["normalization"] = (
            f"each image is standardized to mean 0 and standard deviation 1, because intensities have no common scale: "
            f"the 99th percentile of the training images ranges from {min(tops):.4g} to {max(tops):.4g}"
        )


def _set_window(analysis: DatasetAnalysis, fingerprint: Fingerprint) -> None:
    low = min(channel.low for channel in fingerprint.intensities)
    high = max(channel.high for channel in fingerprint.intensities)
    width = max(high - low, _NARROWEST)
    middle = (low + high) / 2
    window = [
        10.0 * math.floor((middle - width * (0.5 + _MARGIN)) / 10),
        10.0 * math.ceil((middle + width * (0.5 + _MARGIN)) / 10),
    ]
    analysis.knobs["intensity_range"] = window
    first = fingerprint.intensities[0]
    analysis.reasons["intensity_range"] = (
        f"the foreground ranges from {low:.4g} to {high:.4g} HU (0.5th to 99.5th percentile of {first.samples:,} "
        f"sampled voxels; mean {first.mean:.4g}, standard deviation {first.std:.4g}); the window is a tenth wider on "
        "each side, so that edges of structures are not clipped"
    )


def _set_color(analysis: DatasetAnalysis, fingerprint: Fingerprint) -> None:
    tops = [case.percentiles[-1] for case in fingerprint.cases if case.percentiles]
    dark, bright = quantile(tops, 0.1), quantile(tops, 0.9)
    if bright > _COMPARABLE * max(dark, 1e-6):
        analysis.blocks["intensity"] = [{"_target_": "monai.transforms.NormalizeIntensityd", "keys": "image"}]
        analysis.reasons["normalization"] = (
            "each image is standardized to mean 0 and standard deviation 1 over its three channels, because "
            f"brightness differs too much: the 99th percentile ranges from {dark:.4g} to {bright:.4g} in the middle "
            "80% of images"
        )
        return
    highest = max(case.high for case in fingerprint.cases)
    top = 255.0 if highest <= 255 else float(math.ceil(highest))
    analysis.knobs["intensity_range"] = [0.0, top]
    analysis.reasons["intensity_range"] = (
        f"pixel values reach {highest:.4g} and the 99th percentile is similar in all images ({dark:.4g} to "
        f"{bright:.4g}), so one scale for all images preserves absolute color, such as that of a stain"
    )


def _set_microns(analysis: DatasetAnalysis, fingerprint: Fingerprint) -> None:
    known = {case.microns for case in fingerprint.cases}
    if analysis.template == "rgb_image" and len(known) == 1 and known != {0.0}:
        analysis.knobs["microns_per_pixel"] = known.pop()
        analysis.reasons["microns_per_pixel"] = (
            f"the resolution stored in the files of all {len(fingerprint.cases)} training images"
        )
