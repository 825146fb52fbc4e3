"""Several predictions of one window, averaged: flipped images (as in nnU-Net), and several networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from medseg.errors import RequestError, SizeError, WeightsError
from medseg.inferers.results import ACTIVATIONS, as_logits, probabilities
from medseg.networks.options import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from medseg.networks.sizes import ValidSizes

__all__ = ["Ensemble", "MirrorTTA"]

_AVERAGES = ("logits", "probabilities")


class MirrorTTA(nn.Module):
    """Average a network's predictions over the image and its mirror images.

    The image is flipped along every subset of the axes (8 predictions for three axes), predicted and flipped back.
    Give it to an inferer in place of the network: it then works window by window.

    Args:
        network: gives logits `(B, K, *spatial)`.
        axes: spatial axes to flip, counted from 0; None for all of the image's.
        average: "logits", as nnU-Net does, or "probabilities".
        activation: what makes probabilities of the logits, "softmax" or "sigmoid".

    Attributes:
        valid_sizes: the network's, if it is unpadded (see `medseg.components.OverlapTileInferer`).

    Raises:
        RequestError: an axis twice or below 0, or an option that is not known.
    """

    def __init__(
        self,
        network: nn.Module,
        axes: Sequence[int] | None = None,
        *,
        average: str = "logits",
        activation: str = "softmax",
    ) -> None:
        super().__init__()
        if axes is not None and (len(set(axes)) != len(axes) or min(axes, default=0) < 0):
            raise RequestError(f"axes={list(axes)} must be different spatial axes, counted from 0.")
        self.network = network
        self.axes = None if axes is None else tuple(axes)
        self.mean = _Mean(average, activation)

    @property
    def valid_sizes(self) -> ValidSizes | None:
        """Sizes that an unpadded network takes and gives; None for any other."""
        return getattr(self.network, "valid_sizes", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, K, *spatial)` for an image `(B, C, *spatial)`; averaged ones are float32.

        Raises:
            SizeError: the image has too few axes.
        """
        dims = x.dim() - 2
        axes = range(dims) if self.axes is None else self.axes
        if max(axes, default=-1) >= dims:
            raise SizeError(f"axes={list(axes)} do not fit an image of {dims} spatial axes, counted from 0.")
        flips = [[axis + 2 for axis in chosen] for n in range(len(axes) + 1) for chosen in combinations(axes, n)]
        return self.mean((1.0, partial(self._flipped, x, flip)) for flip in flips)

    def _flipped(self, x: Tensor, flip: list[int]) -> Tensor:
        if not flip:
            return _logits_of(self.network, x)
        return _logits_of(self.network, x.flip(flip)).flip(flip)


class Ensemble(nn.Module):
    """Average the predictions of several networks, such as the folds of a cross-validation or several checkpoints.

    Give it to an inferer in place of the network: it then works window by window.

    Args:
        networks: one or more, each of which gives logits `(B, K, *spatial)` of the same shape.
        average: "probabilities", or "logits".
        weights: how much each network counts, positive; equal by default. Only their ratios matter.
        activation: what makes probabilities of the logits, "softmax" or "sigmoid".

    Attributes:
        valid_sizes: of the first network, if it is unpadded (see `medseg.components.OverlapTileInferer`).

    Raises:
        RequestError: no network, weights that do not fit, or an option that is not known.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        average: str = "probabilities",
        weights: Sequence[float] | None = None,
        *,
        activation: str = "softmax",
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        if not self.networks:
            raise RequestError("an Ensemble needs one network at least.")
        self.weights = [1.0] * len(self.networks) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.networks) or not all(w > 0 and math.isfinite(w) for w in self.weights):
            raise RequestError(
                f"weights={weights} do not fit {len(self.networks)} network(s): give one positive number for each."
            )
        self.mean = _Mean(average, activation)

    @classmethod
    def from_state_dicts(cls, network: nn.Module, states: Iterable[Mapping[str, Tensor]], **options: Any) -> Ensemble:
        """Make an ensemble of copies of one network.

        Args:
            network: copied for each state, together with its device and mode; itself left as it is.
            states: one state dict of this network per member; read one after the other, so a generator will do.
            **options: of the ensemble.

        Raises:
            WeightsError: a state dict is of another network.
            RequestError: as for the class.
        """
        members = []
        for number, state in enumerate(states, start=1):
            member = copy.deepcopy(network)
            try:
                member.load_state_dict(dict(state))
            except RuntimeError as error:
                faults = [line.strip() for line in str(error).splitlines()[1:]]
                raise WeightsError(
                    f"the weights of ensemble member {number} are of another network than this "
                    f"{type(network).__name__}; give those of the same network_def. {len(faults)} fault(s): "
                    f"{faults[0] if faults else error}"
                ) from error
            members.append(member)
        return cls(members, **options)

    @property
    def valid_sizes(self) -> ValidSizes | None:
        """Sizes that unpadded networks take and give; None for any other."""
        return getattr(self.networks[0], "valid_sizes", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, K, *spatial)` for an image `(B, C, *spatial)`; averaged ones are float32.

        Raises:
            SizeError: the networks give different shapes.
        """
        return self.mean(
            (weight, partial(_logits_of, network, x))
            for weight, network in zip(self.weights, self.networks, strict=True)
        )


class _Mean:
    """The weighted mean of predictions that are made one after the other; one alone is returned as it is."""

    def __init__(self, average: str, activation: str) -> None:
        check_choice("average", average, _AVERAGES)
        check_choice("activation", activation, ACTIVATIONS)
        self.average = average
        self.activation = activation

    def __call__(self, members: Iterable[tuple[float, Callable[[], Tensor]]]) -> Tensor:
        first, *others = members
        total = first[1]()
        if not others:
            return total
        total = self._values(total) * first[0]
        for weight, predict in others:
            logits = predict()
            if logits.shape != total.shape:
                raise SizeError(
                    f"predictions to average have different shapes, {tuple(total.shape)} and {tuple(logits.shape)}."
                )
            total.add_(self._values(logits), alpha=weight)
        total.div_(first[0] + sum(weight for weight, _ in others))
        return total if self.average == "logits" else as_logits(total, self.activation)

    def _values(self, logits: Tensor) -> Tensor:
        """Return, in float32, what is averaged."""
        return logits.float() if self.average == "logits" else probabilities(logits, self.activation)


def _logits_of(network: nn.Module, x: Tensor) -> Tensor:
    output = network(x)
    # Training wrappers give a whole TrainingOutput.
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        raise RequestError(
            f"{type(network).__name__} returned a {type(output).__name__}, expected one tensor of logits; "
            "switch off its deep supervision or its other extra outputs."
        )
    return logits
