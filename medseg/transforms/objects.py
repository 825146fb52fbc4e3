"""From classes to objects: numbered connected components, without specks and holes."""

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
    """Number the objects of a label map from 1 on, in place of their class.

    An object is a largest set of voxels of one class that hang together by faces. Objects come in the order of their
    classes, those of a class in that of their first voxels.

    Args:
        keys: labels `(1, *spatial)` in 2D or 3D, whole numbers: 0 for background, else the class.
        min_size: objects of fewer voxels become background; their holes count where they are filled.
        fill_holes: background that an object encloses becomes part of it, and objects of its class in there, too.
        grow: voxels, diagonals included, by which each object grows into the background in the end; where two meet, the
            one of the higher number goes on. It undoes the gap between touching objects of
            `medseg.components.BorderWeightMapd`.
        enabled: False leaves the labels as they are.
        allow_missing_keys: pass over keys that a case lacks.

    Raises:
        RequestError: a size or growth below 0.
        CaseError: the entry is not one channel of labels.
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
            raise RequestError(f"min_size={min_size} and grow={grow}: expected 0 or more voxels.")
        self.min_size = min_size
        self.fill_holes = fill_holes
        self.grow = grow
        self.enabled = enabled

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with numbered objects, int32, of unchanged shape and metadata."""
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
    """Return the components of each class above 0, connected by faces and numbered from 1 on."""
    objects = np.zeros(classes.shape, np.int64)
    for value in np.unique(classes[classes > 0]):
        found = sitk.GetArrayFromImage(sitk.ConnectedComponent(_mask(classes == value)))
        objects = np.where(found > 0, found + objects.max(), objects)
    return objects


def filled(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the classes with the background that a component of one class encloses; a corner is a way out."""
    result = classes.copy()
    for value in np.unique(classes[classes > 0]):
        # Objects hang together by faces, so background does by corners, too.
        whole = sitk.GetArrayFromImage(sitk.BinaryFillhole(_mask(classes == value), fullyConnected=True))
        result[(whole > 0) & (result == 0)] = value
    return result


def without_small(objects: NDArray[np.int64], min_size: int) -> NDArray[np.int64]:
    """Return the objects of at least so many voxels, numbered anew in their order."""
    kept = np.bincount(objects.ravel(), minlength=1) >= max(min_size, 1)
    kept[0] = False
    numbers: NDArray[np.int64] = np.cumsum(kept, dtype=np.int64) * kept
    return numbers[objects]


def grown(objects: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """Return the objects after so many steps of one voxel into the background, diagonals included."""
    largest = Pool[Pool.MAX, objects.ndim](kernel_size=3, stride=1, padding=1)
    numbers = torch.from_numpy(objects).double()[None, None]
    for _ in range(steps):
        numbers = torch.where(numbers > 0, numbers, largest(numbers))
    return np.asarray(numbers[0, 0].long().numpy())


def _mask(inside: NDArray[np.bool_]) -> sitk.Image:
    return sitk.GetImageFromArray(inside.astype(np.uint8))
