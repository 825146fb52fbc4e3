"""SelfReg (Zhu et al., MICCAI 2024, arXiv 2406.14896): regularize the features of a network while it trains.

The last decoder block teaches the others (semantic consistency), and the channels of a block teach each other (feature
distillation). Nothing is added to the network; the terms read the `features` of its training output. Measured on small
networks, both terms make channels more alike: take them as regularizers, not as removers of redundancy.
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
_POOLS: dict[int, Callable[[Tensor, Any], Tensor]] = {
    3: F.adaptive_avg_pool1d,
    4: F.adaptive_avg_pool2d,
    5: F.adaptive_avg_pool3d,
}


class SelfRegTerms(TypedDict):
    """What `SelfRegLoss` returns.

    Attributes:
        total: the weighted sum, to be added to the segmentation loss.
        scr: semantic consistency over all blocks, unweighted; 0 where its weight is 0.
        ifd: feature distillation over all blocks, unweighted; 0 where its weight is 0.
        per_block: tap name -> `scr` and `ifd` of that block, without gradient.
    """

    total: Tensor
    scr: Tensor
    ifd: Tensor
    per_block: dict[str, dict[str, Tensor]]


class SemanticConsistencyLoss(nn.Module):
    """Pull the channels of a block to those of the teacher block (SCR).

    On each axis the larger map is average-pooled to the smaller one's size. Of the C and C' channels of student and
    teacher, `min(C, C')` are paired; the loss is the mean squared difference of the pairs. The teacher gets no
    gradient.

    Args:
        channel_mode: "random" pairs channels drawn anew in every call, the same for the whole batch; "expected" is
            the mean over all draws in closed form, so each channel is pulled to the mean teacher map; "first" pairs the
            first channels in order.
        feature_scale: "raw", or "l2" to bring each channel map to a root mean square of 1 before the comparison.
        generator: of the draws, on the CPU; None takes torch's global one.

    Raises:
        RequestError: an unknown option.
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
            student: `(B, C, *spatial)`.
            teacher: `(B, C', *spatial')` of as many axes.
            idx_student: channels of the student in the order of their pairing; takes the place of `channel_mode`.
            idx_teacher: their partners.

        Raises:
            SizeError: the maps are not of one batch and as many axes.
            RequestError: one of the two lists of channels is missing.
        """
        _check_pair(student, teacher)
        student, teacher = _aligned(student.float(), teacher.detach().float())
        if self.feature_scale == "l2":
            student, teacher = _unit(student), _unit(teacher)
        if (idx_student is None) != (idx_teacher is None):
            raise RequestError("channels were given for one side only; give both idx_student and idx_teacher, or none.")
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
    """Pull one half of a block's channels to the other half (IFD).

    Channels are ranked by their mean activation relative to their norm; the k-th of the upper half is compared with the
    k-th of the lower half. With an odd number of channels the middle one is left out.

    Args:
        one_way: only the lower half moves.
        p: exponent of the absolute differences, from 1 up.
        ranking: "l2" as above, or "none" to cut the channels in their own order.
        feature_scale: "raw", or "l2" to bring each channel map to a root mean square of 1 before the comparison.

    Raises:
        RequestError: an unknown option.
    """

    def __init__(
        self, *, one_way: bool = False, p: float = 2.0, ranking: str = "l2", feature_scale: str = "raw"
    ) -> None:
        super().__init__()
        _check_choice("ranking", ranking, ("l2", "none"))
        _check_choice("feature_scale", feature_scale, ("raw", "l2"))
        if not p >= 1:
            raise RequestError(f"p={p} is no exponent of this loss; choose 1 or more, 2 as in the paper's code.")
        self.one_way = one_way
        self.p = p
        self.ranking = ranking
        self.feature_scale = feature_scale

    def forward(self, feature: Tensor) -> Tensor:
        """Return the scalar loss of a map `(B, C, *spatial)`; 0 for a single channel.

        Raises:
            SizeError: the map has no spatial axis.
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
        """Return the channels `(C,)` by falling score; equal ones keep their order."""
        if self.ranking == "none":
            return torch.arange(feature.shape[1], device=feature.device)
        maps = feature.float().flatten(2)
        score = (maps.mean(2) / maps.norm(dim=2).clamp_min(1e-12)).mean(0)
        return torch.argsort(score, descending=True, stable=True)


