"""From logits to class scores on one plane of the model's grid, and from scores to decisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = [
    "ACTIVATIONS",
    "OUTPUTS",
    "Decision",
    "activate",
    "background",
    "decisions",
    "empty_result",
    "packed",
    "top_class",
]

ACTIVATIONS = ("softmax", "sigmoid", "none")
OUTPUTS = ("logits", "labels", "uint8", "float16")


@dataclass(frozen=True)
class Decision:
    """One channel of labels: which classes compete for it, and how the winner is found.

    Attributes:
        classes: the channels of scores that take part.
        decide: from scores `(classes, n)` to labels `(n,)`.
    """

    classes: slice
    decide: Callable[[torch.Tensor], torch.Tensor]


def activate(logits: torch.Tensor, covered: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Return scores `(K, planes, *others)`, float32; where no window was run, certain background.

    Args:
        logits: `(K, planes, *others)`.
        covered: `(planes, *others)`, or None for everywhere.
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
    """Return the scores `(K,)` of a voxel that is certainly background."""
    scores = torch.zeros(classes)
    if activation == "softmax":
        scores[0] = 1.0
    elif activation == "none":
        scores.fill_(-1e4)
        scores[0] = 1e4 if classes > 1 else -1e4
    return scores


def decisions(classes: int, activation: str, threshold: float) -> list[Decision]:
    """Return one decision among all classes, or for sigmoid one per channel."""
    if activation == "sigmoid":
        return [Decision(slice(k, k + 1), lambda scores: (scores[0] >= threshold).byte()) for k in range(classes)]
    return [Decision(slice(0, classes), top_class)]


def top_class(scores: torch.Tensor) -> torch.Tensor:
    """Return the first highest class `(...)` of scores `(K, ...)`, uint8 up to 256 classes, else int32.

    A running maximum over the classes is several times faster than `argmax` over a leading axis.
    """
    best = scores[0].clone()
    labels = torch.zeros(best.shape, dtype=torch.uint8 if len(scores) <= 256 else torch.int32, device=scores.device)
    for k in range(1, len(scores)):
        labels.masked_fill_(scores[k] > best, k)
        torch.maximum(best, scores[k], out=best)
    return labels


def empty_result(shape: tuple[int, ...], output: str, classes: int, activation: str) -> torch.Tensor:
    """Return a result `(C, *native)` full of background, of the smallest type that holds the labels."""
    # threads that are not in inference mode write into it, too
    with torch.inference_mode(False):
        if output == "labels":
            return torch.zeros(shape, dtype=torch.uint8 if classes <= 256 else torch.int32)
        outside = packed(background(classes, activation), output)
        return outside.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()


def packed(scores: torch.Tensor, output: str) -> torch.Tensor:
    """Return probabilities as float16, or as whole numbers of 0..255."""
    return scores.half() if output == "float16" else scores.mul(255).round_().clamp_(0, 255).byte()
