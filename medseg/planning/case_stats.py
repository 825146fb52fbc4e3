"""The fingerprint of a data set: statistics of each training case and of all of them together.

It contains numbers and names only, no arrays, so that it round-trips through JSON.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["CaseStats", "Fingerprint", "Intensity", "quantile", "shown"]

VERSION = 1


@dataclass(frozen=True)
class CaseStats:
    """Statistics of one training case.

    Attributes:
        name: Name of the case.
        shape: Spatial shape in voxels, in the model's axis order: R, A, S for a volume, x, y for a 2D image.
        spacing: Voxel spacing in mm, in the same order; empty for 2D images.
        orientation: Axis codes of the file, such as "LPS"; empty for 2D images.
        dtype: Data type of the stored values.
        channels: Number of channels.
        color: Whether the channels of a 2D image differ from each other.
        low: Lowest intensity.
        high: Highest intensity.
        percentiles: 1st, 50th and 99th percentile of the intensities.
        modality: DICOM modality, such as "CT"; empty where unknown.
        microns: Pixel size in micrometers from the resolution tag of a 2D image; 0 where there is none.
        values: Number of voxels of each label value.
        distinct: Number of label values above 0.
        contiguous: Whether these values are 1, 2, ..., n without a gap.
        objects: Number of connected components of equal label value.
        single: Number of label values that form a single connected component.
        object_sizes: 10th, 50th and 90th percentile of the components' sizes in voxels.
    """

    name: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    orientation: str
    dtype: str
    channels: int
    color: bool
    low: float
    high: float
    percentiles: tuple[float, ...]
    modality: str
    microns: float
    values: dict[int, int]
    distinct: int
    contiguous: bool
    objects: int
    single: int
    object_sizes: tuple[float, ...]

    @property
    def voxels(self) -> int:
        """Number of voxels, whatever the channels."""
        return math.prod(self.shape)

    @property
    def foreground(self) -> int:
        """Number of voxels whose label is not 0."""
        return sum(count for value, count in self.values.items() if value != 0)


@dataclass(frozen=True)
class Intensity:
    """Intensities of one channel in the foreground of all training cases, from a random sample of voxels.

    Attributes:
        mean: Mean.
        std: Standard deviation.
        low: 0.5th percentile.
        median: Median.
        high: 99.5th percentile.
        samples: Number of voxels in the sample.
    """

    mean: float
    std: float
    low: float
    median: float
    high: float
    samples: int


@dataclass(frozen=True)
class Fingerprint:
    """Statistics of the training cases of a data set; validation cases are counted but never opened.

    Attributes:
        dataset: Name of the data set's folder.
        key: Hash of the files' names, sizes and modification times, by which a change of the data is noticed.
        validation_cases: Number of validation cases.
        label_names: Class name of each label value in `dataset.json`; empty where it names none.
        channel_names: Channel names in `dataset.json`; empty where it names none.
        cases: Statistics of the training cases, in the order of the split.
        intensities: Foreground intensities, one entry per channel.
    """

    dataset: str
    key: str
    validation_cases: int
    label_names: dict[int, str]
    channel_names: tuple[str, ...]
    cases: tuple[CaseStats, ...]
    intensities: tuple[Intensity, ...]

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions, 2 or 3."""
        return len(self.cases[0].shape)

    @property
    def channels(self) -> int:
        """Number of input channels of the model; a grayscale image among color images is repeated to 3 channels."""
        if self.spatial_dims == 2 and not any(case.color for case in self.cases):
            return min(case.channels for case in self.cases)
        return max(case.channels for case in self.cases)

    @property
    def median_spacing(self) -> tuple[float, ...]:
        """Median spacing of each axis in mm; empty for 2D images."""
        return self.spacing_at(0.5)

    def spacing_at(self, share: float) -> tuple[float, ...]:
        """Return a quantile of the spacings of each axis, in mm."""
        spacings = [case.spacing for case in self.cases if case.spacing]
        return tuple(round(quantile(axis, share), 6) for axis in zip(*spacings, strict=True))

    def shapes(self, spacing: Sequence[float] = ()) -> list[tuple[int, ...]]:
        """Return the shape of each case, after resampling to `spacing` in mm if that is given."""
        if not spacing:
            return [case.shape for case in self.cases]
        return [
            tuple(max(1, round(n * own / new)) for n, own, new in zip(case.shape, case.spacing, spacing, strict=True))
            for case in self.cases
        ]

    def median_shape(self, spacing: Sequence[float] = ()) -> tuple[int, ...]:
        """Return the median shape, axis by axis, after resampling to `spacing` in mm if that is given."""
        return tuple(round(statistics.median(axis)) for axis in zip(*self.shapes(spacing), strict=True))

    def shares(self) -> dict[int, float]:
        """Return the fraction of all voxels that each label value covers."""
        total = sum(case.voxels for case in self.cases)
        values = sorted({value for case in self.cases for value in case.values})
        return {value: sum(case.values.get(value, 0) for case in self.cases) / total for value in values}

    def middle_case(self) -> int:
        """Return the index of the case with the median number of voxels, on which the probe runs."""
        order = sorted(range(len(self.cases)), key=lambda index: (self.cases[index].voxels, index))
        return order[len(order) // 2]

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as JSON values for `from_json`, headed by a summary for readers."""
        summary = {
            "training_cases": len(self.cases),
            "spatial_dims": self.spatial_dims,
            "channels": self.channels,
            "median_shape": self.median_shape(),
            "median_spacing": self.median_spacing,
            "label_shares": {str(value): round(share, 8) for value, share in self.shares().items()},
        }
        return {"version": VERSION, "summary": summary, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Fingerprint | None:
        """Return the fingerprint in the output of `to_json`; None for another version or malformed content."""
        try:
            if content["version"] != VERSION:
                return None
            return cls(
                dataset=str(content["dataset"]),
                key=str(content["key"]),
                validation_cases=int(content["validation_cases"]),
                label_names={int(value): str(name) for value, name in content["label_names"].items()},
                channel_names=tuple(content["channel_names"]),
                cases=tuple(_case(entry) for entry in content["cases"]),
                intensities=tuple(Intensity(**entry) for entry in content["intensities"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def _case(entry: Mapping[str, Any]) -> CaseStats:
    lists = {name: tuple(entry[name]) for name in ("shape", "spacing", "percentiles", "object_sizes")}
    return CaseStats(**{**entry, **lists, "values": {int(value): count for value, count in entry["values"].items()}})


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile, `share` in [0, 1], by linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def shown(values: Sequence[float], digits: int = 4) -> str:
    """Format numbers as in "40 x 56 x 40"."""
    return " x ".join(f"{value:.{digits}g}" for value in values)
