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
    """Binary cross-entropy plus soft Dice loss of sigmoid outputs, as on each head of UNet++.

    The value is `bce_weight * BCE + 1 - Dice`; BCE is the mean over voxels and `Dice = (2*sum(y*p) + smooth) /
    (sum(y) + sum(p) + smooth)` with sums over the whole batch and all channels. (The paper prints the positive half of
    the cross-entropy and no sums; this is what its authors computed, plus 1.)

    Args:
        bce_weight: of the cross-entropy.
        smooth: added to both sides of the fraction, so that two empty masks agree.
    """

    def __init__(self, *, bce_weight: float = 0.5, smooth: float = 1.0) -> None:
        super().__init__()
        self.bce_weight = bce_weight
        self.smooth = smooth

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the scalar loss of logits `(B, C, *spatial)` and labels 0 or 1 of the same shape.

        Raises:
            RequestError: the shapes differ, e.g. because the label counts classes.
        """
        if logits.shape != label.shape:
            raise RequestError(
                f"BCEDiceLoss compares logits and 0/1 labels of one shape; it got {tuple(logits.shape)} and "
                f"{tuple(label.shape)}. For a map of class numbers use monai.losses.DiceCELoss with softmax and "
                "to_onehot_y, or give one label channel per class."
            )
        target = label.to(logits.dtype)
        bce = F.binary_cross_entropy_with_logits(logits, target)
        p = logits.sigmoid()
        dice = (2 * (p * target).sum() + self.smooth) / (p.sum() + target.sum() + self.smooth)
        return self.bce_weight * bce + 1 - dice


class DeepSupervision(nn.Module):
    """Average a loss over the heads (`aux`) of a `TrainingOutput`; without heads, take it of the logits.

    The weighted mean keeps the scale of the loss, so a learning rate stays right when heads come or go. Any loss of
    logits and labels fits; the paper's for several exclusive classes is `monai.losses.DiceCELoss(softmax=True,
    to_onehot_y=True, include_background=False, batch=True, smooth_nr=1, smooth_dr=1, lambda_ce=0.5)`.

    Args:
        loss: takes logits `(B, C, *spatial)` in float32 and labels `(B, 1, *spatial)`, returns a scalar;
            `BCEDiceLoss()` by default.
        weights: one per head, shallow first, from 0 up; equal by default. With 0 a head is computed, not trained.

    Raises:
        RequestError: a negative weight, or none above 0.
    """

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor] | None = None, *, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if weights is not None and (any(w < 0 for w in weights) or not any(weights)):
            raise RequestError(f"weights={list(weights)} must be 0 or more per head, and one of them above 0.")
        self.head_loss = TrainingLoss(BCEDiceLoss() if loss is None else loss)
        self.weights = None if weights is None else list(weights)

    def forward(self, output: TrainingOutput, label: Tensor) -> Tensor:
        """Return the scalar loss; half-precision logits are widened to float32 first.

        Raises:
            RequestError: another number of heads than of weights.
        """
        heads = output.get("aux") or [output["logits"]]
        weights = self.weights or [1.0] * len(heads)
        if len(weights) != len(heads):
            raise RequestError(
                f"weights={weights} are {len(weights)} and the network has {len(heads)} head(s); give one weight per "
                "head, shallow first, or none for the plain mean."
            )
        losses = torch.stack([w * self.head_loss({"logits": h}, label) for w, h in zip(weights, heads, strict=True)])
        return losses.sum() / sum(weights)
