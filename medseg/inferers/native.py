"""Handing finished planes on to the native grid, from a stream of windows or from complete logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import monai.inferers
import torch
from monai.data import MetaTensor, decollate_batch

from medseg.errors import RequestError
from medseg.inferers.blend import Slab, check_numbers
from medseg.inferers.grid_mapping import GridMapping, find_grid_mapping
from medseg.inferers.restore import NativeResampler
from medseg.inferers.scores import ACTIVATIONS, OUTPUTS

__all__ = ["NativeInferer", "NativeResult", "check_choice"]

_PLANES = 16


@dataclass(frozen=True)
class NativeResult:
    """What is made of logits on the native grid.

    Attributes:
        output: "labels" (one channel for softmax, one 0/1 channel for each class for sigmoid), uint8 up to 256 classes;
            or probabilities as "uint8" (0..255) or "float16".
        activation: "softmax", "sigmoid", or "none" to interpolate and compare logits.
        threshold: of sigmoid labels.
    """

    output: str
    activation: str
    threshold: float

    def __post_init__(self) -> None:
        check_choice("output", self.output, OUTPUTS)
        check_choice("activation", self.activation, ACTIVATIONS)

    def of(self, slabs: Iterable[Slab], images: torch.Tensor, axis: int) -> torch.Tensor:
        """Return the result `(B, 1 or K, *native)` for images `(B, C, *spatial)`, a MetaTensor if they are one.

        Args:
            slabs: finished planes, image by image.
            images: what was fed to the network, with its metadata.
            axis: the axis along which the slabs come.
        """
        places = _grid_mappings(images)
        finished: list[torch.Tensor] = []
        for _, own in itertools.groupby(slabs, key=lambda slab: slab.image):
            restorer: NativeResampler | None = None
            for slab in own:
                restorer = restorer or self._restorer(places[len(finished)], slab, axis)
                restorer.add(slab)
            if restorer is not None:
                finished.append(restorer.result())
        results = torch.stack(finished) if len(finished) > 1 else finished[0][None]
        return _on_native_grid(results, images, places) if isinstance(images, MetaTensor) else results

    def size_in_bytes(self, images: torch.Tensor, classes: int) -> int:
        """Return how large the result of these images is."""
        channels = 1 if self.output == "labels" and self.activation != "sigmoid" else classes
        each = {"labels": 1 if classes <= 256 else 4, "uint8": 1, "float16": 2}[self.output]
        return sum(math.prod(place.native_shape) for place in _grid_mappings(images)) * channels * each

    def _restorer(self, mapping: GridMapping, slab: Slab, axis: int) -> NativeResampler:
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
    """Brings the logits of any other inferer to the native grid, as labels or probabilities, plane by plane.

    So `OverlapTileInferer`, `RotationTTAInferer` or MONAI's own can stand where a bundle has a `SlidingWindowInferer`
    with `output="labels"`. The logits of the model's grid are all in memory; those of the native grid never are.

    Args:
        inferer: returns logits `(B, K, *spatial)`.
        output: "labels", "uint8" or "float16", as in `SlidingWindowInferer`.
        activation: "softmax", "sigmoid" or "none".
        threshold: of sigmoid labels.
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
            raise RequestError("NativeInferer returns labels or probabilities: use the inferer itself for logits")

    @property
    def on_progress(self) -> Any:
        """The listener of the inferer inside; called with (windows done, windows in all)."""
        return getattr(self.inferer, "on_progress", None)

    @on_progress.setter
    def on_progress(self, listener: Callable[[int, int], None] | None) -> None:
        self.inferer.on_progress = listener  # type: ignore[attr-defined]

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the result `(B, 1 or K, *native)` for images `(B, in_channels, *spatial)`.

        Raises:
            CaseError: the logits are not finite.
        """
        logits = self.inferer(inputs, network, *args, **kwargs)
        return self.result.of(_slabs(logits.detach()), inputs, 0)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise RequestError(f"'{name}' is '{value}': choose one of {', '.join(choices)}")


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
    places = [find_grid_mapping(image) for image in each]
    shapes = {place.native_shape for place in places}
    if len(shapes) > 1:
        raise RequestError(f"images loaded with different shapes {sorted(shapes)} in one batch: use batch size 1")
    return places


def _on_native_grid(results: torch.Tensor, images: MetaTensor, places: list[GridMapping]) -> MetaTensor:
    restored = MetaTensor(results).copy_meta_from(images)
    affines = torch.stack([torch.from_numpy(place.affine) for place in places])
    restored.affine = affines if images.is_batch else affines[0]
    restored.applied_operations = [[] for _ in places] if images.is_batch else []
    return restored
