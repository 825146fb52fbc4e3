"""What the inferers share: tensors with and without metadata, and means of probabilities that are given as logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from monai.data import MetaTensor

from medseg.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ACTIVATIONS", "as_logits", "plain", "probabilities", "with_metadata"]

ACTIVATIONS = ("softmax", "sigmoid")

_TINY = torch.finfo(torch.float32).tiny
_EPSILON = torch.finfo(torch.float32).eps / 2


def plain(image: Tensor) -> Tensor:
    """Return the image without metadata, which would be copied along with every operation."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


def with_metadata(result: Tensor, image: Tensor) -> Tensor:
    """Return the result as a `MetaTensor` with the image's metadata, if the image is one."""
    if not isinstance(image, MetaTensor):
        return result
    dressed: Tensor = MetaTensor(result).copy_meta_from(image, copy_attr=False)
    return dressed


def probabilities(logits: Tensor, activation: str) -> Tensor:
    """Return float32 probabilities.

    Args:
        logits: `(B, K, *spatial)`.
        activation: "softmax" over the K classes, or "sigmoid" for each channel by itself.

    Raises:
        RequestError: a softmax over one channel, which is 1 everywhere.
    """
    if activation == "sigmoid":
        return logits.float().sigmoid()
    if logits.shape[1] == 1:
        raise RequestError(
            'activation="softmax" needs two or more classes, and the network gives one channel. '
            'Use activation="sigmoid" for it.'
        )
    return logits.float().softmax(dim=1)


def as_logits(mean: Tensor, activation: str) -> Tensor:
    """Turn probabilities, in place, into logits that the same activation brings back to them.

    A softmax of `log p` is p, a sigmoid of `log(p / (1 - p))` is p. Zeros become the logarithm of the smallest
    float32 (-87), or -16.6 for "sigmoid", so that everything stays finite.
    """
    return mean.logit_(_EPSILON) if activation == "sigmoid" else mean.clamp_(min=_TINY).log_()
