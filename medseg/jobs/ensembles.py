"""Ensembles: several trained bundles as one ordinary bundle that averages their predictions, also for MONAI."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle, find_bundle
from medseg.bundle.trust import require_trust
from medseg.errors import BundleError, WeightsError
from medseg.files import replace_text, sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ensemble_of", "write_ensemble"]

_CONFIGS: Final = ("train", "evaluate", "inference")
_WEIGHTS: Final = "models/model.pt"


def write_ensemble(members: Sequence[Bundle], root: Path) -> Bundle:
    """Write a bundle whose network is the mean of the members' networks: their probabilities are averaged per window.

    All else is that of the first member. Equal members give equal bytes.

    Args:
        members: declarative, trained bundles with the same labels and preparation of images; networks may differ.
        root: folder of the new bundle, made if missing.

    Raises:
        BundleError: the members do not fit together, or one is not declarative.
        WeightsError: one is not trained.
    """
    configs = [member.load_configs(*_CONFIGS) for member in members]
    for member, found in zip(members, configs, strict=True):
        require_trust(member.root, found)
        if not member.weights.is_file():
            raise WeightsError(f"bundle '{member.root}' has no weights: train it first")
        _check_alike(members[0], configs[0]["inference.json"], member, found["inference.json"])
    networks = [found["inference.json"]["network_def"] for found in configs]
    network = {"_target_": "medseg.components.Ensemble", "networks": networks}
    if _overlapping(configs[0]["inference.json"]):
        network["activation"] = "sigmoid"
    _write_weights(members, root / _WEIGHTS)
    for name, config in configs[0].items():
        changed = {**config, "network_def": network} if "network_def" in config else config
        replace_text(root / "configs" / name, json.dumps(changed, indent=2) + "\n")
    replace_text(root / "configs" / "metadata.json", json.dumps(_metadata(members, root), indent=2) + "\n")
    license_file = members[0].root / "LICENSE"
    if license_file.is_file():
        shutil.copy2(license_file, root / "LICENSE")
    return Bundle(root)


@contextmanager
def ensemble_of(names: Sequence[str | Path]) -> Iterator[Bundle]:
    """Yield an ensemble of bundles in a temporary folder.

    Args:
        names: Folders, or names of shipped bundles.

    Raises:
        BundleError: as for `write_ensemble`, or there is no such bundle.
    """
    members = [find_bundle(name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        # The name appears in the manifest.
        yield write_ensemble(members, Path(folder) / "+".join(member.name for member in members))


def _check_alike(first: Bundle, wanted: dict[str, Any], member: Bundle, found: dict[str, Any]) -> None:
    differing = sorted(name for name in {*wanted, *found} - {"network_def"} if wanted.get(name) != found.get(name))
    if differing:
        raise BundleError(
            f"'{first.name}' and '{member.name}' cannot form an ensemble: {', '.join(differing)} of "
            "configs/inference.json differ; networks may differ, preprocessing and windows must agree"
        )
    if first.label_names != member.label_names:
        raise BundleError(
            f"'{first.name}' and '{member.name}' cannot form an ensemble: their labels differ: {first.label_names} and "
            f"{member.label_names}"
        )


def _overlapping(config: Any) -> bool:
    """Whether some component of a config uses a sigmoid, so that channels may overlap."""
    if isinstance(config, dict):
        own = config.get("activation") == "sigmoid" or config.get("sigmoid") is True
        return own or any(_overlapping(value) for name, value in config.items() if name != "network_def")
    return isinstance(config, list) and any(map(_overlapping, config))


def _write_weights(members: Sequence[Bundle], path: Path) -> None:
    from medseg.jobs.config_functions import read_state
    from medseg.training.checkpoint import save_tensors

    merged: dict[str, Any] = {}
    for number, member in enumerate(members):
        content = member.weights.read_bytes()
        _check_hash(member, content)
        state = read_state(content, str(member.weights))
        merged.update({f"networks.{number}.{name}": tensor for name, tensor in state.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(merged, path)


def _check_hash(member: Bundle, content: bytes) -> None:
    expected = member.metadata.get("weights", {}).get(_WEIGHTS, {}).get("sha256")
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise WeightsError(
            f"'{member.weights}' does not match the SHA-256 in the bundle's metadata: it was altered or replaced. If "
            f"you replaced it, run `medseg bundle build {member.root}`"
        )


def _metadata(members: Sequence[Bundle], root: Path) -> dict[str, Any]:
    known = members[0].metadata
    parts = ", ".join(dict.fromkeys(member.name for member in members))
    weights = {_WEIGHTS: {"sha256": sha256_file(root / _WEIGHTS)}}
    return {
        **known,
        "description": f"{known.get('description', '')} The mean of {len(members)} networks: {parts}.".strip(),
        "weights": weights,
    }
