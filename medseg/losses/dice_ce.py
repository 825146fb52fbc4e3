"""Memory-efficient soft Dice plus cross-entropy loss of class indices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medseg.errors import RequestError, SizeError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SoftDiceCELoss", "check_classes"]

# Values per block, small enough for the CPU cache. On a GPU a block is one image.
_BLOCK = 1 << 19


class SoftDiceCELoss(nn.Module):
    """Loss `lambda_dice * (1 - mean Dice) + lambda_ce * cross-entropy`, with softmax, or sigmoid for a single channel.

    Values and gradients equal those of `monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)` with the same options,
    up to rounding. One-hot labels and intermediate maps are computed block by block to save memory, and the backward
    pass recomputes the softmax. Second derivatives are not supported.

    With `batch=True` in distributed training, the sums are all-reduced with gradients, so every process returns the
    loss of the whole batch. The gradient is scaled for `DistributedDataParallel`, which averages over the processes:
    the average equals the gradient of a single process with the whole batch, even for different numbers of voxels per
    process. All processes must call the loss equally often. Without gradients (`torch.no_grad`) nothing is reduced.

    Args:
        include_background: Whether to include class 0 in the Dice; a single channel is always included.
        batch: Whether to sum Dice over the batch; otherwise the Dice is computed per image, without an all-reduce.
        squared_pred: Whether to square the probabilities in the denominator.
        smooth_nr: Smoothing added to the numerator.
        smooth_dr: Smoothing added to the denominator.
        lambda_dice: Weight of the Dice loss, at least 0.
        lambda_ce: Weight of the cross-entropy, at least 0.
        ignore_label: Label value of voxels to ignore.

    Raises:
        RequestError: Negative weight.
    """

    def __init__(
        self,
        *,
        include_background: bool = False,
        batch: bool = True,
        squared_pred: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"lambda_dice": lambda_dice, "lambda_ce": lambda_ce}.items():
            if not value >= 0:
                raise RequestError(f"{name}={value} is negative; expected at least 0.")
        self.include_background = include_background
        self.batch = batch
        self.squared_pred = squared_pred
        self.smooth_nr = smooth_nr
        self.smooth_dr = smooth_dr
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the scalar loss; half-precision logits are widened to float32 first.

        Args:
            logits: Logits `(B, C, *spatial)`.
            label: Class indices `(B, 1, *spatial)` of any numeric type; 0 or 1 for a single channel of logits.

        Raises:
            SizeError: Shape mismatch.
            RequestError: Label value out of range (checked on the CPU; CUDA raises its own error).
        """
        truth, counted = self._truth(logits, label)
        scores = logits if logits.dtype == torch.float64 else logits.float()
        common, found, wanted, entropy, voxels = _sums(scores.flatten(2), truth, counted, self.squared_pred)
        if self.batch:
            sums = [common.sum(0), found.sum(0), wanted.sum(0), entropy[None], voxels[None]]
            total = _over_processes(torch.cat(sums))
            common, found, wanted, entropy, voxels = torch.split(total, [len(each) for each in sums])
        dice = (2 * common + self.smooth_nr) / (found + wanted + self.smooth_dr)
        if logits.shape[1] > 1 and not self.include_background:
            dice = dice[..., 1:]
        loss: Tensor = self.lambda_dice * (1 - dice.mean()) + self.lambda_ce * (entropy / voxels.clamp_min(1)).sum()
        return loss.to(scores.dtype)

    def _truth(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the classes `(B, N)` and the mask of the voxels to count; None if all are."""
        if label.shape != (len(logits), 1, *logits.shape[2:]):
            raise SizeError(
                f"Shape mismatch: label {tuple(label.shape)}, logits {tuple(logits.shape)}; expected class indices "
                f"{(len(logits), 1, *logits.shape[2:])}."
            )
        truth = label.detach().flatten(1).long()
        counted = None
        if self.ignore_label is not None:
            counted = truth != self.ignore_label
            truth = torch.where(counted, truth, 0)
        check_classes(truth, logits.shape[1])
        return truth, counted


def check_classes(label: Tensor, channels: int) -> None:
    """Check that the values of a label on the CPU are valid classes for a number of channels.

    Raises:
        RequestError: Negative or too large value.
    """
    if label.device.type != "cpu" or not label.numel():
        return
    least, most = (int(value) for value in torch.aminmax(label))
    last = max(channels, 2) - 1
    if least < 0 or most > last:
        raise RequestError(
            f"The label contains the value {least if least < 0 else most}, expected classes 0 to {last} for "
            f"{channels} channel(s) of logits: map the values to classes (medseg.transforms.MapLabelsd), or set "
            "ignore_label if the value marks unannotated voxels."
        )


class _Sums(torch.autograd.Function):
    """Sums over voxels for Dice and cross-entropy, with their gradient.

    Inputs: logits `(B, C, N)`, classes `(B, N)`, mask of the voxels to count `(B, N)` or None, and whether to square
    probabilities.

    Outputs in float64: per image and channel `(B, C)`, the sum of probabilities at voxels of the class, the sum of all
    (squared) probabilities, and the number of voxels of the class; over all images, the sum of the cross-entropy and
    the number of counted voxels.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, truth: Tensor, counted: Tensor | None, squared: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(logits, truth, counted)
        ctx.squared = squared
        common, found, wanted = (logits.new_zeros(logits.shape[:2], dtype=torch.float64) for _ in range(3))
        entropy, voxels = (logits.new_zeros((), dtype=torch.float64) for _ in range(2))
        for image, part in _blocks(logits):
            y = truth[image, part]
            p, log_true = _probabilities(logits[image, :, part], y)
            of_truth, weight = log_true.exp(), torch.ones_like(log_true)
            if counted is not None:
                weight = counted[image, part].to(p.dtype)
                p, of_truth, log_true = p * weight, of_truth * weight, log_true * weight
            common[image] += _by_class(of_truth, y, len(p))
            wanted[image] += _by_class(weight, y, len(p))
            found[image] += (p.square_() if squared else p).sum(1)
            entropy -= log_true.sum()
        voxels += truth.numel() if counted is None else counted.sum()
        ctx.mark_non_differentiable(wanted, voxels)
        return common, found, wanted, entropy, voxels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        logits, truth, counted = ctx.saved_tensors
        of_common, of_found, _, of_entropy, _ = (slope.to(logits.dtype) for slope in slopes)
        slope = _slope_of_one if logits.shape[1] == 1 else _slope_of_many
        gradient = torch.empty_like(logits)
        for image, part in _blocks(logits):
            block = slope(
                logits[image, :, part], truth[image, part], of_common[image], of_found[image], of_entropy, ctx.squared
            )
            gradient[image, :, part] = block if counted is None else block * counted[image, part]
        return gradient, None, None, None


def _sums(logits: Tensor, truth: Tensor, counted: Tensor | None, squared: bool) -> tuple[Tensor, ...]:
    sums: tuple[Tensor, ...] = _Sums.apply(logits, truth, counted, squared)  # type: ignore[no-untyped-call]
    return sums


def _blocks(logits: Tensor) -> Iterator[tuple[int, slice]]:
    images, channels, voxels = logits.shape
    step = max(1, _BLOCK // channels) if logits.device.type == "cpu" else max(1, voxels)
    for image in range(images):
        for first in range(0, voxels, step):
            yield image, slice(first, first + step)


def _by_class(values: Tensor, truth: Tensor, channels: int) -> Tensor:
    """Return the sums `(channels,)` of values `(n,)` per class; for a single channel the sum of class 1."""
    kinds = max(channels, 2)
    if values.device.type == "cpu":
        sums = torch.bincount(truth, values.double(), kinds)
    else:
        # On CUDA bincount is not deterministic.
        sums = torch.stack([torch.where(truth == kind, values, 0).sum() for kind in range(kinds)]).double()
    return sums[kinds - channels :]


def _probabilities(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities `(C, n)` of a block, and the log probability of the true class `(n,)`."""
    if len(logits) == 1:
        positive = logits[0]
        return positive.sigmoid()[None], F.logsigmoid(torch.where(truth > 0, positive, -positive))
    logs = logits.log_softmax(0)
    log_true = logs.gather(0, truth[None])[0]
    return logs.exp_(), log_true


def _slope_of_many(
    logits: Tensor, truth: Tensor, of_common: Tensor, of_found: Tensor, of_entropy: Tensor, squared: bool
) -> Tensor:
    """Return the gradient of a block, `p_c * (g_c - sum_k p_k g_k)` for the softmax `p` with gradient `g`."""
    p = logits.softmax(0)
    at_truth = of_common.index_select(0, truth) * p.gather(0, truth[None])[0]
    used = p * p if squared else p
    share = of_found * 2 if squared else of_found
    mean = share @ used + at_truth
    if squared:
        gradient = p.mul_(of_entropy - mean).addcmul_(used, share[:, None])
    else:
        gradient = p.mul_(share[:, None] + (of_entropy - mean))
    return gradient.scatter_add_(0, truth[None], (at_truth - of_entropy)[None])


def _slope_of_one(
    logits: Tensor, truth: Tensor, of_common: Tensor, of_found: Tensor, of_entropy: Tensor, squared: bool
) -> Tensor:
    p = logits.sigmoid()
    slope = of_common * truth + of_found * (2 * p if squared else 1)
    return p * (1 - p) * slope + of_entropy * (p - truth)


def _over_processes(sums: Tensor) -> Tensor:
    """All-reduce the sums in distributed training with gradients."""
    grouped = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not grouped or not torch.is_grad_enabled():
        return sums
    added: Tensor = _AllReduce.apply(sums)  # type: ignore[no-untyped-call]
    return added


class _AllReduce(torch.autograd.Function):
    """Sum of a tensor over all processes; gradients are summed too, since the loss of each process depends on it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        added = values.clone()
        distributed.all_reduce(added)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        added = slope.clone()
        distributed.all_reduce(added)
        return added