class SelfRegLoss(nn.Module):
    """Both terms over the taps of a network.

    Students are all taps but the teacher `D1` and, as in the authors' code, the first encoder block `E1`. Computed in
    float32 also under autocast. A term whose weight is 0 is not computed and draws nothing.

    Channels are drawn from torch's global generator, so that a run seeded per step (`medseg.components.SeedSteps`)
    repeats its draws when resumed. The count of warm-up steps and the state of a private generator are part of
    `state_dict`.

    Args:
        lambda_scr: weight of the semantic consistency.
        lambda_ifd: weight of the feature distillation. (The paper and its authors' answers number the two weights
            differently, so they go by name here.)
        channel_mode: see `SemanticConsistencyLoss`.
        one_way: see `InternalFeatureDistillationLoss`; likewise `p` and `ranking`.
        p: exponent of the feature distillation.
        ranking: of channels, in the feature distillation.
        normalization: "code" averages the consistency over all taps and adds the distillation's averages over the
            encoder and over the decoder; for two taps per block (`E2_0`, `E2_1`) it does so for the first and the last
            layers and adds the results. "paper" averages over all taps, in the distillation with the teacher.
        groups: names of the student taps of "encoder" and "decoder", where they differ from the above.
        include_e1: make `E1` a student too.
        feature_scale: "raw", or "l2" to make the loss independent of the scale of activations.
        warmup_steps: training steps over which both weights rise from 0; 0 for none.
        generator: a private generator of the draws, on the CPU.

    Raises:
        RequestError: an unknown option or a negative weight.
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
                raise RequestError(f"{name}={value} is negative; give 0 or more.")
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
            features: taps `(B, C, *spatial)` by name.
            teacher: the teacher's map; the tap `D1` if None.
            indices: tap -> paired channels of student and teacher, in place of drawn ones.

        Raises:
            RequestError: a tap is missing, or its name does not tell where it belongs.
            SizeError: the maps are not of one batch and as many axes.
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
        """Return what a resumed run needs: steps done and the private generator's state."""
        return {"steps": self.steps, "generator": self.generator.get_state() if self.generator else None}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier run."""
        self.steps = int(state["steps"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

    def _students(self, features: Mapping[str, Tensor]) -> list[dict[str, list[str]]]:
        """Names of taps by group, for each layer that is tapped in a block."""
        chosen = self.groups if self.groups is not None else _groups(features, self.include_e1)
        layers: dict[str, dict[str, list[str]]] = {}
        for group, names in chosen.items():
            for name in names:
                _tap(features, name)
                match = _TAP.fullmatch(name)
                layer = layers.setdefault((match and match[2]) or "", {})
                layer.setdefault(group, []).append(name)
        if not layers:
            raise RequestError(f"no student taps among {_listed(features)}; SelfReg needs one besides the teacher.")
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
        """Return the share of the weights that this step gets, and count it."""
        share = min(1.0, self.steps / self.warmup_steps) if self.warmup_steps else 1.0
        if self.training and torch.is_grad_enabled():
            self.steps += 1
        return share


class SelfRegularizedLoss(nn.Module):
    """A loss over a training output, plus SelfReg over its features.

    The authors' segmentation loss for many organs is `monai.losses.DiceCELoss` with `softmax`, `to_onehot_y`,
    `squared_pred` and `batch` on, `smooth_nr` and `smooth_dr` 1e-5, `lambda_dice` 0.6 and `lambda_ce` 0.4.

    Args:
        loss: takes a training output and labels `(B, 1, *spatial)`, returns a scalar: `medseg.components.TrainingLoss`
            around a loss of logits, or any other loss over training outputs.
        regularizer: the SelfReg terms; the authors' weights by default.
    """

    def __init__(self, loss: TrainingOutputLoss, regularizer: SelfRegLoss | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.regularizer = SelfRegLoss() if regularizer is None else regularizer

    def forward(self, output: TrainingOutput, label: Tensor) -> Tensor:
        """Return the scalar loss.

        Raises:
            RequestError: the training output holds no features.
        """
        if "features" not in output:
            raise RequestError(
                "SelfReg reads the features of a training output, but there are none, only "
                f"{_listed(output)}. Wrap the network in medseg.components.TrainingWrapper, with taps='auto' for one "
                "of another library."
            )
        terms: SelfRegTerms = self.regularizer(output["features"])
        return self.loss(output, label) + terms["total"]


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"{option}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def _check_map(what: str, feature: Tensor) -> None:
    if feature.dim() not in _POOLS:
        raise SizeError(f"{what} is {tuple(feature.shape)}; expected (B, C, *spatial) of 1 to 3 spatial axes.")


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    _check_map("student", student)
    if student.dim() != teacher.dim() or len(student) != len(teacher):
        raise SizeError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} cannot be compared; "
            "give maps of one batch with as many spatial axes."
        )


def _aligned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pool each map, on each axis, to the smaller of the two sizes."""
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return _pooled(student, size), _pooled(teacher, size)


def _pooled(feature: Tensor, size: list[int]) -> Tensor:
    # Pooling to the size at hand would only copy the map.
    return feature if list(feature.shape[2:]) == size else _POOLS[feature.dim()](feature, size)


def _unit(feature: Tensor) -> Tensor:
    """Divide each map by its root mean square, with a floor that keeps the gradient of dead channels small."""
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
                f"tap '{name}' is none of E1..En, B, Dn..D1, so its place is not known; "
                'name the taps so, or say groups={"encoder": [...], "decoder": [...]}.'
            )
        if match[1] != _TEACHER and (include_e1 or match[1] != "E1"):
            groups["decoder" if name.startswith("D") else "encoder"].append(name)
    return groups


def _tap(features: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in features:
        raise RequestError(f"the features hold no tap '{name}', only {_listed(features)}.")
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
