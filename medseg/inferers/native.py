"""Resample logits to native space plane by plane, as labels or probabilities, during sliding window inference.

Class scores are interpolated only where necessary: if the eight corners of a cell have the same top class, every point
in the cell has it too. In all other cells the scores of all classes are interpolated. The labels are therefore the same
as with full interpolation, except where two classes tie within rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import monai.inferers
import torch
from monai.data import MetaTensor, decollate_batch

from medseg.errors import RequestError
from medseg.inferers.blend import Slab, check_numbers
from medseg.inferers.grid_mapping import Axis, GridMapping, find_grid_mapping
from medseg.inferers.oblique import ObliqueGrid
from medseg.inferers.results import (
    OUTPUTS,
    SCORES,
    Decision,
    Plane,
    activate,
    background,
    decisions,
    empty_result,
    packed,
)

__all__ = ["AxisAlignedGrid", "NativeGrid", "NativeInferer", "NativeResampler", "NativeResult", "check_choice"]

_PLANES = 16
# Scores interpolated at a time; each thread holds a few copies.
_CHUNK = 1 << 20


class NativeGrid(Protocol):
    """Native grid whose result is filled from pairs of adjacent model planes."""

    def fill(self, first: int, planes: list[Plane], pool: ThreadPoolExecutor | None, *, ends: bool) -> None:
        """Fill the native voxels from model plane `first` up to the last of `planes`, and beyond it if `ends`."""

    def result(self) -> torch.Tensor:
        """Return the result `(C, *native)`."""


class NativeResampler:
    """Resample the slabs of one image, added in order, to native space.

    Args:
        mapping: Mapping between the native grid and the model grid.
        classes: Number of channels of the logits.
        axis: Model axis of the stream.
        output: "labels" (softmax: top class; sigmoid: 0 or 1 per channel), or probabilities as "uint8" (0..255 for
            0..1), "float16" or "float32".
        activation: "softmax", "sigmoid", or "none" to interpolate and compare logits.
        threshold: Probability threshold of sigmoid labels.
        device: Device of the slabs; the result is on the CPU.
    """

    def __init__(
        self,
        mapping: GridMapping,
        classes: int,
        *,
        axis: int,
        output: str,
        activation: str,
        threshold: float,
        device: torch.device,
    ) -> None:
        self.shape = mapping.model_shape
        self.axis = axis
        self.classes = classes
        self.activation = activation
        self.decisions = decisions(classes, activation, threshold) if output == "labels" else []
        oblique = mapping.native_axes() is None
        grid = ObliqueGrid if oblique else AxisAlignedGrid
        self.grid: NativeGrid = grid(mapping, axis, classes, self.decisions, output, activation, device)
        self.swap = not oblique and AxisAlignedGrid.swaps(mapping, axis)
        self.device = device
        self.carried: list[Plane] = []
        self.done = 0
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        # Each thread processes separate planes, with torch limited to one thread.
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def add(self, slab: Slab) -> None:
        """Add the next planes; planes that the stream skipped become background."""
        self._background_until(slab.start)
        self._take(activate(slab.logits, slab.covered, self.activation))

    def result(self) -> torch.Tensor:
        """Return the result `(C, *native)` after the last plane; it may be non-contiguous."""
        self._background_until(self.shape[self.axis])
        self.grid.fill(self.done - 1, [self.carried[0], self.carried[0]], None, ends=True)
        self.pool.shutdown()
        return self.grid.result()

    def _background_until(self, end: int) -> None:
        others = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        plane = background(self.classes, self.activation).reshape(-1, 1, *([1] * len(others))).to(self.device)
        while self.done < end:
            self._take(plane.expand(-1, 1, *others))

    def _take(self, scores: torch.Tensor) -> None:
        """Add scores `(K, planes, *others)`."""
        if scores.ndim == 3:  # a 2D image: planes of one row
            scores = scores.unsqueeze(2)
        if self.swap:
            scores = scores.transpose(2, 3)
        planes = self.carried + list(self.pool.map(self._plane, scores.unbind(1)))
        if len(planes) > 1:
            self.grid.fill(self.done - len(self.carried), planes, self.pool, ends=False)
        last = planes[-1]
        self.carried = [Plane(last.scores.clone(), last.labels)]
        self.done += scores.shape[1]

    def _plane(self, scores: torch.Tensor) -> Plane:
        own = scores.contiguous()
        return Plane(own, [decision.decide(own[decision.classes]) for decision in self.decisions])


class AxisAlignedGrid:
    """Native grid whose axes are parallel to the model axes, up to permutations and flips."""

    def __init__(
        self,
        mapping: GridMapping,
        axis: int,
        classes: int,
        wanted: list[Decision],
        output: str,
        activation: str,
        device: torch.device,
    ) -> None:
        self.natives, models = self._orders(mapping, axis)
        axes = [Axis.of(mapping, m, n) for m, n in zip(models, self.natives, strict=True)]
        self.along = axes[0]
        self.rows, self.columns = (a.to(device) for a in (axes[1:] if len(axes) == 3 else [Axis.single(), axes[1]]))
        self.decisions = wanted
        self.output = output
        channels = len(wanted) or classes
        shape = (channels, len(self.along), len(self.rows), len(self.columns))
        self.out = empty_result(shape, output, classes, activation)

    @staticmethod
    def _orders(mapping: GridMapping, axis: int) -> tuple[list[int], list[int]]:
        """Return the native and model axes of (stream, rows, columns), in the memory order of image files."""
        natives = mapping.native_axes() or ()
        models = [axis, *sorted((a for a in range(len(natives)) if a != axis), key=lambda a: -natives[a])]
        return [natives[m] for m in models], models

    @classmethod
    def swaps(cls, mapping: GridMapping, axis: int) -> bool:
        """Return whether the rows and columns of the model planes are swapped in native space."""
        others = cls._orders(mapping, axis)[1][1:]
        return others != sorted(others)

    def fill(self, first: int, planes: list[Plane], pool: ThreadPoolExecutor | None, *, ends: bool) -> None:
        """Fill the native planes between adjacent model planes, starting with plane `first`."""
        del ends  # the last plane is passed twice
        jobs = [(first + i, low, high) for i, (low, high) in enumerate(pairwise(planes))]
        if pool is None:
            for job in jobs:
                self._between(*job)
        else:
            list(pool.map(lambda job: self._between(*job), jobs))

    def result(self) -> torch.Tensor:
        """Return the result `(C, *native)`, a view."""
        out = self.out if len(self.natives) == 3 else self.out[:, :, 0]
        return out.permute(0, *(1 + self.natives.index(axis) for axis in range(len(self.natives))))

    def _between(self, plane: int, low: Plane, high: Plane) -> None:
        wanted = self.along.indices_above(plane)
        if not wanted:
            return
        if self.decisions:
            for channel, decision in enumerate(self.decisions):
                self._labels(channel, decision, wanted, low, high)
        else:
            self._probabilities(wanted, low, high)

    def _labels(
        self, channel: int, decision: Decision, wanted: list[tuple[int, float]], low: Plane, high: Plane
    ) -> None:
        deep = any(fraction for _, fraction in wanted)
        tops = [low.labels[channel], *([high.labels[channel]] if deep else [])]
        sure = self._native(tops[0])
        mixed = self._native(self._mixed(tops)).flatten().nonzero()[:, 0]
        results = [sure.clone() for _ in wanted]
        below, above = low.scores[decision.classes], high.scores[decision.classes]
        for part in torch.split(mixed, max(_CHUNK // len(below), 1)):
            corners = _Corners(self.rows, self.columns, part)
            at_low = corners(below)
            at_high = corners(above) if deep else at_low
            for labels, (_, fraction) in zip(results, wanted, strict=True):
                scores = at_low.lerp(at_high, fraction) if fraction else at_low
                labels.view(-1)[part] = decision.decide(scores).to(labels.dtype)
        for labels, (index, _) in zip(results, wanted, strict=True):
            self._store(channel, index, labels)

    def _store(self, channel: int | slice, index: int, values: torch.Tensor) -> None:
        target = self.out[channel, index]
        if self.rows.all_valid and self.columns.all_valid:
            target.copy_(values)
            return
        valid = (self.rows.valid[:, None] & self.columns.valid[None]).cpu()
        target[..., valid] = values.cpu()[..., valid]

    def _native(self, plane: torch.Tensor) -> torch.Tensor:
        """Return the value of the enclosing cell for each native voxel of a plane."""
        return plane.index_select(0, self.rows.low).index_select(1, self.columns.low)

    def _mixed(self, tops: list[torch.Tensor]) -> torch.Tensor:
        """Return for each cell of `(H, W)` whether its corners differ; axes without fractions are not compared."""
        first = tops[0]
        mixed = torch.zeros(first.shape, dtype=torch.bool, device=first.device)
        for top in tops:
            mixed |= top != first
            if not self.rows.exact:
                mixed[:-1] |= top[1:] != first[:-1]
            if not self.columns.exact:
                mixed[:, :-1] |= top[:, 1:] != first[:, :-1]
            if not (self.rows.exact or self.columns.exact):
                mixed[:-1, :-1] |= top[1:, 1:] != first[:-1, :-1]
        return mixed

    def _probabilities(self, wanted: list[tuple[int, float]], low: Plane, high: Plane) -> None:
        below = self._enlarged(low.scores)
        above = self._enlarged(high.scores) if any(fraction for _, fraction in wanted) else below
        for index, fraction in wanted:
            values = below.lerp(above, fraction) if fraction else below
            self._store(slice(None), index, packed(values, self.output))

    def _enlarged(self, scores: torch.Tensor) -> torch.Tensor:
        rows, columns = self.rows, self.columns
        tall = scores.index_select(1, rows.low)
        if not rows.exact:
            tall = tall.lerp(scores.index_select(1, rows.high), rows.fraction[:, None])
        wide = tall.index_select(2, columns.low)
        return wide if columns.exact else wide.lerp(tall.index_select(2, columns.high), columns.fraction)


class _Corners:
    """Bilinear interpolation of planes at a list of native voxels."""

    def __init__(self, rows: Axis, columns: Axis, where: torch.Tensor) -> None:
        row = torch.div(where, len(columns), rounding_mode="floor")
        column = where - row * len(columns)
        self.exact = rows.exact, columns.exact
        self.low_row, self.high_row, self.down = (each[row] for each in (rows.low, rows.high, rows.fraction))
        self.low, self.high, self.right = (each[column] for each in (columns.low, columns.high, columns.fraction))

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the values `(K, n)` of a plane `(K, H, W)`."""
        flat, width = scores.flatten(1), scores.shape[2]
        upper = self._row(flat, self.low_row * width)
        return upper if self.exact[0] else upper.lerp(self._row(flat, self.high_row * width), self.down)

    def _row(self, flat: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        left = flat.index_select(1, start + self.low)
        return left if self.exact[1] else left.lerp(flat.index_select(1, start + self.high), self.right)


@dataclass(frozen=True)
class NativeResult:
    """Form of the result in native space.

    Attributes:
        output: "labels" (one channel for softmax, one 0/1 channel per class for sigmoid), uint8 up to 256 classes; or
            probabilities as "uint8" (0..255), "float16" or "float32".
        activation: "softmax", "sigmoid", or "none" to interpolate and compare logits.
        threshold: Probability threshold of sigmoid labels.
    """

    output: str
    activation: str
    threshold: float

    def __post_init__(self) -> None:
        check_choice("output", self.output, OUTPUTS)
        check_choice("activation", self.activation, SCORES)

    def of(self, slabs: Iterable[Slab], images: torch.Tensor, axis: int) -> torch.Tensor:
        """Return the result `(B, 1 or K, *native)`, a `MetaTensor` if `images` is one.

        Args:
            slabs: Finished planes, image by image.
            images: Network input `(B, C, *spatial)` with its metadata.
            axis: Stream axis of the slabs.
        """
        mappings = _grid_mappings(images)
        finished: list[torch.Tensor] = []
        for _, own in itertools.groupby(slabs, key=lambda slab: slab.image):
            resampler: NativeResampler | None = None
            for slab in own:
                resampler = resampler or self._resampler(mappings[len(finished)], slab, axis)
                resampler.add(slab)
            if resampler is not None:
                finished.append(resampler.result())
        results = torch.stack(finished) if len(finished) > 1 else finished[0][None]
        return _in_native_space(results, images, mappings) if isinstance(images, MetaTensor) else results

    def size_in_bytes(self, images: torch.Tensor, classes: int) -> int:
        """Return the memory of the result for these images."""
        channels = 1 if self.output == "labels" and self.activation != "sigmoid" else classes
        each = {"labels": 1 if classes <= 256 else 4, "uint8": 1, "float16": 2, "float32": 4}[self.output]
        return sum(math.prod(mapping.native_shape) for mapping in _grid_mappings(images)) * channels * each

    def _resampler(self, mapping: GridMapping, slab: Slab, axis: int) -> NativeResampler:
        return NativeResampler(
            mapping,
            len(slab.logits),
            axis=axis,
            output=self.output,
            activation=self.activation,
            threshold=self.threshold,
            device=slab.logits.device,
        )


class NativeInferer(monai.inferers.Inferer):  # type: ignore[misc]  # MONAI publishes no types
    """Inferer that resamples the logits of another inferer to native space, as labels or probabilities.

    With it, `OverlapTileInferer`, `RotationTTAInferer` or MONAI's inferers can replace a `SlidingWindowInferer` with
    `output="labels"` in a bundle. The logits in model space are held in memory as a whole, those in native space never.

    Args:
        inferer: Inferer that returns logits `(B, K, *spatial)`.
        output: "labels", "uint8", "float16" or "float32", as in `SlidingWindowInferer`.
        activation: "softmax", "sigmoid" or "none".
        threshold: Probability threshold of sigmoid labels.

    Raises:
        RequestError: Unknown choice, or `output="logits"`.
    """

    def __init__(
        self,
        inferer: Callable[..., Any],
        *,
        output: str = "labels",
        activation: str = "softmax",
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.inferer = inferer
        self.result = NativeResult(output, activation, threshold)
        if output == "logits":
            raise RequestError("NativeInferer returns labels or probabilities only: use the wrapped inferer for logits")

    @property
    def on_progress(self) -> Any:
        """Progress callback of the wrapped inferer, called with (windows done, total windows)."""
        return getattr(self.inferer, "on_progress", None)

    @on_progress.setter
    def on_progress(self, listener: Callable[[int, int], None] | None) -> None:
        self.inferer.on_progress = listener  # type: ignore[attr-defined]

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the result `(B, 1 or K, *native)` for images `(B, in_channels, *spatial)`.

        Raises:
            CaseError: Non-finite logits.
        """
        logits = self.inferer(inputs, network, *args, **kwargs)
        return self.result.of(_slabs(logits.detach()), inputs, 0)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Check that a value is one of the choices.

    Raises:
        RequestError: Unknown value.
    """
    if value not in choices:
        raise RequestError(f"invalid value '{value}' for '{name}': choose one of {', '.join(choices)}")


def _slabs(logits: torch.Tensor) -> Iterator[Slab]:
    plain = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
    for number, own in enumerate(plain):
        for start in range(0, own.shape[1], _PLANES):
            part = own[:, start : start + _PLANES]
            check_numbers(part)
            yield Slab(number, start, part, None)


def _grid_mappings(images: torch.Tensor) -> list[GridMapping]:
    if not isinstance(images, MetaTensor):
        return [GridMapping.identity(tuple(images.shape[2:]))] * len(images)
    each = decollate_batch(images) if images.is_batch else list(images)
    mappings = [find_grid_mapping(image) for image in each]
    shapes = {mapping.native_shape for mapping in mappings}
    if len(shapes) > 1:
        raise RequestError(f"images with different native shapes {sorted(shapes)} in one batch: use batch size 1")
    return mappings


def _in_native_space(results: torch.Tensor, images: MetaTensor, mappings: list[GridMapping]) -> MetaTensor:
    restored = MetaTensor(results).copy_meta_from(images)
    affines = torch.stack([torch.from_numpy(mapping.affine) for mapping in mappings])
    restored.affine = affines if images.is_batch else affines[0]
    restored.applied_operations = [[] for _ in mappings] if images.is_batch else []
    return restored
