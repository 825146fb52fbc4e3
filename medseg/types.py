"""Types that more than one room of the package speaks of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Announce",
    "Case",
    "CaseKind",
    "Progress",
    "PrunableNetwork",
    "SegmentationNetwork",
    "Skipped",
    "TrainingOutput",
    "TransferNetwork",
]

CaseKind = Literal["volume", "image", "slide"]
# Called with what is done, the total (cases, epochs or steps) and a few words on the present state.
Progress: TypeAlias = Callable[[float, int, str], None]
# Called with the name of a case and its forecast of time and memory.
Announce: TypeAlias = Callable[[str, str], None]


@dataclass(frozen=True)
class Case:
    """One image to predict, train on or score, as `medseg.io` found it; made once and handed on.

    Attributes:
        name: Path of the result in the image's own format, below the folder that all images share, such as
            `sub/case1.nii.gz`; identifies the case in manifests and reports.
        images: Absolute path of the image: a file, a folder or archive, or `folder::series`. Images with one file per
            channel have several.
        label: Absolute path of the reference label; None where there is none.
        kind: "volume", "image" for a 2D image, or "slide" for a whole-slide image, which is read in pieces.
        output: Path of the result below the output folder, with "/" between folders.
        series: Number of the DICOM series, where `images` names one of several.
        label_options: How a DICOM label is read (see `medseg.components.LoadCased`).
    """

    name: str
    images: tuple[str, ...]
    label: str | None = None
    kind: CaseKind = "volume"
    output: str = ""
    series: str = ""
    label_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def image(self) -> str:
        """Path of the first image, by which messages name the case."""
        return self.images[0]

    def entry(self) -> dict[str, Any]:
        """Return the case as MONAI's dictionary transforms take it."""
        entry: dict[str, Any] = {"image": self.image, "name": self.name}
        if self.label is not None:
            entry["label"] = self.label
        if self.label_options:
            entry["label_options"] = dict(self.label_options)
        return entry


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is not predicted.

    Attributes:
        path: Where it is.
        reason: Why it is skipped, as half a sentence.
    """

    path: str
    reason: str


class _Logits(TypedDict):
    logits: Tensor


class TrainingOutput(_Logits, total=False):
    """What a network's `forward_train` returns.

    Attributes:
        logits: `(B, out_channels, *spatial)`, equal to what `forward` returns.
        aux: logits of auxiliary heads, shallow first, where the paper has them.
        edges: logits of boundary heads, where the paper has them.
        features: named taps in the order of computation: `E1..En` encoder (fine to coarse), `B` bottleneck,
            `Dn..D1` decoder (coarse to fine); each `(B, C, *spatial)`.
    """

    aux: list[Tensor]
    edges: list[Tensor]
    features: Mapping[str, Tensor]


class SegmentationNetwork(Protocol):
    """The contract of every class in `medseg.networks.NETWORKS`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits `(B, out_channels, *spatial)` for an image `(B, in_channels, *spatial)`."""

    def forward_train(self, x: Tensor) -> TrainingOutput:
        """Return the logits together with what training losses may need."""


@runtime_checkable
class TransferNetwork(Protocol):
    """A network that can start from the weights of a network of another class."""

    def transfer(self, state: Mapping[str, Tensor], *, cat_order: str | None = None) -> object:
        """Take over what fits from a state dict; the returned report reads well as text.

        Args:
            state: State dict of the other network.
            cat_order: Order in which that network joins its features, "up_first" or "skip_first"; None for its default.
        """


class PrunableNetwork(Protocol):
    """A network with heads at several depths, which can be cut at each of them.

    Attributes:
        arguments: What its class was called with.
    """

    arguments: dict[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name, as `torch.nn.Module` does."""

    def prune(self, level: int) -> PrunableNetwork:
        """Return a network of its own whose output is that of head `level`."""

    def set_output(self, mode: str, *, head_activation: str | None = None) -> None:
        """Choose what `forward` returns: "head", or "mean" of all heads' probabilities, as a logit."""

    def level_sizes(self) -> Sequence[Any]:
        """Return `level`, `parameters` and `megabytes` of every head, shallow first, and last of the mean."""
