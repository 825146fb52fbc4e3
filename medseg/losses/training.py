"""A loss over what `forward_train` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from monai.data import MetaTensor
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from medseg.types import TrainingOutput

__all__ = ["TrainingLoss"]


class TrainingLoss(nn.Module):
    """Apply a loss of logits and labels to the logits of a `TrainingOutput`.

    Args:
        loss: takes logits `(B, C, *spatial)` in float32 and labels `(B, 1, *spatial)`, returns a scalar.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: TrainingOutput, label: Tensor) -> Tensor:
        """Return the scalar loss; half-precision logits are widened to float32 first."""
        target = label.as_tensor() if isinstance(label, MetaTensor) else label
        return self.loss(output["logits"].float(), target)
