"""Where each class of a label is, noted once per case for the sampling of patches."""

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

# Places kept of each class: enough that patches of a whole training differ.
_MAX_PLACES = 10_000


class ClassIndicesd(MapTransform):  # type: ignore[misc]  # MONAI publishes no types
    """Note where each class of a label is, so that `RandWarpd` needs not search large volumes for every patch.

    It is not random, so a caching data set does it once for each case. `RandWarpd` takes the note away.

    Args:
        keys: the labels, class indices `(1, *spatial)`; of several channels the first counts.
        postfix: what is added to a label's key for the key of its note.
        max_places: voxels kept of each class, evenly drawn; always the same ones.
        ignore_label: a value that is no class.
        allow_missing_keys: pass over keys that a case lacks.
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
        """Return `data` with a list for each label: flat voxel numbers (int64) of every foreground class in it."""
        case = dict(data)
        for key in self.key_iterator(case):
            case[f"{key}{self.postfix}"] = class_places(
                plain_tensor(case[key]), self.max_places, ignore_label=self.ignore_label
            )
        return case


def class_places(label: torch.Tensor, max_places: int = _MAX_PLACES, *, ignore_label: int | None) -> list[torch.Tensor]:
    """Return flat voxel numbers, at most `max_places`, of each class above 0, in the order of the classes."""
    flat = label[0].reshape(-1)
    voxels = torch.nonzero(flat)[:, 0]
    values = flat[voxels].numpy()
    if not len(values):
        return []
    # Sorting small whole numbers takes a fraction of the time.
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
