"""The edge truth of a label, as BA-Net's edge branches learn it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medseg.losses.boundary import edge_truth
from medseg.transforms.tensors import plain_tensor, with_metadata
from medseg.transforms.traits import Traits

__all__ = ["LabelToEdged"]


class LabelToEdged(MapTransform):  # type: ignore[misc]  # MONAI publishes no types
    """Write the edges of a label beside it, to look at, to measure against, or to weight a loss with.

    `BoundaryMultiTaskLoss` makes the same truth on the fly and needs no transform.

    Args:
        keys: the labels, whole numbers `(C, *spatial)`; each channel by itself.
        postfix: what is added to the key of a label for the key of its edges.
        edge_width: voxels of the band on each side of a border; a number, or one per axis.
        border_is_edge: whether an object that touches the image's rim has an edge there.
        allow_missing_keys: pass over keys that a case lacks.

    Raises:
        RequestError: a width below 0, or not one for each axis.
    """

    traits = Traits("kept")

    def __init__(
        self,
        keys: KeysCollection,
        postfix: str = "_edge",
        *,
        edge_width: int | Sequence[int] = 1,
        border_is_edge: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.postfix = postfix
        self.edge_width = edge_width
        self.border_is_edge = border_is_edge

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with 0 and 1 (uint8) of each label's shape and metadata under `key + postfix`."""
        case = dict(data)
        for key in self.key_iterator(case):
            case[f"{key}{self.postfix}"] = self._edges(case[key])
        return case

    def _edges(self, label: Any) -> torch.Tensor:
        values = plain_tensor(label)[None]
        edges = edge_truth(values, edge_width=self.edge_width, border_is_edge=self.border_is_edge)[0].byte()
        return with_metadata(edges, label)
