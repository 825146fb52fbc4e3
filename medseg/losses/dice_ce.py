"""Soft Dice plus cross-entropy of class indices, without copies of the logits."""

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

# Values that are worked on at once: they stay in the processor's cache. A GPU takes an image at a time.
_BLOCK = 1 << 19


class SoftDiceCELoss(nn.Module):
    """`lambda_dice * (1 - mean Dice) + lambda_ce * cross-entropy`; softmax of several channels, sigmoid of one.

    Values and gradients are those of `monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)` with the same options,
    to rounding. The label's one-hot form and maps of the logits' size are made block by block, not whole; the backward
    pass computes the softmax again. There is no second derivative.

    With `batch=True` in a process group of several processes (`torch.distributed`) the sums are taken over all of them
    by an all-reduce that gradients pass through, so every process returns the loss of the whole batch. Its gradient is
    scaled for the mean over the processes that `DistributedDataParallel` takes: after that mean it is the gradient of
    one process with the whole batch, also where the processes' voxels differ in number. Every process has to call the
    loss as often. Without gradients (`torch.no_grad`) each process is on its own.

    Args:
        include_background: whether the Dice of class 0 counts; a single channel counts always.
        batch: take the sums of Dice over the batch. Otherwise each image has its Dice, and nothing is exchanged.
        squared_pred: square the probabilities in the denominator.
        smooth_nr: added to the numerator.
        smooth_dr: added to the denominator.
        lambda_dice: weight of Dice, 0 or more.
        lambda_ce: weight of the cross-entropy, 0 or more.
        ignore_label: a value of the label that marks voxels that do not count.

    Raises:
        RequestError: a negative weight.
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
                raise RequestError(f"{name}={value} is negative; give 0 or more.")
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
            logits: `(B, C, *spatial)`.
            label: class indices `(B, 1, *spatial)` of any number type; of one channel 0 or 1.

        Raises:
            SizeError: the label is not of that shape.
            RequestError: it holds a value that is no class (found on the CPU; CUDA stops by itself).
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
        """Return the classes `(B, N)`, and which voxels count, where not all do."""
        if label.shape != (len(logits), 1, *logits.shape[2:]):
            raise SizeError(
                f"The label has shape {tuple(label.shape)} and the logits {tuple(logits.shape)}: expected a label "
                f"{(len(logits), 1, *logits.shape[2:])} of class indices."
            )
        truth = label.detach().flatten(1).long()
        counted = None
        if self.ignore_label is not None:
            counted = truth != self.ignore_label
            truth = torch.where(counted, truth, 0)
        check_classes(truth, logits.shape[1])
        return truth, counted


def check_classes(label: Tensor, channels: int) -> None:
    """Refuse a label on the CPU that holds what is no class of so many channels.

    Raises:
        RequestError: a value is negative or too large.
    """
    if label.device.type != "cpu" or not label.numel():
        return
    least, most = (int(value) for value in torch.aminmax(label))
    last = max(channels, 2) - 1
    if least < 0 or most > last:
        raise RequestError(
            f"The label holds the value {least if least < 0 else most}, but {channels} channel(s) of logits stand for "
            f"the classes 0 to {last}: map the values to classes (medseg.transforms.MapLabelsd), or tell the loss to "
            "ignore the value where it marks voxels without annotation."
        )


class _Sums(torch.autograd.Function):
    """Sums over voxels that make up Dice and cross-entropy, and their gradient.

    In: logits `(B, C, N)`, classes `(B, N)`, which voxels count `(B, N)` or None, whether to square probabilities.

    Out, in float64: of each image and channel the sum of probabilities where the class is the truth, the sum of all
    (squared) probabilities, and the number of voxels of the class, `(B, C)` each; over all images the cross-entropy and
    the number of voxels that count.
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
    """Return the sums `(channels,)` of values `(n,)` where each class is the truth; of one channel those of class 1."""
    kinds = max(channels, 2)
    if values.device.type == "cpu":
        sums = torch.bincount(truth, values.double(), kinds)
    else:
        # There bincount adds in no fixed order.
        sums = torch.stack([torch.where(truth == kind, values, 0).sum() for kind in range(kinds)]).double()
    return sums[kinds - channels :]


def _probabilities(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities `(C, n)` of a block, and the logarithm of that of the truth `(n,)`."""
    if len(logits) == 1:
        positive = logits[0]
        return positive.sigmoid()[None], F.logsigmoid(torch.where(truth > 0, positive, -positive))
    logs = logits.log_softmax(0)
    log_true = logs.gather(0, truth[None])[0]
    return logs.exp_(), log_true


def _slope_of_many(
    logits: Tensor, truth: Tensor, of_common: Tensor, of_found: Tensor, of_entropy: Tensor, squared: bool
) -> Tensor:
    """Return the gradient of a block; through the softmax `p` it is `p_c * (g_c - sum_k p_k g_k)`, `g` that of `p`."""
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
    """Add up the sums of all processes, where there are several and gradients are wanted."""
    grouped = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not grouped or not torch.is_grad_enabled():
        return sums
    added: Tensor = _AllReduce.apply(sums)  # type: ignore[no-untyped-call]
    return added


class _AllReduce(torch.autograd.Function):
    """The sum of a tensor over all processes. Each process's loss depends on it, so gradients are added up as well."""

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
