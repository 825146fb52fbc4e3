"""Loss of the training output of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from monai.data import MetaTensor
from torch import nn

from medseg.errors import RequestError, SizeError, by

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from medseg.types import TrainingOutput

__all__ = ["TrainingLoss"]


class TrainingLoss(nn.Module):
    """Apply a loss of logits and labels to the logits of a `TrainingOutput`.

    Args:
        loss: Loss of float32 logits `(B, C, *spatial)` and labels `(B, 1, *spatial)`, a scalar.
        margin: Voxels that an unpadded network loses on each side, one number or one per axis. Labels and weight maps
            are cropped by this margin, since it has no logits.

    Raises:
        RequestError: Negative margin.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], *, margin: Sequence[int] | int = 0) -> None:
        super().__init__()
        if min([margin] if isinstance(margin, int) else margin) < 0:
            raise RequestError(f"margin={margin} is negative; set the voxels that the network loses on each side.")
        self.loss = loss
        self.margin = margin

    def forward(self, output: TrainingOutput, label: Tensor) -> Tensor:
        """Return the scalar loss; half-precision logits are widened to float32 first.

        Raises:
            SizeError: Size mismatch between the cropped labels and the logits.
        """
        target = label.as_tensor() if isinstance(label, MetaTensor) else label
        logits = output["logits"].float()
        return self.loss(logits, self._inner(target, logits.shape[2:]))

    def _inner(self, target: Tensor, size: Sequence[int]) -> Tensor:
        """Crop the labels `(B, C, *spatial)` to the spatial size of the logits."""
        margin = (self.margin,) * len(size) if isinstance(self.margin, int) else tuple(self.margin)
        if tuple(target.shape[2:]) != tuple(n + 2 * lost for n, lost in zip(size, margin, strict=False)):
            raise SizeError(
                f"Size mismatch: labels of {by(target.shape[2:])}, logits of {by(size)} with a margin of {by(margin)} "
                "on each side. Set margin to the voxels that the network loses: 0 for padded networks, the attribute "
                "`margin` of unpadded ones."
            )
        for axis, (n, lost) in enumerate(zip(size, margin, strict=False), start=2):
            target = target.narrow(axis, lost, n)
        return target
