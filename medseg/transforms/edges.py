"""Edge labels as used for the edge branches of BA-Net."""

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
    """Add the edges of a label as a separate entry, for visualization, metrics or weight maps.

    `BoundaryMultiTaskLoss` computes the same edges on the fly and does not need this transform.

    Args:
        keys: Keys of the labels, integers `(C, *spatial)`; channels are processed independently.
        postfix: Suffix of the key of the edges.
        edge_width: Width of the band on each side of a boundary in voxels, one number or one per axis.
        border_is_edge: Whether an object has an edge at the image border.
        allow_missing_keys: Whether to skip keys missing in a case.

    Raises:
        RequestError: Negative width, or a number of widths that does not match the axes.
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
        """Return `data` with binary edges (uint8) under `key + postfix`, with the shape and metadata of the label."""
        case = dict(data)
        for key in self.key_iterator(case):
            case[f"{key}{self.postfix}"] = self._edges(case[key])
        return case

    def _edges(self, label: Any) -> torch.Tensor:
        values = plain_tensor(label)[None]
        edges = edge_truth(values, edge_width=self.edge_width, border_is_edge=self.border_is_edge)[0].byte()
        return with_metadata(edges, label)
