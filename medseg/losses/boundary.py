"""The multi-task loss of BA-Net (arXiv 2005.00966) and the edge truth that it learns from."""

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
    """Mark the voxels in whose neighborhood a label changes: a band on both sides of every border.

    On binary masks this is the authors' rule, "differs from its 3^d box mean"; unlike a mean it also finds the class 1
    between the classes 0 and 2.

    Args:
        label: `(B, C, *spatial)`, class indices or 0 and 1; each channel by itself.
        edge_width: voxels of the band on each side, diagonals included; a number, or one per axis (0 looks for no
            borders along that axis, e.g. across thick slices).
        border_is_edge: whether an object that touches the image's rim has an edge there, as in the authors' code,
            which sees zeros outside.

    Returns:
        Boolean tensor of the shape of `label`.

    Raises:
        RequestError: a width below 0, or not one for each axis.
    """
    widths = _widths(edge_width, label.dim() - 2)
    values = label.float()
    if border_is_edge:
        values = F.pad(values, _padding(widths))
    # Outside the image max_pool sees minus infinity, which is no label.
    padding = 0 if border_is_edge else widths
    pool = Pool[Pool.MAX, len(widths)](kernel_size=tuple(2 * w + 1 for w in widths), stride=1, padding=padding)
    found: Tensor = pool(values) != -pool(-values)
    return found


class SumOfTasksLoss(nn.Module):
    """The sum over any number of tasks of weight times loss: the article's general form.

    Args:
        losses: one per task; each takes a prediction and a target and returns a scalar.
        weights: one per task; 1 by default.

    Raises:
        RequestError: not as many weights as losses.
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.weights = [1.0] * len(losses) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(losses) or not losses:
            raise RequestError(f"{len(losses)} losses came with {len(self.weights)} weights: give one for each.")

    def forward(self, predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the scalar sum.

        Args:
            predictions: one per task.
            targets: one per task.

        Raises:
            RequestError: not as many predictions and targets as tasks.
        """
        if not len(predictions) == len(targets) == len(self.losses):
            raise RequestError(
                f"{len(self.losses)} tasks got {len(predictions)} predictions and {len(targets)} targets: give one of "
                "each for every task."
            )
        tasks = zip(self.weights, self.losses, predictions, targets, strict=True)
        return torch.stack([weight * loss(found, truth) for weight, loss, found, truth in tasks]).sum()


