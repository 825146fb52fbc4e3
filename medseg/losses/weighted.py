"""Voxelwise weighted cross-entropy (arXiv 1505.04597, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import RequestError, SizeError
from medseg.losses.dice_ce import check_classes

__all__ = ["WeightedCrossEntropyLoss"]

_REDUCTIONS = ("mean", "weighted_mean", "sum")


class WeightedCrossEntropyLoss(nn.Module):
    """Loss `-sum_x w(x) log p_l(x)(x)`, with softmax, or sigmoid for a single channel.

    Voxels with weight 0 are ignored whatever their label, for example in unannotated regions.

    Args:
        reduction: "mean" divides the sum by the number of voxels with a weight above 0, "weighted_mean" by the sum of
            the weights; "sum" does not divide.

    Raises:
        RequestError: Unknown reduction.
    """

    # Multi-task losses pass the weight map only to losses with this attribute.
    reads_weights = True

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise RequestError(f"invalid reduction={reduction!r}; choose one of {', '.join(_REDUCTIONS)}.")
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss.

        Args:
            logits: Logits `(B, C, *spatial)`.
            target: Classes (0 or 1 for a single channel of logits) and non-negative weights `(B, 2, *spatial)`, as
                computed by `medseg.components.BorderWeightMapd`.

        Raises:
            SizeError: Shape mismatch.
            RequestError: Label value out of range (checked on the CPU).
        """
        if target.shape != (len(logits), 2, *logits.shape[2:]):
            raise SizeError(
                f"Shape mismatch: target {tuple(target.shape)}, logits {tuple(logits.shape)}; expected "
                f"{(len(logits), 2, *logits.shape[2:])}, the class and the weight of each voxel (see "
                "medseg.transforms.BorderWeightMapd)."
            )
        weight = target[:, 1].to(logits.dtype)
        counted = weight > 0
        total = (weight * _cross_entropy(logits, target[:, 0], counted)).sum()
        if self.reduction == "sum":
            return total
        divisor = weight.sum() if self.reduction == "weighted_mean" else counted.sum()
        # If all weights are 0, the loss is 0 rather than 0/0.
        return total / torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def _cross_entropy(logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
    """Return the cross-entropy of every voxel `(B, *spatial)`; ignored voxels have an arbitrary finite value."""
    check_classes(torch.where(counted, label, 0), logits.shape[1])
    if logits.shape[1] == 1:
        wanted = torch.where(counted, label, 0).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits[:, 0], wanted, reduction="none")
    wanted = torch.where(counted, label.long(), -100)
    return F.cross_entropy(logits, wanted, ignore_index=-100, reduction="none")
