"""A job: a request on a bundle, checked completely before torch or MONAI are imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle, merged
from medseg.bundle.knobs import changed
from medseg.bundle.trust import leads_inside, require_trust
from medseg.errors import BundleError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Job", "checked_places", "prepare"]

_CONFIGS: Final = {"train": ("train",), "evaluate": ("train", "evaluate"), "predict": ("inference",)}


@dataclass(frozen=True)
class Job:
    """A request that was checked: what to run, and with which values.

    Attributes:
        command: "train", "evaluate" or "predict".
        bundle: whose configs run.
        config_files: the config files, laid over each other in this order.
        config: what they give together, with the user's values in place and the metadata; this very content was
            checked.
        overrides: the user's values.
        settings: names of the knobs that the user set.
        vouched: whether the user vouched for a bundle that need not be declarative.
    """

    command: str
    bundle: Bundle
    config_files: tuple[Path, ...]
    config: Mapping[str, Any]
    overrides: Mapping[str, Any]
    settings: tuple[str, ...]
    vouched: bool

    @property
    def weights(self) -> Path:
        """The weight file that the run starts from or uses."""
        return Path(self.overrides.get("weights", self.bundle.weights))


def prepare(
    command: str,
    bundle: Bundle,
    settings: Mapping[str, Any],
    *,
    paths: Mapping[str, Any],
    trust: str | None = None,
) -> Job:
    """Check a request without importing torch or MONAI.

    Args:
        command: "train", "evaluate" or "predict".
        bundle: whose configs are to run.
        settings: knobs to change, by name.
        paths: `dataset_dir`, and `output_dir` or `resume` where the command has them.
        trust: fingerprint by which the user vouches for a bundle that is not declarative.

    Raises:
        BundleError: a config is missing or unreadable, or the bundle is not to be trusted.
        RequestError: an unknown knob or a value of the wrong kind.
        WeightsError: the weights that the command needs, or that training is to start from, do not exist.
    """
    names = _CONFIGS[command]
    configs, metadata = bundle.load_configs(*names), bundle.metadata
    require_trust(bundle.root, {**configs, "metadata.json": metadata}, trust)
    config = {**merged(configs), "_meta_": metadata}
    overrides = {**changed(config, settings), **paths, "bundle_root": str(bundle.root)}
    files = tuple(bundle.config_paths(*names))
    job = Job(command, bundle, files, {**config, **overrides}, overrides, tuple(settings), trust is not None)
    checked_places(job)
    if command == "train":
        _check_start(job.config)
    elif not job.weights.is_file():
        raise WeightsError(f"no weights at '{job.weights}': run `medseg train` first, or give --set weights=FILE")
    return job


def checked_places(job: Job) -> Job:
    """Return a job whose results go where the user said, or into the bundle.

    Raises:
        BundleError: they would go to a folder that the bundle names, wherever the user happens to be.
    """
    place = job.config.get("output_dir")
    if not (job.vouched or "output_dir" in job.overrides or place is None or leads_inside(place, job.config)):
        raise BundleError(
            f"bundle '{job.bundle.name}' would write to {place!r} of its own choice; give --set output_dir=FOLDER, or "
            'let its output_dir be {"_target_": "medseg.components.inside", "root": "@bundle_root", "path": ...}'
        )
    return job


def _check_start(config: Mapping[str, Any]) -> None:
    start = config.get("pretrained")
    if isinstance(start, str) and start and not config.get("resume") and not Path(start).is_file():
        raise WeightsError(f"no weights at '{start}' to start from: give --set pretrained=FILE, or leave it out")
