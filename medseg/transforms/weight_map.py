"""Weight map of the U-Net (arXiv 1505.04597, section 3): class balance and borders between touching objects."""

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

# In units of sigma: for a larger sum of both distances, the border term is below 2e-8 * w0 and set to 0.
_REACH = 6.0


class BorderWeightMapd(MapTransform):  # type: ignore[misc]  # MONAI publishes no types
    """Convert instance labels to class labels and a voxelwise weight map of the loss.

    The weights are `w(x) = w_c(x) + w0 * exp(-(d1(x) + d2(x))^2 / (2 sigma^2))` with the distances `d1` and `d2` of a
    voxel to the nearest and the second nearest object. Voxels that touch another object (including diagonals) are first
    set to background, which separates touching objects. Apply this transform after spatial augmentation, so that
    objects outside a crop do not count as neighbors.

    Args:
        keys: Keys of instance labels `(1, *spatial)` in 2D or 3D, integers; 0 is background.
        weight_key: Key of the weight map `(1, *spatial)`. By default classes and weights are both stored under the key
            of the label, `(2, *spatial)`, as expected by `medseg.components.WeightedCrossEntropyLoss`.
        w0: Maximum of the border term.
        sigma: Width of the border term, in voxels or mm.
        class_weights: Weight `w_c` of each class, for example computed over the dataset. By default `N / (K * n_k)`
            with the `N` voxels of the image and its `K` classes, so that the mean is 1.
        components: Whether the labels contain classes, whose connected components (face connectivity) are the objects.
            Otherwise every object has class 1.
        mapping: Mapping as in `MapLabelsd`, applied here so that it does not merge touching objects beforehand. Values
            under "other" are separate objects; without "other", objects are the connected components of the classes.
        separate: Whether to separate touching objects.
        on_foreground: Whether to add the border term inside objects too.
        use_spacing: Whether to measure distances in mm.
        ignore_label: Label value of unannotated voxels, which get class 0 and weight 0.
        allow_missing_keys: Whether to skip keys missing in a case.

    Raises:
        RequestError: Invalid setting, or fewer class weights than classes.
        CaseError: Label with several channels, or with values that are not non-negative integers.
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
            raise RequestError(f"w0={w0} and sigma={sigma}: expected w0 of at least 0 and sigma above 0.")
        if weight_key is not None and len(self.keys) > 1:
            raise RequestError(f"weight_key='{weight_key}' supports a single label, found {len(self.keys)}: remove it.")
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
        """Return `data` with classes and weights, float32 under one key; separate classes keep their data type."""
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
        # The mapping may define 0 as an object.
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
        # The mapping need not contain the ignored value.
        named = np.where(known, values, next(iter(self.classes.mapping), 0))
        mapped: torch.Tensor = self.classes({"label": torch.from_numpy(named)})["label"]
        return np.asarray(mapped.numpy().astype(np.int64))


def class_balance(
    classes: NDArray[np.int64], known: NDArray[np.bool_], class_weights: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """Return the class weight of each voxel.

    Args:
        classes: Class indices.
        known: Mask of the annotated voxels.
        class_weights: Weight of each class; by default `N / (K * n_k)` with the `K` classes in the image.

    Raises:
        RequestError: Fewer weights than classes.
    """
    counts = np.bincount(classes[known].ravel(), minlength=1)
    if class_weights is None:
        table = counts.sum() / (max(1, np.count_nonzero(counts)) * np.maximum(counts, 1))
    elif len(class_weights) < len(counts):
        raise RequestError(f"too few class_weights={list(class_weights)} for a label with class {len(counts) - 1}.")
    else:
        table = np.asarray(class_weights)
    weights: NDArray[np.float32] = table.astype(np.float32)[np.where(known, classes, 0)]
    return weights


def border_term(
    objects: NDArray[np.int64], w0: float = 10.0, sigma: float = 5.0, *, spacing: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """Return `w0 * exp(-(d1 + d2)^2 / (2 sigma^2))` of every voxel; 0 with fewer than two objects.

    Args:
        objects: Instance labels, 0 for background.
        w0: Maximum value.
        sigma: Width in voxels, or in mm with `spacing`.
        spacing: Voxel spacing in mm along each axis.
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
        objects: Instance labels, 0 for background.
        spacing: Voxel spacing in mm along each axis; None measures in voxels.
        limit: Distance above which infinity may be returned, to save time.

    Returns:
        Distances to the nearest object (0 inside) and to the second nearest; infinity if there is none.
    """
    steps = [1.0] * objects.ndim if spacing is None else [float(step) for step in spacing]
    first = np.full(objects.shape, np.inf, np.float32)
    second = first.copy()
    for number, box in _boxes(objects):
        # The reach may be infinite or exceed the axis.
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
    # Windows are small, so more threads would be slower.
    measure.SetNumberOfThreads(1)
    distance: NDArray[np.float32] = np.where(mask, 0, sitk.GetArrayFromImage(measure.Execute(image)))
    return distance.astype(np.float32)


def _boxes(objects: NDArray[np.int64]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield the number and the half-open bounding box of each object."""
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
    """Return the mask of object voxels with another object in their 3^d neighborhood."""
    values = torch.from_numpy(objects).float()[None, None]
    pool = Pool[Pool.MAX, objects.ndim](kernel_size=3, stride=1, padding=1)
    largest = pool(values)
    smallest = -pool(torch.where(values > 0, -values, -math.inf))
    found = (values > 0) & ((largest != values) | (smallest != values))
    return np.asarray(found[0, 0].numpy())


def _numbered(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Renumber objects from 1, since large numbers are not exact in float32."""
    found, numbers = np.unique(values, return_inverse=True)
    numbers = numbers.reshape(values.shape).astype(np.int64)
    return numbers if len(found) and found[0] == 0 else numbers + 1


def _whole_numbers(label: Any, key: Hashable) -> NDArray[np.int64]:
    values = single_label(label, key)
    numbers = values.to(torch.int64)
    if values.numel() and (int(numbers.min()) < 0 or not torch.equal(numbers.to(values.dtype), values)):
        raise CaseError(f"The label '{key}' contains invalid object numbers: expected non-negative integers.")
    return np.asarray(numbers.numpy())


def _spacing(label: Any, dims: int) -> list[float]:
    if not isinstance(label, MetaTensor):
        raise CaseError("use_spacing=True requires a MetaTensor label with an affine, found a plain array.")
    return [float(step) for step in np.linalg.norm(label.affine.cpu().numpy()[:dims, :dims], axis=0)]


def _like(label: Any, values: NDArray[Any]) -> torch.Tensor:
    return with_metadata(torch.from_numpy(np.ascontiguousarray(values)), label)
