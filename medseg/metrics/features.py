"""Measures of network features: similarity of channels, similarity of blocks, and attention maps.

The measures are those of SelfReg (Zhu et al., MICCAI 2024, arXiv 2406.14896, figure 1). All functions take `features`
as in `medseg.types.TrainingOutput`: from `forward_train`, or recorded by `medseg.training.taps.FeatureTaps`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.errors import RequestError, SizeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from medseg.types import TrainingOutput

__all__ = [
    "attention_maps",
    "boundary_share",
    "channel_similarity",
    "energy_inside",
    "grad_cam",
    "linear_cka",
    "redundancy",
    "tap_similarity",
]

_POOLS: dict[int, Callable[[Tensor, Any], Tensor]] = {
    3: F.adaptive_avg_pool1d,
    4: F.adaptive_avg_pool2d,
    5: F.adaptive_avg_pool3d,
}
_MAX_POOLS: dict[int, Callable[..., Tensor]] = {4: F.max_pool2d, 5: F.max_pool3d}
_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


def channel_similarity(feature: Tensor) -> Tensor:
    """Return the cosine similarity of all pairs of channels, averaged over the batch.

    Args:
        feature: Feature map `(B, C, *spatial)`.

    Returns:
        Similarity matrix `(C, C)`, -1 to 1; 1 on the diagonal unless a channel is 0 everywhere.
    """
    maps = F.normalize(feature.float().flatten(2), dim=2)
    return (maps @ maps.transpose(1, 2)).mean(0)


def redundancy(feature: Tensor) -> Tensor:
    """Return the mean similarity between channels of a feature map `(B, C, *spatial)`; 0 for a single channel."""
    similarity = channel_similarity(feature)
    channels = len(similarity)
    if channels == 1:
        return similarity.new_zeros(())
    return (similarity.sum() - similarity.trace()) / (channels * (channels - 1))


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Return the linear centered kernel alignment of two feature maps (Kornblith et al., arXiv 1905.00414, section 3).

    It is invariant to orthogonal transforms and isotropic scaling of the channels.

    Args:
        first: Feature map `(B, C, *spatial)`.
        second: Feature map `(B, C', *spatial)`.

    Returns:
        Similarity, a scalar from 0 to 1.

    Raises:
        SizeError: Different batch or spatial sizes.
    """
    if first.shape[2:] != second.shape[2:] or len(first) != len(second):
        raise SizeError(
            f"shape mismatch: feature maps {tuple(first.shape)} and {tuple(second.shape)}; "
            "pool them to the same size, as tap_similarity does."
        )
    x, y = _positions(first), _positions(second)
    scale: Tensor = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    return (x.T @ y).square().sum() / scale.clamp_min(1e-12)


