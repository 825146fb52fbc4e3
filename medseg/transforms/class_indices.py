"""Voxel indices of the classes of a label, computed once per case for patch sampling."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medseg.transforms.tensors import plain_tensor
from medseg.transforms.traits import Traits

__all__ = ["ClassIndicesd", "class_places"]

# Voxels kept per class, enough for varied patches during a whole training.
_MAX_PLACES = 10_000


class ClassIndicesd(MapTransform):  # type: ignore[misc]  # MONAI publishes no types
    """Store the voxel indices of each class of a label, so that `RandWarpd` need not search them for every patch.

    The transform is deterministic, so a caching dataset runs it once per case. `RandWarpd` removes the entry.

    Args:
        keys: Keys of the labels, class indices `(1, *spatial)`; of several channels the first is used.
        postfix: Suffix of the key of the indices.
        max_places: Maximum number of voxels per class, drawn uniformly with a fixed seed.
        ignore_label: Label value to ignore.
        allow_missing_keys: Whether to skip keys missing in a case.
    """

    traits = Traits("kept")

    def __init__(
        self,
        keys: KeysCollection,
        postfix: str = "_places",
        *,
        max_places: int = _MAX_PLACES,
        ignore_label: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.postfix = postfix
        self.max_places = max_places
        self.ignore_label = ignore_label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with a list for each label: flat voxel indices (int64) of each foreground class."""
        case = dict(data)
        for key in self.key_iterator(case):
            case[f"{key}{self.postfix}"] = class_places(
                plain_tensor(case[key]), self.max_places, ignore_label=self.ignore_label
            )
        return case


def class_places(label: torch.Tensor, max_places: int = _MAX_PLACES, *, ignore_label: int | None) -> list[torch.Tensor]:
    """Return at most `max_places` flat voxel indices of each class above 0, in ascending order of the classes."""
    flat = label[0].reshape(-1)
    voxels = torch.nonzero(flat)[:, 0]
    values = flat[voxels].numpy()
    if not len(values):
        return []
    # Sorting int16 is several times faster.
    keys = values.astype(np.int16) if 0 <= values.min() <= values.max() < 1 << 15 else values
    order = np.argsort(keys, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)
    generator = torch.Generator().manual_seed(0)
    places = []
    for group in groups:
        if ignore_label is not None and values[group[0]] == ignore_label:
            continue
        found = voxels[torch.from_numpy(group)]
        if len(found) > max_places:
            found = found[torch.randint(len(found), (max_places,), generator=generator)]
        places.append(found)
    return places
