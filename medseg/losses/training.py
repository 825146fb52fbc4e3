"""A loss over what `forward_train` returns."""

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
        loss: takes logits `(B, C, *spatial)` in float32 and labels `(B, 1, *spatial)`, returns a scalar.
        margin: voxels that an unpadded network takes off each side, one number or one per axis. So much of the labels
            (and of weights beside them) is cut off, since no logit stands there; it was context alone.

    Raises:
        RequestError: a margin below 0.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], *, margin: Sequence[int] | int = 0) -> None:
        super().__init__()
        if min([margin] if isinstance(margin, int) else margin) < 0:
            raise RequestError(f"margin={margin} is below 0; give what the network takes off each side.")
        self.loss = loss
        self.margin = margin

    def forward(self, output: TrainingOutput, label: Tensor) -> Tensor:
        """Return the scalar loss; half-precision logits are widened to float32 first.

        Raises:
            SizeError: the labels without the margin are not as large as the logits.
        """
        target = label.as_tensor() if isinstance(label, MetaTensor) else label
        logits = output["logits"].float()
        return self.loss(logits, self._inner(target, logits.shape[2:]))

    def _inner(self, target: Tensor, size: Sequence[int]) -> Tensor:
        """Return the part of the labels `(B, C, *spatial)` that the logits of a spatial size stand for."""
        margin = (self.margin,) * len(size) if isinstance(self.margin, int) else tuple(self.margin)
        if tuple(target.shape[2:]) != tuple(n + 2 * lost for n, lost in zip(size, margin, strict=False)):
            raise SizeError(
                f"Labels of {by(target.shape[2:])} do not fit logits of {by(size)} with a margin of {by(margin)} on "
                "each side. The margin must be what the network takes off: 0 for padded networks, see the attribute "
                "`margin` of unpadded ones."
            )
        for axis, (n, lost) in enumerate(zip(size, margin, strict=False), start=2):
            target = target.narrow(axis, lost, n)
        return target
