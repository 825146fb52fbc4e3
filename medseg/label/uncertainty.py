"""Predictive uncertainty of a network about an image, for active learning.

The uncertainty is the entropy of the probabilities averaged over the image and its mirror image. That entropy is the
expected entropy of one prediction plus their mutual information, so it also measures how much the two differ.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch

from medseg.inferers.ensemble import MirrorTTA
from medseg.inferers.native import NativeInferer
from medseg.inferers.results import plain, probabilities

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["mean_entropy", "uncertainty"]

# Voxels of certain background would dilute the mean, more in larger images.
_FOREGROUND = 0.1


def uncertainty(workflow: Any, case: Mapping[str, str]) -> float:
    """Return the mean entropy of a network's predictions for an image, 0 (certain) to 1.

    Args:
        workflow: MONAI workflow of a bundle's `inference.json`, initialized, with its weights loaded.
        case: Case to evaluate: `{"image": path, "name": ...}`.

    Raises:
        CaseError: The image cannot be used.
    """
    inferer, activation = _logits_inferer(workflow.inferer)
    network = workflow.parser.get_parsed_content("network")
    image = workflow.preprocessing(dict(case))["image"]
    was_training = network.training
    network.eval()
    mirrored = MirrorTTA(network, axes=(0,), average="probabilities", activation=activation)
    with torch.no_grad():
        logits = plain(inferer(plain(image)[None].to(workflow.device), mirrored))
    network.train(was_training)
    return mean_entropy(probabilities(logits, activation), activation)


def mean_entropy(probability: Tensor, activation: str) -> float:
    """Return the mean entropy over the possible foreground voxels, as a fraction of the maximum entropy.

    Args:
        probability: Probabilities `(B, K, *spatial)` of K exclusive classes, the background first ("softmax"), or of K
            overlapping labels ("sigmoid").
        activation: Activation of the network's output, "softmax" or "sigmoid".

    Returns:
        Mean entropy, 0 to 1; over all voxels if none is possibly foreground.
    """
    if activation == "sigmoid":
        both = torch.stack([probability, 1 - probability], dim=1)
        foreground = probability.amax(1) > _FOREGROUND
        entropy = (-torch.special.xlogy(both, both).sum(1) / math.log(2)).mean(1)
    else:
        foreground = 1 - probability[:, 0] > _FOREGROUND
        entropy = -torch.special.xlogy(probability, probability).sum(1) / math.log(probability.shape[1])
    return float((entropy[foreground] if bool(foreground.any()) else entropy).mean())


def _logits_inferer(inferer: Any) -> tuple[Any, str]:
    """Return an inferer that returns logits on the model's grid, and the activation for their probabilities."""
    if isinstance(inferer, NativeInferer):
        return inferer.inferer, _known(inferer.result.activation)
    if hasattr(inferer, "native") and hasattr(inferer, "output"):
        plainer = copy.copy(inferer)
        plainer.output, plainer.foreground = "logits", None
        # A backend rebuilds the network and does not support several passes per window.
        plainer.backend, plainer.precision, plainer.memory_format = None, "float32", "contiguous"
        return plainer, _known(inferer.native.activation)
    return inferer, "softmax"


def _known(activation: str) -> str:
    return activation if activation in ("softmax", "sigmoid") else "softmax"
