"""Averaged predictions: test-time augmentation by mirroring (as in nnU-Net), and ensembles of networks."""

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
    """Test-time augmentation by mirroring: average the predictions of an image and its mirror images.

    The image is flipped along every subset of the axes (8 predictions for three axes), and the predictions are flipped
    back. Passed to an inferer in place of the network, it is applied to each window.

    Args:
        network: Network that returns logits `(B, K, *spatial)`.
        axes: Spatial axes to flip, counted from 0; None for all axes.
        average: What to average: "logits", as in nnU-Net, or "probabilities".
        activation: Activation of the logits, "softmax" or "sigmoid".

    Attributes:
        valid_sizes: Valid sizes of an unpadded network (see `medseg.components.OverlapTileInferer`).

    Raises:
        RequestError: Duplicate or negative axis, or an unknown option.
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
            raise RequestError(f"invalid axes={list(axes)}; expected distinct spatial axes, counted from 0.")
        self.network = network
        self.axes = None if axes is None else tuple(axes)
        self.mean = _Mean(average, activation)

    @property
    def valid_sizes(self) -> ValidSizes | None:
        """Valid input and output sizes of an unpadded network; None for a padded one."""
        return getattr(self.network, "valid_sizes", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, K, *spatial)` for an image `(B, C, *spatial)`; averages are float32.

        Raises:
            SizeError: Axis out of range for the image.
        """
        dims = x.dim() - 2
        axes = range(dims) if self.axes is None else self.axes
        if max(axes, default=-1) >= dims:
            raise SizeError(f"axes={list(axes)} out of range for an image with {dims} spatial axes, counted from 0.")
        flips = [[axis + 2 for axis in chosen] for n in range(len(axes) + 1) for chosen in combinations(axes, n)]
        return self.mean((1.0, partial(self._flipped, x, flip)) for flip in flips)

    def _flipped(self, x: Tensor, flip: list[int]) -> Tensor:
        if not flip:
            return _logits_of(self.network, x)
        return _logits_of(self.network, x.flip(flip)).flip(flip)


class Ensemble(nn.Module):
    """Average the predictions of several networks, such as cross-validation folds or checkpoints.

    Passed to an inferer in place of the network, it is applied to each window.

    Args:
        networks: One or more networks that return logits `(B, K, *spatial)` of the same shape.
        average: What to average: "probabilities" or "logits".
        weights: Positive weight of each network, normalized to a sum of 1; equal by default.
        activation: Activation of the logits, "softmax" or "sigmoid".

    Attributes:
        valid_sizes: Valid sizes of the first network if it is unpadded (see `medseg.components.OverlapTileInferer`).

    Raises:
        RequestError: No network, invalid weights, or an unknown option.
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
            raise RequestError("Ensemble requires at least one network.")
        self.weights = [1.0] * len(self.networks) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.networks) or not all(w > 0 and math.isfinite(w) for w in self.weights):
            raise RequestError(
                f"invalid weights={weights}; expected one positive number for each of {len(self.networks)} network(s)."
            )
        self.mean = _Mean(average, activation)

    @classmethod
    def from_state_dicts(cls, network: nn.Module, states: Iterable[Mapping[str, Tensor]], **options: Any) -> Ensemble:
        """Create an ensemble from copies of one network with different weights.

        Args:
            network: Network that is copied for each state dict, including its device and mode; not modified.
            states: State dict of each member; a generator is consumed one by one.
            **options: Arguments of the class.

        Raises:
            WeightsError: State dict that does not match the network.
            RequestError: Invalid arguments of the class.
        """
        members = []
        for number, state in enumerate(states, start=1):
            member = copy.deepcopy(network)
            try:
                member.load_state_dict(dict(state))
            except RuntimeError as error:
                faults = [line.strip() for line in str(error).splitlines()[1:]]
                raise WeightsError(
                    f"the weights of ensemble member {number} do not match this {type(network).__name__}; use weights "
                    f"of the same network_def. {len(faults)} mismatch(es): {faults[0] if faults else error}"
                ) from error
            members.append(member)
        return cls(members, **options)

    @property
    def valid_sizes(self) -> ValidSizes | None:
        """Valid input and output sizes of unpadded networks; None for padded ones."""
        return getattr(self.networks[0], "valid_sizes", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, K, *spatial)` for an image `(B, C, *spatial)`; averages are float32.

        Raises:
            SizeError: Different output shapes of the networks.
        """
        return self.mean(
            (weight, partial(_logits_of, network, x))
            for weight, network in zip(self.weights, self.networks, strict=True)
        )


class _Mean:
    """Weighted mean of predictions, computed one by one; a single prediction is returned unchanged."""

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
                    f"shape mismatch of the predictions to average: {tuple(total.shape)} and {tuple(logits.shape)}."
                )
            total.add_(self._values(logits), alpha=weight)
        total.div_(first[0] + sum(weight for weight, _ in others))
        return total if self.average == "logits" else as_logits(total, self.activation)

    def _values(self, logits: Tensor) -> Tensor:
        """Return the values to average, in float32."""
        return logits.float() if self.average == "logits" else probabilities(logits, self.activation)


def _logits_of(network: nn.Module, x: Tensor) -> Tensor:
    output = network(x)
    # Training wrappers return a TrainingOutput.
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        raise RequestError(
            f"{type(network).__name__} returned a {type(output).__name__}, expected one tensor of logits; "
            "disable deep supervision and other additional outputs."
        )
    return logits
