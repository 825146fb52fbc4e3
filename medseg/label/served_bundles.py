"""Which bundles a label server offers, and which it refuses. No import of torch or MONAI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medseg.bundle.catalog import Bundle, shipped_bundles
from medseg.bundle.trust import require_trust
from medseg.errors import BundleError, MedsegError, RequestError, in_a_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

__all__ = ["Offer", "Offers", "find_offers"]

_OVER_TRAIN = ("evaluate", "multi_gpu_train", "multi_gpu_evaluate")


@dataclass(frozen=True)
class Offer:
    """A bundle that passed the trust check.

    Attributes:
        source: the bundle as it was found; a label server never changes it.
        tuned: folder of the copy that training on the server makes, which need not exist.
        labels: name of each label, without the background, to its value in a mask.
        spatial_dims: 2 or 3.
        description: one or two sentences for people.
        trainable: whether it has a config for training.
    """

    source: Bundle
    tuned: Bundle
    labels: dict[str, int]
    spatial_dims: int
    description: str
    trainable: bool

    @property
    def name(self) -> str:
        """The bundle's name, by which viewers ask for it."""
        return self.source.name

    @property
    def current(self) -> Bundle:
        """The bundle whose weights count now: the trained copy, where there is one."""
        return self.tuned if self.tuned.weights.is_file() else self.source

    @property
    def ready(self) -> bool:
        """Whether there are weights to predict with."""
        return self.current.weights.is_file()


@dataclass(frozen=True)
class Offers:
    """What a label server found.

    Attributes:
        offered: bundles that are plain data, by name.
        refused: name of each other bundle, to the reason.
    """

    offered: dict[str, Offer]
    refused: dict[str, str]


def find_offers(tuned: Path, *, folders: Sequence[Path] = (), names: Sequence[str] = ()) -> Offers:
    """Look at bundles without importing or evaluating anything of them.

    There is no way to trust a bundle here: one that is not declarative is refused.

    Args:
        tuned: folder of the copies that training makes.
        folders: bundle folders, or folders of such; the shipped bundles if there are none.
        names: of the bundles to offer; all if there are none.

    Raises:
        RequestError: a folder holds no bundle, or a named bundle was not found.
    """
    bundles = _unique([found for folder in folders for found in _bundles(folder)] if folders else shipped_bundles())
    missing = sorted(set(names) - set(bundles))
    if missing:
        raise RequestError(f"no bundle {', '.join(map(repr, missing))} to offer; found: {', '.join(bundles) or 'none'}")
    offered, refused = {}, {}
    for name in names or bundles:
        try:
            offered[name] = _offer(bundles[name], Bundle(tuned / name))
        except MedsegError as error:
            refused[name] = str(error)
    return Offers(offered, refused)


def _bundles(folder: Path) -> Iterator[Bundle]:
    root = folder.resolve()
    inside = [root] if _is_bundle(root) else [path for path in sorted(root.glob("*")) if _is_bundle(path)]
    if not inside:
        raise RequestError(f"'{folder}' holds no bundle: expected a folder with configs/, or a folder of such folders")
    return (Bundle(path) for path in inside)


def _is_bundle(folder: Path) -> bool:
    return (folder / "configs").is_dir()


def _unique(bundles: Iterable[Bundle]) -> dict[str, Bundle]:
    found: dict[str, Bundle] = {}
    for bundle in bundles:
        if bundle.name in found:
            raise RequestError(f"two bundles are named '{bundle.name}': {found[bundle.name].root} and {bundle.root}")
        found[bundle.name] = bundle
    return found


def _jobs(bundle: Bundle) -> list[tuple[str, ...]]:
    """Return the configs of each job that a bundle may be used for, as they are laid over each other."""
    jobs: list[tuple[str, ...]] = [("inference",)]
    if bundle.config_path("train").is_file():
        jobs.append(("train",))
        jobs += [("train", name) for name in _OVER_TRAIN if bundle.config_path(name).is_file()]
    return jobs


def _offer(source: Bundle, tuned: Bundle) -> Offer:
    trainable = source.config_path("train").is_file()
    for bundle in (source, tuned):
        if (bundle.root / "configs").is_dir():
            for job in _jobs(bundle):
                require_trust(bundle.root, bundle.load_configs(*job))
    dimensions, labels = _described(source)
    if tuned.weights.is_file() and _described(tuned) != (dimensions, labels):
        raise RequestError(
            f"bundle '{source.name}' has the labels {list(labels)}, and the copy that was trained here, "
            f"'{tuned.root}', {list(_described(tuned)[1])}: it is of another bundle of that name; move it away"
        )
    return Offer(source, tuned, labels, dimensions, str(source.metadata.get("description", "")), trainable)


def _described(bundle: Bundle) -> tuple[int, dict[str, int]]:
    """Return the dimensions of a bundle's images, and its labels with their values.

    Raises:
        BundleError: the metadata do not say.
    """
    try:
        inputs = bundle.metadata.get("network_data_format", {}).get("inputs", {})
        dimensions = len(inputs.get("image", {}).get("spatial_shape", [0, 0, 0]))
        labels = {str(name): value for value, name in sorted(bundle.label_names.items())}
    except (AttributeError, TypeError, ValueError) as error:
        raise BundleError(
            f"bundle '{bundle.name}' has a network_data_format that is not as MONAI's schema wants it "
            f"({in_a_line(error)}): see `medseg bundle check`"
        ) from error
    if not labels:
        raise BundleError(f"bundle '{bundle.name}' names no labels: its metadata has no channel_def for 'pred'")
    return dimensions, labels
