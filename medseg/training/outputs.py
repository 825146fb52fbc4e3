"""From a network to what training engines call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from monai.data import MetaTensor
from torch import nn

from medseg.errors import RequestError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from medseg.types import TrainingOutput

__all__ = ["TrainingOutputs"]

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class TrainingOutputs(nn.Module):
    """Make `forward` of the wrapped network return its whole `TrainingOutput`.

    The engine trains the wrapper; checkpoints hold the bare network, so its weights carry no prefix. A network without
    `forward_train`, such as MONAI's own, gives its logits alone.

    Args:
        network: the network to train.
        precision: `float32`, or `bfloat16` for autocast on the network's device (weights stay float32).

    Raises:
        RequestError: an unknown precision.
    """

    def __init__(self, network: nn.Module, *, precision: str = "float32") -> None:
        super().__init__()
        if precision not in _PRECISIONS:
            raise RequestError(f"unknown precision '{precision}'; use one of {', '.join(_PRECISIONS)}")
        self.network = network
        self.precision = precision

    def forward(self, x: torch.Tensor) -> TrainingOutput:
        """Return the training output for an image `(B, in_channels, *spatial)`."""
        # Metadata would be copied along with every layer's output.
        image = x.as_tensor() if isinstance(x, MetaTensor) else x
        forward_train = getattr(self.network, "forward_train", None)
        with self._autocast(image.device.type):
            if forward_train is None:
                return {"logits": self.network(image)}
            output: TrainingOutput = forward_train(image)
            return output

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        dtype = _PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)
