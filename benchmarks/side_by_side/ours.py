"""medseg through its public API, in exact or fast mode as of `settings`."""

from __future__ import annotations

import importlib
from typing import Any

import monai.bundle
import torch

import medseg
from medseg.bundle.catalog import find_bundle
from side_by_side.sample import Phases, import_targets
from side_by_side.settings import EXACT, FAST, FAST_CT, KINDS

# These packages import submodules on first use.
LOADED_BY_MEDSEG = (monai.bundle.ConfigWorkflow, medseg.predict)


def import_all(request: dict[str, Any]) -> None:
    """Import the modules of the bundle and of its inferer."""
    torch.set_num_threads(request["threads"])
    backend = knobs(request).get("backend", "torch")
    if backend in ("openvino", "onnxruntime"):
        importlib.import_module(backend)
    import_targets(find_bundle(request["bundle"]).load_configs("inference"))


def work(request: dict[str, Any], phases: Phases) -> None:
    """Predict one image."""
    manifest = medseg.predict(request["bundle"], request["image"], request["output"], settings=knobs(request))
    failed = [record.error for record in manifest.cases.values() if record.status != "done"]
    if failed or not manifest.cases:
        raise SystemExit(f"medseg: {failed}")
    phases.seconds.update(manifest.stages)


def knobs(request: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the requested mode."""
    overlap = {"overlap": request["settings"]["overlap"]}
    if request["contestant"] != "medseg-fast":
        return EXACT | overlap
    return (FAST if request["case"] in KINDS else FAST_CT) | overlap
