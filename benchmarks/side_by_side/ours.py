"""medseg, by its public function; exact or fast by the knobs in `settings`."""

from __future__ import annotations

from typing import Any

import monai.bundle
import torch

import medseg
from medseg.bundle.catalog import find_bundle
from side_by_side.sample import Phases, import_targets
from side_by_side.settings import EXACT, FAST

# These packages import their parts on first use.
LOADED_BY_MEDSEG = (monai.bundle.ConfigWorkflow, medseg.predict)


def import_all(request: dict[str, Any]) -> None:
    """Import what the bundle names."""
    torch.set_num_threads(request["threads"])
    import_targets(find_bundle(request["bundle"]).load_configs("inference"))


def work(request: dict[str, Any], phases: Phases) -> None:
    """Predict one image."""
    knobs = FAST if request["contestant"] == "medseg-fast" else EXACT
    manifest = medseg.predict(request["bundle"], request["image"], request["output"], settings=knobs)
    failed = [record.error for record in manifest.cases.values() if record.status != "done"]
    if failed or not manifest.cases:
        raise SystemExit(f"medseg: {failed}")
    phases.seconds.update(manifest.stages)
