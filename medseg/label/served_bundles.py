"""Bundles that a label server serves, and bundles that it refuses. Imports neither torch nor MONAI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medseg.bundle.catalog import Bundle, shipped_bundles
from medseg.bundle.trust import require_trust
from medseg.errors import BundleError, MedsegError, RequestError, in_a_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

__all__ = ["ServedBundle", "ServedBundles", "find_served_bundles"]

_OVER_TRAIN = ("evaluate", "multi_gpu_train", "multi_gpu_evaluate")


@dataclass(frozen=True)
class ServedBundle:
    """A bundle that passed the trust check.

    Attributes:
        source: Original bundle, which a label server never changes.
        tuned: Copy that was trained on the server; its folder need not exist.
        labels: Value of each label in a mask, by name, without the background.
        spatial_dims: Number of spatial dimensions, 2 or 3.
        description: Description of one or two sentences.
        trainable: Whether the bundle has a training config.
    """

    source: Bundle
    tuned: Bundle
    labels: dict[str, int]
    spatial_dims: int
    description: str
    trainable: bool

    @property
    def name(self) -> str:
        """Name of the bundle in the requests of viewers."""
        return self.source.name

    @property
    def current(self) -> Bundle:
        """Bundle whose weights are in use: the trained copy if there is one."""
        return self.tuned if self.tuned.weights.is_file() else self.source

    @property
    def ready(self) -> bool:
        """Whether there are weights to predict with."""
        return self.current.weights.is_file()


@dataclass(frozen=True)
class ServedBundles:
    """The bundles that a label server found.

    Attributes:
        served: Bundles that contain no code, by name.
        refused: Reason for refusing each other bundle, by name.
    """

    served: dict[str, ServedBundle]
    refused: dict[str, str]


def find_served_bundles(tuned: Path, *, folders: Sequence[Path] = (), names: Sequence[str] = ()) -> ServedBundles:
    """Check bundles without importing or evaluating any of their content.

    A label server has no option to trust a bundle: every bundle that contains code is refused.

    Args:
        tuned: Folder of the copies trained on the server.
        folders: Bundle folders, or folders of bundles; the shipped bundles if empty.
        names: Names of the bundles to serve; all if empty.

    Raises:
        RequestError: A folder contains no bundle, or a named bundle was not found.
    """
    bundles = _unique([found for folder in folders for found in _bundles(folder)] if folders else shipped_bundles())
    missing = sorted(set(names) - set(bundles))
    if missing:
        raise RequestError(f"no bundle {', '.join(map(repr, missing))} to serve; found: {', '.join(bundles) or 'none'}")
    served, refused = {}, {}
    for name in names or bundles:
        try:
            served[name] = _served(bundles[name], Bundle(tuned / name))
        except MedsegError as error:
            refused[name] = str(error)
    return ServedBundles(served, refused)


def _bundles(folder: Path) -> Iterator[Bundle]:
    root = folder.resolve()
    inside = [root] if _is_bundle(root) else [path for path in sorted(root.glob("*")) if _is_bundle(path)]
    if not inside:
        raise RequestError(f"no bundle in '{folder}': expected a folder with configs/, or a folder of such folders")
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
    """Return the configs of each job that a bundle supports, in the order in which they are merged."""
    jobs: list[tuple[str, ...]] = [("inference",)]
    if bundle.config_path("train").is_file():
        jobs.append(("train",))
        jobs += [("train", name) for name in _OVER_TRAIN if bundle.config_path(name).is_file()]
    return jobs


def _served(source: Bundle, tuned: Bundle) -> ServedBundle:
    trainable = source.config_path("train").is_file()
    for bundle in (source, tuned):
        if (bundle.root / "configs").is_dir():
            for job in _jobs(bundle):
                require_trust(bundle.root, bundle.load_configs(*job))
    dimensions, labels = _described(source)
    if tuned.weights.is_file() and _described(tuned) != (dimensions, labels):
        raise RequestError(
            f"labels of bundle '{source.name}', {list(labels)}, differ from those of its copy trained on this server, "
            f"'{tuned.root}', {list(_described(tuned)[1])}: the copy is of another bundle of that name; move it away"
        )
    return ServedBundle(source, tuned, labels, dimensions, str(source.metadata.get("description", "")), trainable)


def _described(bundle: Bundle) -> tuple[int, dict[str, int]]:
    """Return the number of spatial dimensions of a bundle's images, and the value of each label by name.

    Raises:
        BundleError: Missing or invalid metadata.
    """
    try:
        inputs = bundle.metadata.get("network_data_format", {}).get("inputs", {})
        dimensions = len(inputs.get("image", {}).get("spatial_shape", [0, 0, 0]))
        labels = {str(name): value for value, name in sorted(bundle.label_names.items())}
    except (AttributeError, TypeError, ValueError) as error:
        raise BundleError(
            f"invalid network_data_format in the metadata of bundle '{bundle.name}' ({in_a_line(error)}): "
            "see `medseg bundle check`"
        ) from error
    if not labels:
        raise BundleError(f"no labels in the metadata of bundle '{bundle.name}': it has no channel_def for 'pred'")
    return dimensions, labels