def tap_similarity(features: Mapping[str, Tensor]) -> Tensor:
    """Return `linear_cka` of all pairs of taps, average-pooled to the smallest size among them.

    Args:
        features: Feature maps `(B, C, *spatial)` of n taps from the same batch.

    Returns:
        Similarity matrix `(n, n)` in the order of the taps.
    """
    maps = list(features.values())
    size = [min(lengths) for lengths in zip(*(m.shape[2:] for m in maps), strict=True)]
    pooled = [_POOLS[m.dim()](m.float(), size) for m in maps]
    return torch.stack([torch.stack([linear_cka(a, b) for b in pooled]) for a in pooled])


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Return the Grad-CAM of a feature map (Selvaraju et al., ICCV 2017, section 3).

    Args:
        activation: Feature map `(B, C, *spatial)`.
        gradient: Gradient of the score with respect to the feature map, of the same shape.

    Returns:
        Non-negative map `(B, *spatial)`: the ReLU of the sum of the channels, weighted by their mean gradients.
    """
    weights = gradient.float().flatten(2).mean(2)
    return torch.einsum("bc,bc...->b...", weights, activation.float()).relu()


def attention_maps(output: TrainingOutput, label: Tensor | None = None) -> dict[str, Tensor]:
    """Return the attention of each tap to the foreground: the combined Grad-CAM maps of all foreground classes.

    The score of a class is the sum of its logits over its voxels. The maps of the classes are interpolated linearly to
    the size of the logits, scaled to 0..1, summed, and divided by the maximum per image.

    Args:
        output: Training output of the network in evaluation mode, computed with gradients enabled.
        label: Class indices `(B, 1, *spatial)` that define the voxels of each class; the prediction if None. For a
            single channel of logits, class 1 is the foreground.

    Returns:
        Map `(B, *spatial)` from 0 to 1 at the size of the logits, by tap name; all 0 if no class was found.

    Raises:
        RequestError: Training output without features or without gradients.
    """
    logits, features = output["logits"], output.get("features")
    if not features:
        raise RequestError("the training output has no features; record them with medseg.training.taps.FeatureTaps.")
    if not logits.requires_grad:
        raise RequestError("attention maps require gradients; run the network outside torch.no_grad().")
    summed = {name: logits.new_zeros(len(logits), *logits.shape[2:], dtype=torch.float32) for name in features}
    for score in _class_scores(logits, label):
        gradients = torch.autograd.grad(score, list(features.values()), retain_graph=True, materialize_grads=True)
        for (name, feature), gradient in zip(features.items(), gradients, strict=True):
            summed[name] += _unit_range(_resized(grad_cam(feature.detach(), gradient), logits.shape[2:]))
    return {name: total / _largest(total).clamp_min(1e-7) for name, total in summed.items()}


def energy_inside(attention: Tensor, mask: Tensor) -> Tensor:
    """Return the fraction of the energy of an attention map inside a mask.

    Args:
        attention: Non-negative attention map `(B, *spatial)`.
        mask: Mask of the same shape; nonzero inside.

    Returns:
        Fraction `(B,)`, 0 to 1; NaN if the map is 0 everywhere.
    """
    return _share(attention, mask != 0)


def boundary_share(attention: Tensor, mask: Tensor, width: int = 3) -> Tensor:
    """Return the fraction of the energy of an attention map near the surface of a mask.

    Args:
        attention: Non-negative attention map `(B, *spatial)`, 2D or 3D.
        mask: Mask of the same shape; nonzero inside.
        width: Distance to the surface on either side in voxels, including diagonals.

    Returns:
        Fraction `(B,)`, 0 to 1; NaN if the map is 0 everywhere.
    """
    inside = (mask != 0).float()[:, None]
    pool = _MAX_POOLS[inside.dim()]
    near = [pool(side, 2 * width + 1, stride=1, padding=width) > 0 for side in (inside, 1 - inside)]
    return _share(attention, (near[0] & near[1])[:, 0])


def _positions(feature: Tensor) -> Tensor:
    """Return a centered matrix `(positions, C)`, in float64 for sums over many positions."""
    columns = feature.double().movedim(1, -1).flatten(0, -2)
    return columns - columns.mean(0)


def _class_scores(logits: Tensor, label: Tensor | None) -> list[Tensor]:
    """Return the sum of the logits of each foreground class over the voxels of that class."""
    if logits.shape[1] == 1:
        found = logits > 0 if label is None else label != 0
        return [(logits * found).sum()]
    classes = logits.argmax(1) if label is None else label[:, 0]
    return [(logits[:, number] * (classes == number)).sum() for number in range(1, logits.shape[1])]


def _resized(cam: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(cam[:, None], size=size, mode=_LINEAR[cam.dim() + 1], align_corners=False)[:, 0]


def _unit_range(cam: Tensor) -> Tensor:
    dims = tuple(range(1, cam.dim()))
    low = cam.amin(dims, keepdim=True)
    return (cam - low) / (_largest(cam) - low + 1e-7)


def _largest(cam: Tensor) -> Tensor:
    return cam.amax(tuple(range(1, cam.dim())), keepdim=True)


def _share(attention: Tensor, where: Tensor) -> Tensor:
    mass = attention.float().flatten(1)
    return (mass * where.flatten(1)).sum(1) / mass.sum(1)
