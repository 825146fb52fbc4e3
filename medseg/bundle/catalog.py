"""Finding bundles: by folder, or a shipped one by its name. No import of torch or MONAI."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle.compose import Config, nearest
from medseg.errors import BundleError
from medseg.files import load_json

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Bundle", "find_bundle", "merged", "shipped_bundles"]

_SHIPPED = (Path(__file__).parent / "shipped", Path(__file__).parents[2] / "bundles")


@dataclass(frozen=True)
class Bundle:
    """A bundle folder in the MONAI layout.

    Attributes:
        root: the folder, absolute.
    """

    root: Path

    @property
    def name(self) -> str:
        """Folder name, by which other programs know the bundle."""
        return self.root.name

    @property
    def weights(self) -> Path:
        """The plain state dict of the trained network; need not exist."""
        return self.root / "models" / "model.pt"

    @property
    def metadata(self) -> Config:
        """Content of `configs/metadata.json`, empty where there is none."""
        path = self.config_path("metadata")
        return load_json(path) if path.is_file() else {}

    @property
    def label_names(self) -> dict[int, str]:
        """Names of the classes without the background, by their value in a mask.

        Raises:
            BundleError: the metadata list them in another form.
        """
        try:
            outputs = self.metadata.get("network_data_format", {}).get("outputs", {})
            channels: dict[str, str] = outputs.get("pred", {}).get("channel_def", {})
            return {int(value): str(name) for value, name in channels.items() if int(value) > 0}
        except (AttributeError, ValueError) as error:
            raise BundleError(
                f"'{self.config_path('metadata')}' does not list the labels; expected "
                '"network_data_format": {"outputs": {"pred": {"channel_def": {"1": "liver"}}}}',
                path=self.config_path("metadata"),
            ) from error

    def config_path(self, name: str) -> Path:
        """Path of `configs/<name>.json`."""
        return self.root / "configs" / f"{name}.json"

    def config_paths(self, *names: str) -> list[Path]:
        """Paths of the named configs.

        Raises:
            BundleError: one does not exist.
        """
        paths = [self.config_path(name) for name in names]
        for path in paths:
            if not path.is_file():
                hint = f"run `medseg bundle build {self.root}`" if (self.root / "bundle.json").is_file() else ""
                text = f"bundle '{self.name}' has no {path.relative_to(self.root)}; {hint or 'add it'}"
                raise BundleError(text, code="missing", path=path)
        return paths

    def load_configs(self, *names: str) -> dict[str, Config]:
        """Parsed content of the named configs, in order."""
        return {path.name: load_json(path) for path in self.config_paths(*names)}


def merged(configs: dict[str, Config]) -> Config:
    """Merge configs as MONAI does: a later one replaces whole top-level entries."""
    result: dict[str, Any] = {}
    for config in configs.values():
        result.update(config)
    return result


def shipped_bundles() -> list[Bundle]:
    """Return the bundles that come with medseg, and those in the folders of `MEDSEG_BUNDLES`, sorted by name."""
    return sorted((Bundle(root) for root in _roots()), key=lambda bundle: bundle.name)


def find_bundle(name: str | Path | Bundle) -> Bundle:
    """Return the bundle in folder `name`, or the shipped one of that name; a `Bundle` as it is.

    Raises:
        BundleError: neither exists; the message names the nearest shipped bundle.
    """
    if isinstance(name, Bundle):
        return name
    folder = Path(name)
    if folder.is_dir():
        if not ((folder / "configs").is_dir() or (folder / "bundle.json").is_file()):
            if (folder / "folds.json").is_file():
                raise BundleError(
                    f"'{name}' contains an unfinished cross-validation: finish it with "
                    "`medseg train --folds ... --resume`, which makes this folder a bundle, the ensemble of the folds",
                    path=folder,
                )
            text = f"'{name}' is not a bundle: expected a folder configs/ or a bundle.json in it"
            raise BundleError(text, path=folder)
        return Bundle(folder.resolve())
    shipped = {bundle.name: bundle for bundle in shipped_bundles()}
    if str(name) in shipped:
        return shipped[str(name)]
    raise BundleError(
        f"unknown bundle '{name}': no such folder, and no shipped bundle of that name{nearest(str(name), shipped)}",
        code="missing",
        path=folder,
    )


def _roots() -> Iterator[Path]:
    extra = [Path(folder) for folder in os.environ.get("MEDSEG_BUNDLES", "").split(os.pathsep) if folder]
    seen: set[str] = set()
    for parent in (*extra, *_SHIPPED):
        for path in sorted(parent.glob("*/bundle.json")):
            if path.parent.name not in seen:
                seen.add(path.parent.name)
                yield path.parent.resolve()
