"""Multi-task loss of BA-Net (arXiv 2005.00966), and the edge labels it is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from monai.data import MetaTensor
from monai.networks import one_hot
from monai.networks.layers import Pool
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import RequestError, SizeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medseg.types import TrainingOutput

__all__ = ["BoundaryMultiTaskLoss", "SumOfTasksLoss", "edge_truth"]


def edge_truth(label: Tensor, *, edge_width: int | Sequence[int] = 1, border_is_edge: bool = False) -> Tensor:
    """Return the edges of a label: a band on both sides of every boundary.

    On binary masks this equals the rule of the authors, "differs from its 3^d box mean"; unlike a mean it also detects
    class 1 between the classes 0 and 2.

    Args:
        label: Class indices or binary masks `(B, C, *spatial)`; channels are processed independently.
        edge_width: Width of the band on each side in voxels, including diagonals; one number or one per axis. 0 ignores
            boundaries along an axis, for example across thick slices.
        border_is_edge: Whether an object has an edge at the image border, as in the authors' code, which pads with
            zeros.

    Returns:
        Boolean tensor of the shape of `label`.

    Raises:
        RequestError: Negative width, or a number of widths that does not match the axes.
    """
    widths = _widths(edge_width, label.dim() - 2)
    values = label.float()
    if border_is_edge:
        values = F.pad(values, _padding(widths))
    # max_pool pads with minus infinity, which never counts as a label.
    padding = 0 if border_is_edge else widths
    pool = Pool[Pool.MAX, len(widths)](kernel_size=tuple(2 * w + 1 for w in widths), stride=1, padding=padding)
    found: Tensor = pool(values) != -pool(-values)
    return found


class SumOfTasksLoss(nn.Module):
    """Weighted sum of the losses of several tasks, the general form in the article.

    Args:
        losses: Loss of each task, from a prediction and a target to a scalar.
        weights: Weight of each task; 1 by default.

    Raises:
        RequestError: Different numbers of losses and weights, or no losses.
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.weights = [1.0] * len(losses) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(losses) or not losses:
            raise RequestError(f"{len(losses)} losses and {len(self.weights)} weights: expected one weight per loss.")

    def forward(self, predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum, a scalar.

        Args:
            predictions: Prediction of each task.
            targets: Target of each task.

        Raises:
            RequestError: Number of predictions or targets different from the number of tasks.
        """
        if not len(predictions) == len(targets) == len(self.losses):
            raise RequestError(
                f"{len(predictions)} predictions and {len(targets)} targets: expected one of each for "
                f"{len(self.losses)} tasks."
            )
        tasks = zip(self.weights, self.losses, predictions, targets, strict=True)
        return torch.stack([weight * loss(found, truth) for weight, loss, found, truth in tasks]).sum()


class BoundaryMultiTaskLoss(nn.Module):
    """Loss of BA-Net: `main(logits) + sum_i weight_i * (seg(aux_i) + edge(edges_i))` over its stages.

    The edge labels are computed from the label on the fly (`edge_truth`). The presets:

    - "paper": binary cross-entropy for all tasks. A single channel represents the whole foreground, several channels
      the classes in order. There may be one edge channel (boundaries between any classes), one per class, or one per
      foreground class.
    - "official", as in the authors' code: cross-entropy, plus Dice loss in the main task. Their Dice counts the
      smoothing of 1 twice (slightly below 0 for a perfect prediction, -1 for an empty pair). Edges have two channels,
      and objects have edges at the image border.

    Args:
        preset: "paper" or "official".
        main_loss: Replacement for the main loss of the preset, from logits and the label `(B, 1, *spatial)`.
        seg_loss: Replacement for the loss of the segmentation maps of the stages.
        edge_loss: Replacement for the loss of the edge maps; the target is binary, `(B, edge_channels, *spatial)` for
            "paper" and `(B, 1, *spatial)` for "official".
        weights: Weights of the stages, one number for all or one per stage, finest first.
        class_weights: Class weights of the cross-entropy for "official".
        edge_class_weights: Weights of "no edge" and "edge" in the cross-entropy for "official".
        seg_edge_loss: Whether to add the cross-entropy of the edge labels and `|seg - box mean of seg|` for each stage
            (an option of the authors, off by default); for "official" with two classes.
        edge_width: Width of the edges, see `edge_truth`.
        border_is_edge: Whether objects have edges at the image border, see `edge_truth`; by default True for "official"
            and False for "paper".

    Raises:
        RequestError: Unknown preset, or options of the other preset.
    """

    def __init__(
        self,
        preset: str = "paper",
        *,
        main_loss: nn.Module | None = None,
        seg_loss: nn.Module | None = None,
        edge_loss: nn.Module | None = None,
        weights: float | Sequence[float] = 1.0,
        class_weights: Sequence[float] | None = None,
        edge_class_weights: Sequence[float] | None = None,
        seg_edge_loss: bool = False,
        edge_width: int | Sequence[int] = 1,
        border_is_edge: bool | None = None,
    ) -> None:
        super().__init__()
        if preset not in ("paper", "official"):
            raise RequestError(f"invalid preset={preset!r}; choose 'paper' or 'official'.")
        self.official = preset == "official"
        if not self.official and (class_weights or edge_class_weights or seg_edge_loss):
            raise RequestError(
                'class_weights, edge_class_weights and seg_edge_loss require preset="official". Remove them, or set '
                "main_loss, seg_loss and edge_loss instead."
            )
        seg = _CrossEntropy(class_weights) if self.official else _BinaryCrossEntropy()
        edge = _CrossEntropy(edge_class_weights) if self.official else _BinaryCrossEntropy()
        self.main_loss = main_loss or (_CrossEntropyDice(class_weights) if self.official else seg)
        tasks = [seg_loss or seg, edge_loss or edge]
        self.stage_loss = SumOfTasksLoss([*tasks, tasks[1]] if seg_edge_loss else tasks)
        self.weights = weights
        self.seg_edge_loss = seg_edge_loss
        self.edge_width = edge_width
        self.border_is_edge = self.official if border_is_edge is None else border_is_edge

    def forward(self, output: TrainingOutput, label: Tensor) -> Tensor:
        """Return the scalar loss; half-precision outputs are widened to float32 first.

        Args:
            output: Training output with "logits", "aux" and "edges".
            label: Class indices `(B, 1, *spatial)`; or `(B, 2, *spatial)` with a weight map if
                `WeightedCrossEntropyLoss` is one of the losses.

        Raises:
            RequestError: Missing maps of the stages, or channels that do not match the preset.
            SizeError: Shape mismatch between label and logits.
        """
        whole = label.as_tensor() if isinstance(label, MetaTensor) else label
        truth = whole[:, :1]
        logits = output["logits"].float()
        if "aux" not in output or "edges" not in output:
            raise RequestError(
                f"BoundaryMultiTaskLoss requires 'aux' and 'edges' of the stages, but the output contains "
                f"{', '.join(output)}. Use a network with both heads (use_mtl=True), or TrainingLoss for the logits "
                "only."
            )
        if truth.shape != (len(logits), 1, *logits.shape[2:]) or whole.shape[1] not in self._channels():
            raise SizeError(
                f"Shape mismatch: label {tuple(whole.shape)}, logits {tuple(logits.shape)}; expected class indices "
                f"{(len(logits), 1, *logits.shape[2:])}."
            )
        segs, edges = ([m.float() for m in maps] for maps in (output["aux"], output["edges"]))
        edge = self._edge_target(truth, segs[0].shape[1], edges[0].shape[1])
        terms = [self.main_loss(logits, _label_for(self.main_loss, whole))]
        for weight, seg_map, edge_map in zip(self._stage_weights(len(segs)), segs, edges, strict=True):
            found, wanted = [seg_map, edge_map], [_label_for(self.stage_loss.losses[0], whole), edge]
            if self.seg_edge_loss:
                found.append(self._edges_of(seg_map))
                wanted.append(edge)
            terms.append(weight * self.stage_loss(found, wanted))
        return torch.stack(terms).sum()

    def _channels(self) -> tuple[int, ...]:
        """Return the allowed numbers of label channels."""
        return (1, 2) if any(_reads_weights(loss) for loss in self.modules()) else (1,)

    def _edge_target(self, label: Tensor, classes: int, channels: int) -> Tensor:
        allowed = {2} if self.official else {1, classes, classes - 1}
        if channels not in allowed:
            raise RequestError(
                f"The edge maps have {channels} channel(s), expected "
                f"{' or '.join(map(str, sorted(allowed - {0})))} for {classes} classes and preset "
                f'"{"official" if self.official else "paper"}": set edge_channels of the network accordingly.'
            )
        masks = label if classes > 1 else label > 0
        if not self.official and channels > 1:
            masks = one_hot(label, classes)[:, classes - channels :]
        return edge_truth(masks, edge_width=self.edge_width, border_is_edge=self.border_is_edge).float()

    def _stage_weights(self, stages: int) -> list[float]:
        if isinstance(self.weights, int | float):
            return [float(self.weights)] * stages
        if len(self.weights) != stages:
            raise RequestError(
                f"invalid weights={list(self.weights)}; expected one number, or {stages} for {stages} stages."
            )
        return [float(w) for w in self.weights]

    def _edges_of(self, seg: Tensor) -> Tensor:
        """Return the absolute difference of the two segmentation channels from their box means."""
        if seg.shape[1] != 2:
            raise RequestError(f"seg_edge_loss requires two classes; the maps have {seg.shape[1]}.")
        widths = _widths(self.edge_width, seg.dim() - 2)
        pool = Pool[Pool.AVG, len(widths)](kernel_size=tuple(2 * w + 1 for w in widths), stride=1)
        means: Tensor = pool(F.pad(seg, _padding(widths)))
        return (seg - means).abs()


class _BinaryCrossEntropy(nn.Module):
    """Mean binary cross-entropy; the target has the shape of the logits, or one channel of class indices."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        channels = logits.shape[1]
        if target.shape[1] != channels:
            target = one_hot(target, channels)
        # A single channel represents the whole foreground.
        wanted = (target > 0).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, wanted)