class BoundaryMultiTaskLoss(nn.Module):
    """`main(logits) + sum_i weight_i * (seg(aux_i) + edge(edges_i))` over the stages of a BA-Net.

    The edge truth is made from the label on the fly (`edge_truth`). The presets:

    - "paper": binary cross-entropy with logits everywhere. One channel stands for all foreground, several for the
      classes in order. Of edge channels there may be one (borders between any classes), as many as classes, or one
      fewer (without the background).
    - "official", as the authors coded it: cross-entropy, in the main task plus their Dice loss, in whose quotient the
      smoothing of 1 is doubled (a perfect prediction gives a little less than 0, an empty pair -1). Edges have two
      channels, and objects at the image's rim have edges there.

    Args:
        preset: "paper" or "official".
        main_loss: in place of the preset's: takes logits and the label `(B, 1, *spatial)`.
        seg_loss: the same, for the segmentation maps of the stages.
        edge_loss: the same, for their edge maps; its target is 0 or 1, `(B, edge_channels, *spatial)` for "paper" and
            `(B, 1, *spatial)` for "official".
        weights: of the stages, one number for all or one each, finest first.
        class_weights: of the classes in the cross-entropies of "official".
        edge_class_weights: of "no edge" and "edge" in the cross-entropy of "official".
        seg_edge_loss: adds for each stage the cross-entropy of the edge truth and `|seg - box mean of seg|` (an option
            of the authors, off there too); for "official" with two classes.
        edge_width: see `edge_truth`.
        border_is_edge: see `edge_truth`; by default so for "official" and not for "paper".

    Raises:
        RequestError: unknown preset, or options that do not belong to it.
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
            raise RequestError(f"preset={preset!r} is not known; choose 'paper' or 'official'.")
        self.official = preset == "official"
        if not self.official and (class_weights or edge_class_weights or seg_edge_loss):
            raise RequestError(
                'class_weights, edge_class_weights and seg_edge_loss belong to preset="official". Leave them out, or '
                "give main_loss, seg_loss and edge_loss of your own."
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
            output: with "logits", "aux" and "edges".
            label: class indices, `(B, 1, *spatial)`; or `(B, 2, *spatial)` with the weights that
                `WeightedCrossEntropyLoss` reads, where it is among the losses; the others do not get them.

        Raises:
            RequestError: the output lacks maps of the stages, or their channels do not fit the preset.
            SizeError: label and logits differ in size.
        """
        whole = label.as_tensor() if isinstance(label, MetaTensor) else label
        truth = whole[:, :1]
        logits = output["logits"].float()
        if "aux" not in output or "edges" not in output:
            raise RequestError(
                f"BoundaryMultiTaskLoss needs the stages' maps 'aux' and 'edges', but the output holds "
                f"{', '.join(output)}. Use a network with heads for both (use_mtl=True), or TrainingLoss for the "
                "logits alone."
            )
        if truth.shape != (len(logits), 1, *logits.shape[2:]) or whole.shape[1] not in self._channels():
            raise SizeError(
                f"The label has shape {tuple(whole.shape)} and the logits {tuple(logits.shape)}: expected a label "
                f"{(len(logits), 1, *logits.shape[2:])} of class indices."
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
        """Return how many channels a label may have."""
        return (1, 2) if any(_reads_weights(loss) for loss in self.modules()) else (1,)

    def _edge_target(self, label: Tensor, classes: int, channels: int) -> Tensor:
        allowed = {2} if self.official else {1, classes, classes - 1}
        if channels not in allowed:
            raise RequestError(
                f"The edge maps have {channels} channel(s), {classes} classes and preset "
                f'"{"official" if self.official else "paper"}" allow {" or ".join(map(str, sorted(allowed - {0})))}: '
                "build the network with such edge_channels."
            )
        masks = label if classes > 1 else label > 0
        if not self.official and channels > 1:
            masks = one_hot(label, classes)[:, classes - channels :]
        return edge_truth(masks, edge_width=self.edge_width, border_is_edge=self.border_is_edge).float()

    def _stage_weights(self, stages: int) -> list[float]:
        if isinstance(self.weights, int | float):
            return [float(self.weights)] * stages
        if len(self.weights) != stages:
            raise RequestError(f"weights={list(self.weights)} came for {stages} stages: give one number, or {stages}.")
        return [float(w) for w in self.weights]

    def _edges_of(self, seg: Tensor) -> Tensor:
        """Return what the two segmentation channels differ by from their means over the edge's neighborhood."""
        if seg.shape[1] != 2:
            raise RequestError(f"seg_edge_loss reads two classes as edge and no edge; the maps have {seg.shape[1]}.")
        widths = _widths(self.edge_width, seg.dim() - 2)
        pool = Pool[Pool.AVG, len(widths)](kernel_size=tuple(2 * w + 1 for w in widths), stride=1)
        means: Tensor = pool(F.pad(seg, _padding(widths)))
        return (seg - means).abs()


class _BinaryCrossEntropy(nn.Module):
    """Mean binary cross-entropy of logits; the target has their shape, or holds class indices in one channel."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        channels = logits.shape[1]
        if target.shape[1] != channels:
            target = one_hot(target, channels)
        # A single channel is all foreground, whatever its class.
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
    """Cross-entropy plus the authors' Dice loss, the mean over images and foreground classes."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        found = logits.softmax(1)[:, 1:].flatten(2)
        truth: Tensor = one_hot(target, logits.shape[1])[:, 1:].flatten(2)
        common, total = (found * truth).sum(2), found.sum(2) + truth.sum(2)
        return super().forward(logits, target) + 1 - (2 * (common + 1) / (total + 1)).mean()


def _label_for(loss: nn.Module, label: Tensor) -> Tensor:
    """Return the classes of a label; with the weights, where there are any, for a loss that reads them."""
    return label if _reads_weights(loss) else label[:, :1]


def _reads_weights(loss: nn.Module) -> bool:
    return bool(getattr(loss, "reads_weights", False))


def _widths(edge_width: int | Sequence[int], dims: int) -> tuple[int, ...]:
    widths = (edge_width,) * dims if isinstance(edge_width, int) else tuple(edge_width)
    if len(widths) != dims or min(widths) < 0:
        raise RequestError(
            f"edge_width={edge_width!r} does not fit: expected a number from 0 up or {dims} of them (one per axis)."
        )
    return widths


def _padding(widths: Sequence[int]) -> list[int]:
    return [n for width in reversed(widths) for n in (width, width)]
