"""The weight map of the U-Net (arXiv 1505.04597, section 3): class balance, and borders between touching objects."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.networks.layers import Pool
from monai.transforms import MapTransform
from numpy.typing import NDArray

from medseg.errors import CaseError, RequestError
from medseg.transforms.labels import MapLabelsd
from medseg.transforms.objects import number_objects
from medseg.transforms.tensors import plain_tensor, single_label, with_metadata
from medseg.transforms.traits import Traits

__all__ = ["BorderWeightMapd", "border_term", "class_balance", "two_nearest"]

# In units of sigma. Where both distances together are more, the border term is below 2e-8 of w0 and taken for 0.
_REACH = 6.0


class BorderWeightMapd(MapTransform):  # type: ignore[misc]  # MONAI publishes no types
    """From numbered objects to classes and the weights of their voxels in the loss.

    `w(x) = w_c(x) + w0 * exp(-(d1(x) + d2(x))^2 / (2 sigma^2))` with the distances `d1`, `d2` from a voxel to the
    nearest and the second nearest object. First, a voxel that touches another object (diagonals included) becomes
    background, which parts objects that touch. Put it after spatial augmentation: an object that a crop cuts off is no
    neighbor.

    Args:
        keys: the labels `(1, *spatial)` in 2D or 3D, whole numbers: 0 for background, else a number for each object.
        weight_key: where the weights `(1, *spatial)` go; the classes then stay under the label's own key. By default
            both go there, `(2, *spatial)`, as `medseg.components.WeightedCrossEntropyLoss` reads them.
        w0: largest border term.
        sigma: its width, in voxels or mm.
        class_weights: `w_c` of each class, for instance computed over the data set. By default `N / (K * n_k)` over the
            image's `N` voxels and the `K` classes that are in it, so that their mean is 1.
        components: the labels hold classes, and objects are their components, connected by faces. Otherwise every
            object is of class 1.
        mapping: that of `MapLabelsd`, applied to the labels here, where it must not merge touching objects before.
            Values under "other" are objects of their own; without "other", objects are components of the classes.
        separate: part objects that touch.
        on_foreground: add the border term within objects too.
        use_spacing: measure distances in mm.
        ignore_label: a value of the labels that marks voxels without annotation: class 0 and weight 0.
        allow_missing_keys: pass over keys that a case lacks.

    Raises:
        RequestError: a setting that cannot be, or fewer class weights than classes.
        CaseError: a label is not one channel of whole numbers from 0 up.
    """

    traits = Traits("kept")

    def __init__(
        self,
        keys: KeysCollection,
        *,
        weight_key: str | None = None,
        w0: float = 10.0,
        sigma: float = 5.0,
        class_weights: Sequence[float] | None = None,
        components: bool = False,
        mapping: Mapping[str, int] | Mapping[int, int] | None = None,
        separate: bool = True,
        on_foreground: bool = False,
        use_spacing: bool = False,
        ignore_label: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not (w0 >= 0 and sigma > 0):
            raise RequestError(f"w0={w0} and sigma={sigma}: expected w0 of 0 or more and sigma above 0.")
        if weight_key is not None and len(self.keys) > 1:
            raise RequestError(f"weight_key='{weight_key}' is one, but the labels are {len(self.keys)}: leave it out.")
        self.weight_key = weight_key
        self.w0 = w0
        self.sigma = sigma
        self.class_weights = None if class_weights is None else [float(weight) for weight in class_weights]
        self.classes = None if mapping is None else MapLabelsd("label", mapping)
        self.components = components if self.classes is None else self.classes.other is None
        self.separate = separate
        self.on_foreground = on_foreground
        self.use_spacing = use_spacing
        self.ignore_label = ignore_label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with classes and weights, float32 where they share a key; classes alone keep their type."""
        case = dict(data)
        for key in self.key_iterator(case):
            label = case[key]
            values = _whole_numbers(label, key)
            classes, weights = self._maps(values, _spacing(label, values.ndim) if self.use_spacing else None)
            if self.weight_key is None:
                case[key] = _like(label, np.stack([classes.astype(np.float32), weights]))
            else:
                case[key] = _like(label, classes[None]).to(plain_tensor(label).dtype)
                case[self.weight_key] = _like(label, weights[None])
        return case

    def _maps(
        self, values: NDArray[np.int64], spacing: Sequence[float] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        known = np.ones(values.shape, bool) if self.ignore_label is None else values != self.ignore_label
        classes = np.where(known, self._classes(values, known), 0)
        # 0 may number an object where the mapping says so.
        objects = number_objects(classes) if self.components else _numbered(np.where(classes > 0, values + 1, 0))
        if self.separate:
            objects = np.where(_touching(objects), 0, objects)
        classes = np.where(objects > 0, classes, 0)
        weights = class_balance(classes, known, self.class_weights)
        border = border_term(objects, self.w0, self.sigma, spacing=spacing)
        weights += border if self.on_foreground else np.where(objects > 0, 0, border)
        return classes, np.where(known, weights, 0).astype(np.float32)

    def _classes(self, values: NDArray[np.int64], known: NDArray[np.bool_]) -> NDArray[np.int64]:
        if self.classes is None:
            return values if self.components else (values > 0).astype(np.int64)
        # The mapping need not name the value that marks what is not known.
        named = np.where(known, values, next(iter(self.classes.mapping), 0))
        mapped: torch.Tensor = self.classes({"label": torch.from_numpy(named)})["label"]
        return np.asarray(mapped.numpy().astype(np.int64))


def class_balance(
    classes: NDArray[np.int64], known: NDArray[np.bool_], class_weights: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """Return the weight of each voxel's class.

    Args:
        classes: class indices.
        known: the voxels that count.
        class_weights: one per class; by default `N / (K * n_k)` with the `K` classes that are there.

    Raises:
        RequestError: fewer weights than classes.
    """
    counts = np.bincount(classes[known].ravel(), minlength=1)
    if class_weights is None:
        table = counts.sum() / (max(1, np.count_nonzero(counts)) * np.maximum(counts, 1))
    elif len(class_weights) < len(counts):
        raise RequestError(f"class_weights={list(class_weights)} came for a label with class {len(counts) - 1}.")
    else:
        table = np.asarray(class_weights)
    weights: NDArray[np.float32] = table.astype(np.float32)[np.where(known, classes, 0)]
    return weights


def border_term(
    objects: NDArray[np.int64], w0: float = 10.0, sigma: float = 5.0, *, spacing: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """Return `w0 * exp(-(d1 + d2)^2 / (2 sigma^2))` of every voxel; 0 with fewer than two objects.

    Args:
        objects: numbered objects, 0 for background.
        w0: the largest value.
        sigma: in voxels, or mm where `spacing` is given.
        spacing: mm between voxels along each axis.
    """
    first, second = two_nearest(objects, spacing=spacing, limit=_REACH * sigma)
    term = np.exp(-np.square(first + second) / (2 * sigma**2))
    border: NDArray[np.float32] = (w0 * term).astype(np.float32)
    return border


def two_nearest(
    objects: NDArray[np.int64], *, spacing: Sequence[float] | None = None, limit: float = math.inf
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the distances of every voxel to the nearest and to the second nearest object.

    Args:
        objects: numbered objects, 0 for background.
        spacing: mm between voxels along each axis; voxels if None.
        limit: larger distances may be given as infinity, which saves time.

    Returns:
        Two arrays, 0 within an object for the nearest, infinity where there is no object or no second one.
    """
    steps = [1.0] * objects.ndim if spacing is None else [float(step) for step in spacing]
    first = np.full(objects.shape, np.inf, np.float32)
    second = first.copy()
    for number, box in _boxes(objects):
        # An axis may be shorter than the reach, and the reach without end.
        reach = [min(math.ceil(min(limit / step, n)), n) for step, n in zip(steps, objects.shape, strict=True)]
        window = tuple(slice(max(low - r, 0), high + r) for (low, high), r in zip(box, reach, strict=True))
        distance = _distance(objects[window] == number, steps)
        np.minimum(second[window], np.maximum(first[window], distance), out=second[window])
        np.minimum(first[window], distance, out=first[window])
    return first, second


def _distance(mask: NDArray[np.bool_], steps: Sequence[float]) -> NDArray[np.float32]:
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(list(reversed(steps)))
    measure = sitk.SignedMaurerDistanceMapImageFilter()
    measure.SetInsideIsPositive(False)
    measure.SetSquaredDistance(False)
    measure.SetUseImageSpacing(True)
    # Windows are small: more threads cost more than they save.
    measure.SetNumberOfThreads(1)
    distance: NDArray[np.float32] = np.where(mask, 0, sitk.GetArrayFromImage(measure.Execute(image)))
    return distance.astype(np.float32)


def _boxes(objects: NDArray[np.int64]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield each object's number and, along each axis, its first voxel and the one after its last."""
    places = np.nonzero(objects)
    numbers = objects[places]
    if not len(numbers):
        return
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    lows = [np.minimum.reduceat(place[order], starts) for place in places]
    highs = [np.maximum.reduceat(place[order], starts) + 1 for place in places]
    for index, number in enumerate(numbers[order][starts]):
        yield int(number), [(int(low[index]), int(high[index])) for low, high in zip(lows, highs, strict=True)]


def _touching(objects: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the voxels of objects in whose 3^d neighborhood another object is."""
    values = torch.from_numpy(objects).float()[None, None]
    pool = Pool[Pool.MAX, objects.ndim](kernel_size=3, stride=1, padding=1)
    largest = pool(values)
    smallest = -pool(torch.where(values > 0, -values, -math.inf))
    found = (values > 0) & ((largest != values) | (smallest != values))
    return np.asarray(found[0, 0].numpy())


def _numbered(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number objects from 1 on; numbers of any size would not be exact in float32."""
    found, numbers = np.unique(values, return_inverse=True)
    numbers = numbers.reshape(values.shape).astype(np.int64)
    return numbers if len(found) and found[0] == 0 else numbers + 1


def _whole_numbers(label: Any, key: Hashable) -> NDArray[np.int64]:
    values = single_label(label, key)
    numbers = values.to(torch.int64)
    if values.numel() and (int(numbers.min()) < 0 or not torch.equal(numbers.to(values.dtype), values)):
        raise CaseError(f"The label '{key}' holds values that number no object: expected whole numbers from 0 up.")
    return np.asarray(numbers.numpy())


def _spacing(label: Any, dims: int) -> list[float]:
    if not isinstance(label, MetaTensor):
        raise CaseError(
            "use_spacing=True needs a label that knows its spacing (a MetaTensor); this one is a plain array."
        )
    return [float(step) for step in np.linalg.norm(label.affine.cpu().numpy()[:dims, :dims], axis=0)]


def _like(label: Any, values: NDArray[Any]) -> torch.Tensor:
    return with_metadata(torch.from_numpy(np.ascontiguousarray(values)), label)
