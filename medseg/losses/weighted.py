"""Cross-entropy with a weight for each voxel (arXiv 1505.04597, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import RequestError, SizeError
from medseg.losses.dice_ce import check_classes

__all__ = ["WeightedCrossEntropyLoss"]

_REDUCTIONS = ("mean", "weighted_mean", "sum")


class WeightedCrossEntropyLoss(nn.Module):
    """`-sum_x w(x) log p_l(x)(x)`, with the softmax of several channels or the sigmoid of one.

    A voxel of weight 0 does not count at all, whatever its label; that is how unlabeled regions are left out.

    Args:
        reduction: "mean" divides the sum by the number of voxels with a weight above 0, "weighted_mean" by the sum of
            the weights, "sum" by nothing.

    Raises:
        RequestError: an unknown reduction.
    """

    # Losses that are given a label for several tasks pass the weights on where this is set.
    reads_weights = True

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise RequestError(f"reduction={reduction!r} is not known; choose one of {', '.join(_REDUCTIONS)}.")
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss.

        Args:
            logits: `(B, C, *spatial)`.
            target: `(B, 2, *spatial)`: the class (of one channel: 0 or 1) and the weight, 0 or more, as
                `medseg.components.BorderWeightMapd` makes them.

        Raises:
            SizeError: the target is not of that shape.
            RequestError: it holds a value that is no class (found on the CPU).
        """
        if target.shape != (len(logits), 2, *logits.shape[2:]):
            raise SizeError(
                f"The target has shape {tuple(target.shape)} and the logits {tuple(logits.shape)}: expected "
                f"{(len(logits), 2, *logits.shape[2:])}, the class and the weight of each voxel (see "
                "medseg.transforms.BorderWeightMapd)."
            )
        weight = target[:, 1].to(logits.dtype)
        counted = weight > 0
        total = (weight * _cross_entropy(logits, target[:, 0], counted)).sum()
        if self.reduction == "sum":
            return total
        divisor = weight.sum() if self.reduction == "weighted_mean" else counted.sum()
        # Without a voxel that counts the loss is 0, not 0/0.
        return total / torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def _cross_entropy(logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
    """Return the cross-entropy of every voxel `(B, *spatial)`; where it does not count, any finite number."""
    check_classes(torch.where(counted, label, 0), logits.shape[1])
    if logits.shape[1] == 1:
        wanted = torch.where(counted, label, 0).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits[:, 0], wanted, reduction="none")
    wanted = torch.where(counted, label.long(), -100)
    return F.cross_entropy(logits, wanted, ignore_index=-100, reduction="none")
