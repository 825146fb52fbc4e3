"""Probabilities, class scores and labels of logits, and conversion from and to `MetaTensor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from monai.data import MetaTensor

from medseg.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "OUTPUTS",
    "SCORES",
    "Decision",
    "Plane",
    "activate",
    "as_logits",
    "background",
    "decisions",
    "empty_result",
    "packed",
    "plain",
    "probabilities",
    "top_class",
    "with_metadata",
]

ACTIVATIONS = ("softmax", "sigmoid")
SCORES = ("softmax", "sigmoid", "none")
OUTPUTS = ("logits", "labels", "uint8", "float16", "float32")

_TINY = torch.finfo(torch.float32).tiny
_EPSILON = torch.finfo(torch.float32).eps / 2


def plain(image: Tensor) -> Tensor:
    """Return the image as a plain tensor, since a `MetaTensor` copies its metadata in every operation."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


def with_metadata(result: Tensor, image: Tensor) -> Tensor:
    """Return the result as a `MetaTensor` with the metadata of the image, if it has any."""
    if not isinstance(image, MetaTensor):
        return result
    dressed: Tensor = MetaTensor(result).copy_meta_from(image, copy_attr=False)
    return dressed


def probabilities(logits: Tensor, activation: str) -> Tensor:
    """Return float32 probabilities.

    Args:
        logits: Logits `(B, K, *spatial)`.
        activation: "softmax" over the K classes, or "sigmoid" per channel.

    Raises:
        RequestError: Softmax over a single channel, which is 1 everywhere.
    """
    if activation == "sigmoid":
        return logits.float().sigmoid()
    if logits.shape[1] == 1:
        raise RequestError(
            'activation="softmax" requires two or more classes, but the network has one output channel: '
            'use activation="sigmoid"'
        )
    return logits.float().softmax(dim=1)


def as_logits(mean: Tensor, activation: str) -> Tensor:
    """Convert probabilities in place to logits whose activation returns the same probabilities.

    The logits are `log p` for "softmax" and `log(p / (1 - p))` for "sigmoid". Zeros become the logarithm of the
    smallest normal float32 (-87), or -16.6 for "sigmoid", so that all logits are finite.
    """
    return mean.logit_(_EPSILON) if activation == "sigmoid" else mean.clamp_(min=_TINY).log_()


@dataclass(frozen=True)
class Plane:
    """One plane in model space: scores `(K, H, W)`, and labels `(H, W)` of each decision."""

    scores: torch.Tensor
    labels: list[torch.Tensor]


@dataclass(frozen=True)
class Decision:
    """Decision rule of one label channel.

    Attributes:
        classes: Channels of the scores that the rule uses.
        decide: Function from scores `(classes, n)` to labels `(n,)`.
    """

    classes: slice
    decide: Callable[[torch.Tensor], torch.Tensor]


def activate(logits: torch.Tensor, covered: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Return float32 scores `(K, planes, *others)`, with background where no window was run.

    Args:
        logits: Logits `(K, planes, *others)`.
        covered: Mask `(planes, *others)` of the voxels covered by windows; None if all are.
        activation: "softmax", "sigmoid", or "none" for the logits themselves.
    """
    values = logits.float()
    if activation == "softmax":
        scores = values.softmax(0)
    else:
        scores = values.sigmoid() if activation == "sigmoid" else values.clone()
    if covered is not None:
        scores[:, ~covered] = background(len(scores), activation).to(scores.device)[:, None]
    return scores


def background(classes: int, activation: str) -> torch.Tensor:
    """Return the scores `(K,)` of a background voxel."""
    scores = torch.zeros(classes)
    if activation == "softmax":
        scores[0] = 1.0
    elif activation == "none":
        scores.fill_(-1e4)
        scores[0] = 1e4 if classes > 1 else -1e4
    return scores


def decisions(classes: int, activation: str, threshold: float) -> list[Decision]:
    """Return one decision over all classes, or one per channel for sigmoid."""
    if activation == "sigmoid":
        return [Decision(slice(k, k + 1), lambda scores: (scores[0] >= threshold).byte()) for k in range(classes)]
    return [Decision(slice(0, classes), top_class)]


def top_class(scores: torch.Tensor) -> torch.Tensor:
    """Return the arg max `(...)` of scores `(K, ...)`, as uint8 for up to 256 classes, otherwise int32.

    A running maximum over the classes is several times faster than `argmax` over a leading axis.
    """
    best = scores[0].clone()
    labels = torch.zeros(best.shape, dtype=torch.uint8 if len(scores) <= 256 else torch.int32, device=scores.device)
    for k in range(1, len(scores)):
        labels.masked_fill_(scores[k] > best, k)
        torch.maximum(best, scores[k], out=best)
    return labels


def empty_result(shape: tuple[int, ...], output: str, classes: int, activation: str) -> torch.Tensor:
    """Return a result `(C, *native)` filled with background, in the smallest data type."""
    # Not in inference mode, since other threads write into it.
    with torch.inference_mode(False):
        if output == "labels":
            return torch.zeros(shape, dtype=torch.uint8 if classes <= 256 else torch.int32)
        outside = packed(background(classes, activation), output)
        return outside.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()


def packed(scores: torch.Tensor, output: str) -> torch.Tensor:
    """Return probabilities as float32, as float16, or scaled to 0..255 as uint8."""
    if output == "float32":
        return scores.float()
    return scores.half() if output == "float16" else scores.mul(255).round_().clamp_(0, 255).byte()
