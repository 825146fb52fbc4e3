"""SelfReg (Zhu et al., MICCAI 2024, arXiv 2406.14896): regularization of the features of a network during training.

The last decoder block is the teacher of the other blocks (semantic consistency), and the channels of a block are
distilled into each other (feature distillation). The network is unchanged; the terms use the `features` of its training
output. On small networks both terms made channels more similar: they act as regularizers and do not reduce redundancy.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import RequestError, SizeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from medseg.types import TrainingOutput

    Groups = Mapping[str, Sequence[str]]
    TrainingOutputLoss = Callable[[TrainingOutput, Tensor], Tensor]

__all__ = [
    "InternalFeatureDistillationLoss",
    "SelfRegLoss",
    "SelfRegTerms",
    "SelfRegularizedLoss",
    "SemanticConsistencyLoss",
]

_TEACHER = "D1"
_TAP = re.compile(r"(E\d+|B|D\d+)(?:_(\d+))?")
_POOLS: dict[int, Callable[[Tensor, Any], Tensor]] = dict(
    enumerate((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), start=3)
)


class SelfRegTerms(TypedDict):
    """Result of `SelfRegLoss`.

    Attributes:
        total: Weighted sum, to be added to the segmentation loss.
        scr: Unweighted semantic consistency over all blocks; 0 if its weight is 0.
        ifd: Unweighted feature distillation over all blocks; 0 if its weight is 0.
        per_block: `scr` and `ifd` of each block by tap name, without gradient.
    """

    total: Tensor
    scr: Tensor
    ifd: Tensor
    per_block: dict[str, dict[str, Tensor]]


class SemanticConsistencyLoss(nn.Module):
    """Semantic consistency regularization (SCR): align the channels of a block with those of the teacher block.

    On each axis the larger feature map is average-pooled to the smaller size. Of the C and C' channels of student and
    teacher, `min(C, C')` are paired; the loss is the mean squared difference of the pairs. The teacher receives no
    gradient.

    Args:
        channel_mode: "random" pairs randomly drawn channels, drawn in every call and shared by the batch; "expected" is
            the mean over all draws in closed form, which pulls each channel to the mean teacher map; "first" pairs the
            first channels in order.
        feature_scale: "raw", or "l2" to scale each channel map to a root mean square of 1 before the comparison.
        generator: Random generator on the CPU; None uses the global generator of torch.

    Raises:
        RequestError: Unknown option.
    """

    def __init__(
        self,
        channel_mode: str = "random",
        *,
        feature_scale: str = "raw",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_choice("channel_mode", channel_mode, ("random", "expected", "first"))
        _check_choice("feature_scale", feature_scale, ("raw", "l2"))
        self.channel_mode = channel_mode
        self.feature_scale = feature_scale
        self.generator = generator

    def forward(
        self, student: Tensor, teacher: Tensor, idx_student: Tensor | None = None, idx_teacher: Tensor | None = None
    ) -> Tensor:
        """Return the scalar loss.

        Args:
            student: Student feature map `(B, C, *spatial)`.
            teacher: Teacher feature map `(B, C', *spatial')` with the same number of axes.
            idx_student: Paired channels of the student; overrides `channel_mode`.
            idx_teacher: Paired channels of the teacher, in the same order.

        Raises:
            SizeError: Different batch sizes or numbers of axes.
            RequestError: Only one of the two lists of channels.
        """
        _check_pair(student, teacher)
        student, teacher = _aligned(student.float(), teacher.detach().float())
        if self.feature_scale == "l2":
            student, teacher = _unit(student), _unit(teacher)
        if (idx_student is None) != (idx_teacher is None):
            raise RequestError("only one of idx_student and idx_teacher is set: set both or neither.")
        if idx_student is None and self.channel_mode == "expected":
            mean = teacher.mean(1, keepdim=True)
            return (student - mean).square().mean() + (teacher - mean).square().mean()
        if idx_student is None or idx_teacher is None:
            idx_student, idx_teacher = self._channels(student.shape[1], teacher.shape[1])
        return (_pick(student, idx_student) - _pick(teacher, idx_teacher)).square().mean()

    def _channels(self, in_student: int, in_teacher: int) -> tuple[Tensor, Tensor]:
        count = min(in_student, in_teacher)
        if self.channel_mode == "first":
            return torch.arange(count), torch.arange(count)
        drawn = [torch.randperm(n, generator=self.generator)[:count] for n in (in_student, in_teacher)]
        return drawn[0], drawn[1]


class InternalFeatureDistillationLoss(nn.Module):
    """Internal feature distillation (IFD): align one half of the channels of a block with the other half.

    Channels are ranked by the ratio of their mean activation to their norm; the k-th channel of the upper half is
    compared with the k-th of the lower half. With an odd number of channels the middle one is skipped.

    Args:
        one_way: Whether only the lower half receives gradients.
        p: Exponent of the absolute differences, at least 1.
        ranking: "l2" as above, or "none" to keep the order of the channels.
        feature_scale: "raw", or "l2" to scale each channel map to a root mean square of 1 before the comparison.

    Raises:
        RequestError: Unknown option, or an exponent below 1.
    """

    def __init__(
        self, *, one_way: bool = False, p: float = 2.0, ranking: str = "l2", feature_scale: str = "raw"
    ) -> None:
        super().__init__()
        _check_choice("ranking", ranking, ("l2", "none"))
        _check_choice("feature_scale", feature_scale, ("raw", "l2"))
        if not p >= 1:
            raise RequestError(f"invalid exponent p={p}; expected at least 1 (2 in the code of the paper).")
        self.one_way = one_way
        self.p = p
        self.ranking = ranking
        self.feature_scale = feature_scale

    def forward(self, feature: Tensor) -> Tensor:
        """Return the scalar loss of a feature map `(B, C, *spatial)`; 0 for a single channel.

        Raises:
            SizeError: No spatial axis.
        """
        _check_map("feature", feature)
        feature = feature.float()
        half = feature.shape[1] // 2
        if half == 0:
            return feature.new_zeros(())
        order = self.order(feature)
        if self.feature_scale == "l2":
            feature = _unit(feature)
        upper, lower = _pick(feature, order[:half]), _pick(feature, order[-half:])
        difference = (upper.detach() if self.one_way else upper) - lower
        return (difference.square() if self.p == 2 else difference.abs().pow(self.p)).mean()

    @torch.no_grad()
    def order(self, feature: Tensor) -> Tensor:
        """Return the channels `(C,)` by descending score, in a stable order."""
        if self.ranking == "none":
            return torch.arange(feature.shape[1], device=feature.device)
        maps = feature.float().flatten(2)
        score = (maps.mean(2) / maps.norm(dim=2).clamp_min(1e-12)).mean(0)
        return torch.argsort(score, descending=True, stable=True)


class SelfRegLoss(nn.Module):
    """Weighted sum of semantic consistency and feature distillation over the taps of a network.

    Students are all taps except the teacher `D1` and, as in the authors' code, the first encoder block `E1`. The loss
    is computed in float32 even under autocast. A term with weight 0 is not computed and draws no random numbers.

    Channels are drawn from the global generator of torch, so a run seeded per step (`medseg.components.SeedSteps`)
    is reproducible when resumed. The number of warm-up steps and the state of a separate generator are part of
    `state_dict`.

    Args:
        lambda_scr: Weight of the semantic consistency, at least 0.
        lambda_ifd: Weight of the feature distillation, at least 0. (The paper and the answers of its authors number the
            two weights differently, hence the names.)
        channel_mode: Pairing of channels, see `SemanticConsistencyLoss`.
        one_way: Whether only the lower half receives gradients, see `InternalFeatureDistillationLoss`.
        p: Exponent of the feature distillation.
        ranking: Ranking of channels in the feature distillation.
        normalization: "code" averages the consistency over all taps and sums the averages of the distillation over the
            encoder and the decoder; with two taps per block (`E2_0`, `E2_1`) the results of the first and the last
            layers are summed. "paper" averages over all taps, including the teacher in the distillation.
        groups: Names of the student taps of "encoder" and "decoder", if different from the default.
        include_e1: Whether `E1` is a student too.
        feature_scale: "raw", or "l2" to make the loss independent of the scale of the activations.
        warmup_steps: Training steps over which both weights increase linearly from 0; 0 for no warm-up.
        generator: Separate random generator on the CPU; None uses the global generator of torch.

    Raises:
        RequestError: Unknown option or negative weight.
    """

    def __init__(
        self,
        lambda_scr: float = 0.015,
        lambda_ifd: float = 0.015,
        *,
        channel_mode: str = "random",
        one_way: bool = False,
        p: float = 2.0,
        ranking: str = "l2",
        normalization: str = "code",
        groups: Groups | None = None,
        include_e1: bool = False,
        feature_scale: str = "raw",
        warmup_steps: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_choice("normalization", normalization, ("code", "paper"))
        for name, value in {"lambda_scr": lambda_scr, "lambda_ifd": lambda_ifd, "warmup_steps": warmup_steps}.items():
            if not value >= 0:
                raise RequestError(f"{name}={value} is negative; expected at least 0.")
        self.lambda_scr = lambda_scr
        self.lambda_ifd = lambda_ifd
        self.normalization = normalization
        self.groups = groups
        self.include_e1 = include_e1
        self.warmup_steps = warmup_steps
        self.generator = generator
        self.steps = 0
        self.consistency = SemanticConsistencyLoss(channel_mode, feature_scale=feature_scale, generator=generator)
        self.distillation = InternalFeatureDistillationLoss(
            one_way=one_way, p=p, ranking=ranking, feature_scale=feature_scale
        )

    def forward(
        self,
        features: Mapping[str, Tensor],
        teacher: Tensor | None = None,
        *,
        indices: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> SelfRegTerms:
        """Return the terms for the features of one step.

        Args:
            features: Feature maps `(B, C, *spatial)` by tap name.
            teacher: Feature map of the teacher; the tap `D1` if None.
            indices: Paired channels of student and teacher by tap name, instead of random ones.

        Raises:
            RequestError: Missing tap, or a tap name that is neither encoder nor decoder.
            SizeError: Different batch sizes or numbers of axes.
        """
        if teacher is None:
            teacher = _tap(features, _TEACHER)
        students = self._students(features)
        names = [name for groups in students for group in groups.values() for name in group]
        pairs = indices or {}
        with torch.autocast(teacher.device.type, enabled=False):
            scr = {n: self.scr_pair(features[n], teacher, *pairs.get(n, ())) for n in names if self.lambda_scr}
            ifd = {n: self.ifd_block(features[n]) for n in names if self.lambda_ifd}
            if ifd and self.normalization == "paper":
                ifd[_TEACHER] = self.ifd_block(teacher)
            scr_total, ifd_total = self._totals(scr, ifd, students, zero=teacher.new_zeros((), dtype=torch.float32))
        return {
            "total": self._warmth() * (self.lambda_scr * scr_total + self.lambda_ifd * ifd_total),
            "scr": scr_total,
            "ifd": ifd_total,
            "per_block": _per_block(scr=scr, ifd=ifd),
        }

    def scr_pair(
        self, student: Tensor, teacher: Tensor, idx_student: Tensor | None = None, idx_teacher: Tensor | None = None
    ) -> Tensor:
        """Return the semantic consistency of one block (see `SemanticConsistencyLoss.forward`)."""
        loss: Tensor = self.consistency(student, teacher, idx_student, idx_teacher)
        return loss

    def ifd_block(self, feature: Tensor) -> Tensor:
        """Return the feature distillation of one block (see `InternalFeatureDistillationLoss.forward`)."""
        loss: Tensor = self.distillation(feature)
        return loss

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state for resuming: the number of steps and the state of the separate generator."""
        return {"steps": self.steps, "generator": self.generator.get_state() if self.generator else None}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state of an earlier run."""
        self.steps = int(state["steps"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

    def _students(self, features: Mapping[str, Tensor]) -> list[dict[str, list[str]]]:
        """Return the tap names by group, for each tapped layer of the blocks."""
        chosen = self.groups if self.groups is not None else _groups(features, self.include_e1)
        layers: dict[str, dict[str, list[str]]] = {}
        for group, names in chosen.items():
            for name in names:
                _tap(features, name)
                match = _TAP.fullmatch(name)
                layer = layers.setdefault((match and match[2]) or "", {})
                layer.setdefault(group, []).append(name)
        if not layers:
            raise RequestError(
                f"no student taps among {_listed(features)}; SelfReg requires one in addition to the teacher."
            )
        return list(layers.values())

    def _totals(
        self, scr: dict[str, Tensor], ifd: dict[str, Tensor], students: list[dict[str, list[str]]], *, zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.normalization == "paper":
            return _mean(scr, scr, zero), _mean(ifd, ifd, zero)
        scr_total = ifd_total = zero
        for groups in students:
            scr_total = scr_total + _mean(scr, [name for group in groups.values() for name in group], zero)
            for group in groups.values():
                ifd_total = ifd_total + _mean(ifd, group, zero)
        return scr_total, ifd_total

    def _warmth(self) -> float:
        """Return the warm-up factor of this step, and count the step."""
        share = min(1.0, self.steps / self.warmup_steps) if self.warmup_steps else 1.0
        if self.training and torch.is_grad_enabled():
            self.steps += 1
        return share


class SelfRegularizedLoss(nn.Module):
    """Sum of a loss of a training output and SelfReg of its features.

    The authors' segmentation loss for many organs is `monai.losses.DiceCELoss` with `softmax`, `to_onehot_y`,
    `squared_pred` and `batch` on, `smooth_nr` and `smooth_dr` 1e-5, `lambda_dice` 0.6 and `lambda_ce` 0.4.

    Args:
        loss: Loss of a training output and labels `(B, 1, *spatial)`, a scalar: `medseg.components.TrainingLoss`
            wrapping a loss of logits, or any other loss of training outputs.
        regularizer: SelfReg loss; by default with the weights of the authors.
    """

    def __init__(self, loss: TrainingOutputLoss, regularizer: SelfRegLoss | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.regularizer = SelfRegLoss() if regularizer is None else regularizer

    def forward(self, output: TrainingOutput, label: Tensor) -> Tensor:
        """Return the scalar loss.

        Raises:
            RequestError: Training output without features.
        """
        if "features" not in output:
            raise RequestError(
                f"SelfReg requires the features of a training output, found only {_listed(output)}. Wrap the network "
                "in medseg.components.TrainingWrapper, with taps='auto' for networks of other libraries."
            )
        terms: SelfRegTerms = self.regularizer(output["features"])
        return self.loss(output, label) + terms["total"]


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"invalid {option}={value!r}; choose one of {', '.join(map(repr, choices))}.")


def _check_map(what: str, feature: Tensor) -> None:
    if feature.dim() not in _POOLS:
        shape = tuple(feature.shape)
        raise SizeError(f"invalid {what} shape {shape}; expected (B, C, *spatial) with 1 to 3 spatial axes.")


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    _check_map("student", student)
    if student.dim() != teacher.dim() or len(student) != len(teacher):
        raise SizeError(
            f"shape mismatch: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "expected the same batch size and number of spatial axes."
        )


def _aligned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pool both maps to the smaller of the two sizes on each axis."""
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return _pooled(student, size), _pooled(teacher, size)


