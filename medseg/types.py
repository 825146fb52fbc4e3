"""Types that more than one room of the package speaks of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["SegmentationNetwork", "TrainingOutput"]


class _Logits(TypedDict):
    logits: Tensor


class TrainingOutput(_Logits, total=False):
    """What a network's `forward_train` returns.

    Attributes:
        logits: `(B, out_channels, *spatial)`, equal to what `forward` returns.
        aux: logits of auxiliary heads, shallow first, where the paper has them.
        edges: logits of boundary heads, where the paper has them.
        features: named taps in the order of computation: `E1..En` encoder (fine to coarse), `B` bottleneck,
            `Dn..D1` decoder (coarse to fine); each `(B, C, *spatial)`.
    """

    aux: list[Tensor]
    edges: list[Tensor]
    features: Mapping[str, Tensor]


class SegmentationNetwork(Protocol):
    """The contract of every class in `medseg.networks.NETWORKS`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits `(B, out_channels, *spatial)` for an image `(B, in_channels, *spatial)`."""

    def forward_train(self, x: Tensor) -> TrainingOutput:
        """Return the logits together with what training losses may need."""
