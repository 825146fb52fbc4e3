"""What a fingerprint holds: facts of the training cases, and what follows from all of them together.

Numbers only, no arrays: a fingerprint is written to JSON and read back unchanged.
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
    """One training case.

    Attributes:
        name: of the case.
        shape: voxels along the axes of the model: R, A, S of a volume, x, y of a picture.
        spacing: mm along them; empty for pictures.
        orientation: of the file, such as "LPS"; empty for pictures.
        dtype: of the stored values.
        channels: values per voxel.
        color: whether the channels of a picture differ.
        low: lowest value.
        high: highest value.
        percentiles: the 1st, 50th and 99th.
        modality: as DICOM says.
        microns: micrometers per pixel, where a picture says so; else 0.
        values: label value -> voxels.
        distinct: number of label values above 0.
        contiguous: whether these are 1, 2, ... without a gap.
        objects: connected pieces of one label value.
        single: label values that are one piece.
        object_sizes: 10th, 50th and 90th percentile of the voxels of a piece.
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
        """Voxels in space."""
        return math.prod(self.shape)

    @property
    def foreground(self) -> int:
        """Voxels whose label is not 0."""
        return sum(count for value, count in self.values.items() if value != 0)


@dataclass(frozen=True)
class Intensity:
    """The values of one channel inside the foreground of all training cases.

    Attributes:
        mean: of the sampled voxels.
        std: their standard deviation.
        low: their 0.5th percentile.
        median: their 50th.
        high: their 99.5th.
        samples: how many were drawn.
    """

    mean: float
    std: float
    low: float
    median: float
    high: float
    samples: int


@dataclass(frozen=True)
class Fingerprint:
    """What the training part of a data set is like; the validation part was counted and not opened.

    Attributes:
        dataset: name of its folder.
        key: hash of names, sizes and times of the files, to tell whether it still holds.
        validation_cases: how many cases there are for validation.
        label_names: value -> name where `dataset.json` says so.
        channel_names: of the channels, where `dataset.json` says so.
        cases: the training cases, in the order of the split.
        intensities: one entry per channel.
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
        """2 or 3."""
        return len(self.cases[0].shape)

    @property
    def channels(self) -> int:
        """Values per voxel that the model reads; grey among color pictures is repeated."""
        if self.spatial_dims == 2 and not any(case.color for case in self.cases):
            return min(case.channels for case in self.cases)
        return max(case.channels for case in self.cases)

    @property
    def median_spacing(self) -> tuple[float, ...]:
        """Median per axis, mm; empty for pictures."""
        return self.spacing_at(0.5)

    def spacing_at(self, share: float) -> tuple[float, ...]:
        """Return a quantile of the spacings, per axis, mm."""
        spacings = [case.spacing for case in self.cases if case.spacing]
        return tuple(round(quantile(axis, share), 6) for axis in zip(*spacings, strict=True))

    def shapes(self, spacing: Sequence[float] = ()) -> list[tuple[int, ...]]:
        """Return the shape of every case; after resampling to `spacing` where that is given."""
        if not spacing:
            return [case.shape for case in self.cases]
        return [
            tuple(max(1, round(n * own / new)) for n, own, new in zip(case.shape, case.spacing, spacing, strict=True))
            for case in self.cases
        ]

    def median_shape(self, spacing: Sequence[float] = ()) -> tuple[int, ...]:
        """Return the median voxels per axis; after resampling to `spacing` where that is given."""
        return tuple(round(statistics.median(axis)) for axis in zip(*self.shapes(spacing), strict=True))

    def shares(self) -> dict[int, float]:
        """Return label value -> its share of all voxels."""
        total = sum(case.voxels for case in self.cases)
        values = sorted({value for case in self.cases for value in case.values})
        return {value: sum(case.values.get(value, 0) for case in self.cases) / total for value in values}

    def middle_case(self) -> int:
        """Return the index of the case of median size, on which the probe runs."""
        order = sorted(range(len(self.cases)), key=lambda index: (self.cases[index].voxels, index))
        return order[len(order) // 2]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes, with a summary for readers in front."""
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
        """Return what `to_json` wrote, read back from a file; None for another version or anything else."""
        if content.get("version") != VERSION:
            return None
        try:
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
    """Return a quantile by linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def shown(values: Sequence[float], digits: int = 4) -> str:
    """Return numbers as in "40 x 56 x 40"."""
    return " x ".join(f"{value:.{digits}g}" for value in values)
