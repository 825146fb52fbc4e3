"""Instance labels from class labels: connected components, with small objects removed and holes filled."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.networks.layers import Pool
from monai.transforms import MapTransform
from numpy.typing import NDArray

from medseg.errors import RequestError
from medseg.transforms.tensors import single_label, with_metadata
from medseg.transforms.traits import Traits

__all__ = ["NumberObjectsd", "filled", "grown", "number_objects", "without_small"]


class NumberObjectsd(MapTransform):  # type: ignore[misc]  # MONAI publishes no types
    """Replace the classes of a label by instance labels, numbered from 1.

    An object is a connected component of one class with face connectivity. Objects are ordered by class, and within a
    class by their first voxel.

    Args:
        keys: Keys of class labels `(1, *spatial)` in 2D or 3D; 0 is background.
        min_size: Minimum object size in voxels, including filled holes; smaller objects become background.
        fill_holes: Whether to fill enclosed background, including objects of the same class inside it.
        grow: Number of voxels by which objects are dilated into the background at the end, including diagonals; where
            two meet, the higher number wins. Closes the gap between touching objects of
            `medseg.components.BorderWeightMapd`.
        enabled: False returns the labels unchanged.
        allow_missing_keys: Whether to skip keys missing in a case.

    Raises:
        RequestError: Negative size or dilation.
        CaseError: More than one channel.
    """

    traits = Traits("kept")

    def __init__(
        self,
        keys: KeysCollection,
        *,
        min_size: int = 0,
        fill_holes: bool = False,
        grow: int = 0,
        enabled: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if min_size < 0 or grow < 0:
            raise RequestError(f"min_size={min_size} and grow={grow}: expected at least 0 voxels.")
        self.min_size = min_size
        self.fill_holes = fill_holes
        self.grow = grow
        self.enabled = enabled

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with instance labels (int32), with unchanged shape and metadata."""
        case = dict(data)
        for key in self.key_iterator(case):
            if self.enabled:
                classes = np.asarray(single_label(case[key], key).to(torch.int64).numpy())
                numbers = torch.from_numpy(self._numbered(classes).astype(np.int32))[None]
                case[key] = with_metadata(numbers, case[key])
        return case

    def _numbered(self, classes: NDArray[np.int64]) -> NDArray[np.int64]:
        objects = number_objects(filled(classes) if self.fill_holes else classes)
        return grown(without_small(objects, self.min_size), self.grow)


def number_objects(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the connected components of each class above 0, with face connectivity, numbered from 1."""
    objects = np.zeros(classes.shape, np.int64)
    for value in np.unique(classes[classes > 0]):
        found = sitk.GetArrayFromImage(sitk.ConnectedComponent(_mask(classes == value)))
        objects = np.where(found > 0, found + objects.max(), objects)
    return objects


def filled(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the classes with filled holes; background that leaks through a corner is not a hole."""
    result = classes.copy()
    for value in np.unique(classes[classes > 0]):
        # With face connectivity of objects, the background has full connectivity.
        whole = sitk.GetArrayFromImage(sitk.BinaryFillhole(_mask(classes == value), fullyConnected=True))
        result[(whole > 0) & (result == 0)] = value
    return result


def without_small(objects: NDArray[np.int64], min_size: int) -> NDArray[np.int64]:
    """Return the objects of at least `min_size` voxels, renumbered in their order."""
    kept = np.bincount(objects.ravel(), minlength=1) >= max(min_size, 1)
    kept[0] = False
    numbers: NDArray[np.int64] = np.cumsum(kept, dtype=np.int64) * kept
    return numbers[objects]


def grown(objects: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """Return the objects dilated by `steps` voxels into the background, including diagonals."""
    largest = Pool[Pool.MAX, objects.ndim](kernel_size=3, stride=1, padding=1)
    numbers = torch.from_numpy(objects).double()[None, None]
    for _ in range(steps):
        numbers = torch.where(numbers > 0, numbers, largest(numbers))
    return np.asarray(numbers[0, 0].long().numpy())


def _mask(inside: NDArray[np.bool_]) -> sitk.Image:
    return sitk.GetImageFromArray(inside.astype(np.uint8))
