"""Types shared by the subpackages."""

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
# Called with the amount done, the total (cases, epochs or steps) and a short description of the current state.
Progress: TypeAlias = Callable[[float, int, str], None]
# Called with the name of a case and its estimated time and memory.
Announce: TypeAlias = Callable[[str, str], None]


@dataclass(frozen=True)
class Case:
    """One image to predict, train on or score, as found by `medseg.io`.

    Attributes:
        name: Path of the result in the format of the image, relative to the common folder of all images, such as
            `sub/case1.nii.gz`; identifies the case in manifests and reports.
        images: Absolute path of the image: a file, a folder or archive, or `folder::series`. Images with one file per
            channel have several.
        label: Absolute path of the reference label; None where there is none.
        kind: "volume", "image" for a 2D image, or "slide" for a whole-slide image, which is read region by region.
        output: Path of the result relative to the output folder, with "/" between folders.
        series: DICOM series number, where `images` names one of several series.
        label_options: Options for reading a DICOM label (see `medseg.components.LoadCased`).
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
        """Return the case as the data dictionary of MONAI's transforms."""
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
        path: Path of the file or folder.
        reason: Reason why it is skipped, as a phrase for messages.
    """

    path: str
    reason: str


class _Logits(TypedDict):
    logits: Tensor


class TrainingOutput(_Logits, total=False):
    """Result of a network's `forward_train`.

    Attributes:
        logits: `(B, out_channels, *spatial)`, equal to what `forward` returns.
        aux: Logits of the auxiliary heads, shallow first, where the paper has them.
        edges: Logits of the boundary heads, where the paper has them.
        features: Named feature maps in the order of computation: `E1..En` encoder (fine to coarse), `B` bottleneck,
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
        """Return the logits together with the auxiliary outputs of the training losses."""


@runtime_checkable
class TransferNetwork(Protocol):
    """A network that can be initialized from the weights of another architecture."""

    def transfer(self, state: Mapping[str, Tensor], *, cat_order: str | None = None) -> object:
        """Load the matching weights of a state dict; return a printable report.

        Args:
            state: State dict of the other network.
            cat_order: Order in which that network concatenates its features, "up_first" or "skip_first"; None for its
                default.
        """


class PrunableNetwork(Protocol):
    """A network with heads at several depths, which can be pruned to each of them.

    Attributes:
        arguments: Constructor arguments.
    """

    arguments: dict[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name, as `torch.nn.Module` does."""

    def prune(self, level: int) -> PrunableNetwork:
        """Return a new network whose output is that of head `level`."""

    def set_output(self, mode: str, *, head_activation: str | None = None) -> None:
        """Select the output of `forward`: that of one "head", or the "mean" of all heads' probabilities, as a logit."""

    def level_sizes(self) -> Sequence[Any]:
        """Return `level`, `parameters` and `megabytes` of every head, shallow first, then of the mean."""
