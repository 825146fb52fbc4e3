"""Deep supervision of UNet++ (Zhou et al.; DLMIA 2018, arXiv 1807.10165, section 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from medseg.errors import RequestError
from medseg.losses.training import TrainingLoss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from medseg.types import TrainingOutput

__all__ = ["BCEDiceLoss", "DeepSupervision"]


class BCEDiceLoss(nn.Module):
    """Binary cross-entropy plus soft Dice loss of sigmoid outputs, as used for each head of UNet++.

    The value is `bce_weight * BCE + 1 - Dice`; BCE is the mean over voxels and `Dice = (2*sum(y*p) + smooth) /
    (sum(y) + sum(p) + smooth)` with sums over the whole batch and all channels. (The paper prints only the positive
    half of the cross-entropy and no sums; this is the loss of the authors' code, plus 1.)

    Args:
        bce_weight: Weight of the binary cross-entropy.
        smooth: Smoothing added to numerator and denominator, so that two empty masks have Dice 1.
    """

    def __init__(self, *, bce_weight: float = 0.5, smooth: float = 1.0) -> None:
        super().__init__()
        self.bce_weight = bce_weight
        self.smooth = smooth

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the scalar loss of logits `(B, C, *spatial)` and a binary label of the same shape.

        Raises:
            RequestError: Shape mismatch, for example with a label of class indices.
        """
        if logits.shape != label.shape:
            raise RequestError(
                f"Shape mismatch: BCEDiceLoss requires logits and a binary label of the same shape, found "
                f"{tuple(logits.shape)} and {tuple(label.shape)}. For class indices use monai.losses.DiceCELoss with "
                "softmax and to_onehot_y, or provide one label channel per class."
            )
        target = label.to(logits.dtype)
        bce = F.binary_cross_entropy_with_logits(logits, target)
        p = logits.sigmoid()
        dice = (2 * (p * target).sum() + self.smooth) / (p.sum() + target.sum() + self.smooth)
        return self.bce_weight * bce + 1 - dice


class DeepSupervision(nn.Module):
    """Deep supervision: weighted mean of a loss over the heads (`aux`), or the loss of the logits without heads.

    The weighted mean keeps the scale of the loss independent of the number of heads, and so the learning rate. Any loss
    of logits and labels can be used; that of the paper for several exclusive classes is
    `monai.losses.DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True, smooth_nr=1,
    smooth_dr=1, lambda_ce=0.5)`.

    Args:
        loss: Loss of float32 logits `(B, C, *spatial)` and labels `(B, 1, *spatial)`, a scalar; `BCEDiceLoss()` by
            default.
        weights: Weight of each head, at least 0, shallowest first; equal by default. A head with weight 0 is computed
            but not trained.

    Raises:
        RequestError: Negative weight, or all weights 0.
    """

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor] | None = None, *, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if weights is not None and (any(w < 0 for w in weights) or not any(weights)):
            raise RequestError(
                f"invalid weights={list(weights)}; expected values of at least 0, and at least one above 0."
            )
        self.head_loss = TrainingLoss(BCEDiceLoss() if loss is None else loss)
        self.weights = None if weights is None else list(weights)

    def forward(self, output: TrainingOutput, label: Tensor) -> Tensor:
        """Return the scalar loss; half-precision logits are widened to float32 first.

        Raises:
            RequestError: Different numbers of heads and weights.
        """
        heads = output.get("aux") or [output["logits"]]
        weights = self.weights or [1.0] * len(heads)
        if len(weights) != len(heads):
            raise RequestError(
                f"{len(weights)} weights={weights} for {len(heads)} head(s); expected one weight per head, shallowest "
                "first, or None for the unweighted mean."
            )
        losses = torch.stack([w * self.head_loss({"logits": h}, label) for w, h in zip(weights, heads, strict=True)])
        return losses.sum() / sum(weights)
