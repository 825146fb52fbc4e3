"""Write a bundle's `configs/` from its `bundle.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.bundle.compose import Config, compose
from medseg.bundle.upgrade import upgraded
from medseg.errors import BundleError
from medseg.files import load_json, replace_text, sha256_file
from medseg.version import __version__

if TYPE_CHECKING:
    from medseg.bundle.catalog import Bundle

__all__ = ["build", "built_files", "metadata", "stale_files"]

_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
# Versions in constraints.txt that the metadata lists.
_TESTED = {"monai_version": "1.6.1", "pytorch_version": "2.13.0", "numpy_version": "2.4.6"}
_REQUIRED_PACKAGES = {
    "medseg": __version__,
    "nibabel": "5.4.2",
    "pytorch-ignite": "0.5.5",
    "pillow": "13.0.0",
}
_COPIED = ("changelog", "copyright", "data_source", "data_type", "image_classes", "label_classes", "pred_classes")
_COPIED_LAST = ("intended_use", "references")


def build(bundle: Bundle) -> list[Path]:
    """Write all configs of the bundle, each atomically, and return their paths.

    Raises:
        BundleError: A missing or invalid `bundle.json` (see `compose`), or a `configs` that links outside the bundle.
    """
    if not (bundle.root / "configs").resolve().is_relative_to(bundle.root.resolve()):
        raise BundleError(f"'{bundle.root / 'configs'}' links outside the bundle. Replace the link with a folder.")
    _upgrade(bundle.root / "bundle.json")
    return [replace_text(bundle.root / name, text) for name, text in built_files(bundle).items()]


def _upgrade(path: Path) -> None:
    """Rewrite a `bundle.json` with component names of earlier versions."""
    if path.is_file() and (source := load_json(path)) != (current := upgraded(source)):
        replace_text(path, json.dumps(current, indent=2) + "\n")


def built_files(bundle: Bundle) -> dict[str, str]:
    """Return the files that `build` writes, as texts by path relative to the bundle."""
    path = bundle.root / "bundle.json"
    if not path.is_file():
        raise BundleError(f"No bundle.json in '{bundle.root}', from which to build the configs.")
    source = load_json(path)
    configs = compose(source)
    configs = {"metadata": metadata(source, configs["inference"], bundle.weights), **configs}
    return {f"configs/{name}.json": json.dumps(config, indent=2) + "\n" for name, config in configs.items()}


def stale_files(bundle: Bundle) -> list[str]:
    """Return the files of the bundle that differ from those of `build`, as paths relative to it.

    The weights in the metadata may be absent, as in a container image.

    Raises:
        BundleError: A missing or invalid `bundle.json`, or a config that is not JSON.
    """
    return [name for name, text in built_files(bundle).items() if not _is_current(bundle, name, text)]


def _is_current(bundle: Bundle, name: str, text: str) -> bool:
    path = bundle.root / name
    if not path.is_file():
        return False
    if path.read_text(encoding="utf-8") == text:
        return True
    if name != "configs/metadata.json" or bundle.weights.is_file():
        return False
    listed = {key: value for key, value in bundle.metadata.items() if key != "weights"}
    return json.dumps(listed, indent=2) + "\n" == text


def metadata(source: Config, inference: Config, weights: Path) -> Config:
    """Return the content of `metadata.json` (schema of 2024-07-25) for a `bundle.json`.

    The additional entry `weights` has the SHA-256 of `models/model.pt`, if that exists, which is checked on loading.
    """
    result = {
        "schema": _SCHEMA,
        "name": source.get("display_name", source["name"]),
        "version": source["version"],
        **_TESTED,
        "required_packages_version": _REQUIRED_PACKAGES,
        "task": source["description"].split(". ")[0].rstrip("."),
        "description": source["description"],
        "authors": source["authors"],
        "copyright": source.get("copyright", "see LICENSE"),
        **{key: source[key] for key in _COPIED if key in source},
        **{key: source[key] for key in _COPIED_LAST if key in source},
        "supported_apps": {"monai-label": ""},
        "network_data_format": _network_data_format(source, inference),
    }
    if weights.is_file():
        result["weights"] = {"models/model.pt": {"sha256": sha256_file(weights), **_license(source)}}
    return result


def _license(source: Config) -> Config:
    return {"license": source["weights_license"]} if "weights_license" in source else {}


def _network_data_format(source: Config, inference: Config) -> Config:
    shape = inference["roi_size"]
    margin = source.get("knobs", {}).get("margin", 0)
    common = {"type": "image", "spatial_shape": shape, "dtype": "float32", "is_patch_data": True}
    modality = source["channels"]["0"] if len(source["channels"]) == 1 else "RGB"
    return {
        "inputs": {
            "image": {
                **common,
                "format": "magnitude",
                "modality": modality,
                "num_channels": len(source["channels"]),
                "value_range": _value_range(inference),
                "channel_def": source["channels"],
            }
        },
        "outputs": {
            "pred": {
                **common,
                "spatial_shape": [n - 2 * margin for n in shape],
                "format": "segmentation",
                "num_channels": len(source["labels"]),
                "value_range": [0, len(source["labels"]) - 1],
                "channel_def": source["labels"],
            }
        },
    }


def _value_range(inference: Config) -> list[float]:
    """Return the range of input values: the scaled window, or 5 standard deviations for standardized images."""
    for step in inference["preprocessing"]["transforms"]:
        if "b_min" in step:
            return [step["b_min"], step["b_max"]]
    return [-5.0, 5.0]