class _CrossEntropy(nn.Module):
    """Mean cross-entropy of softmax channels and class indices `(B, 1, *spatial)`."""

    weight: Tensor | None

    def __init__(self, weight: Sequence[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", None if weight is None else torch.tensor(weight, dtype=torch.float32))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target[:, 0].long(), weight=self.weight)


class _CrossEntropyDice(_CrossEntropy):
    """Cross-entropy plus the Dice loss of the authors, averaged over images and foreground classes."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        found = logits.softmax(1)[:, 1:].flatten(2)
        truth: Tensor = one_hot(target, logits.shape[1])[:, 1:].flatten(2)
        common, total = (found * truth).sum(2), found.sum(2) + truth.sum(2)
        return super().forward(logits, target) + 1 - (2 * (common + 1) / (total + 1)).mean()


def _label_for(loss: nn.Module, label: Tensor) -> Tensor:
    """Return the class channel of a label, plus its weight map for a loss that uses it."""
    return label if _reads_weights(loss) else label[:, :1]


def _reads_weights(loss: nn.Module) -> bool:
    return bool(getattr(loss, "reads_weights", False))


def _widths(edge_width: int | Sequence[int], dims: int) -> tuple[int, ...]:
    widths = (edge_width,) * dims if isinstance(edge_width, int) else tuple(edge_width)
    if len(widths) != dims or min(widths) < 0:
        raise RequestError(
            f"invalid edge_width={edge_width!r}; expected one number of at least 0, or {dims} (one per axis)."
        )
    return widths


def _padding(widths: Sequence[int]) -> list[int]:
    return [n for width in reversed(widths) for n in (width, width)]