def _pooled(feature: Tensor, size: list[int]) -> Tensor:
    # Pooling to the same size would only copy the map.
    return feature if list(feature.shape[2:]) == size else _POOLS[feature.dim()](feature, size)


def _unit(feature: Tensor) -> Tensor:
    """Divide each map by its root mean square, with an epsilon that limits the gradient of dead channels."""
    dims = tuple(range(2, feature.dim()))
    return feature / (feature.square().mean(dims, keepdim=True) + 1e-5).sqrt()


def _pick(feature: Tensor, channels: Tensor) -> Tensor:
    return feature.index_select(1, channels.to(feature.device))


def _groups(features: Mapping[str, Tensor], include_e1: bool) -> dict[str, list[str]]:
    """Sort the names `E1..En`, `B`, `Dn..D1` into encoder and decoder, without the teacher."""
    groups: dict[str, list[str]] = {"encoder": [], "decoder": []}
    for name in features:
        match = _TAP.fullmatch(name)
        if match is None:
            raise RequestError(
                f"unknown tap name '{name}'; expected E1..En, B, Dn..D1. "
                'Rename the taps, or set groups={"encoder": [...], "decoder": [...]}.'
            )
        if match[1] != _TEACHER and (include_e1 or match[1] != "E1"):
            groups["decoder" if name.startswith("D") else "encoder"].append(name)
    return groups


def _tap(features: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in features:
        raise RequestError(f"missing tap '{name}'; the features are {_listed(features)}.")
    return features[name]


def _mean(values: Mapping[str, Tensor], names: Any, zero: Tensor) -> Tensor:
    present = [values[name] for name in names if name in values]
    return torch.stack(present).mean() if present else zero


def _per_block(**terms: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    blocks: dict[str, dict[str, Tensor]] = {}
    for term, values in terms.items():
        for name, value in values.items():
            blocks.setdefault(name, {})[term] = value.detach()
    return blocks


def _listed(names: Any) -> str:
    return ", ".join(names) or "nothing"
