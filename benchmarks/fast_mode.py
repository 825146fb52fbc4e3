"""Agreement of the masks of the fast and the exact mode, on real volumes with a trained bundle.

    python benchmarks/fast_mode.py --bundle hippocampus_mri_unet --data ../shared/data/msd_hippocampus

predicts every validation case in both modes and writes a record: Dice of each class between the two masks (of all
voxels together, and of the case where they agree least) and Dice of both with the truth. The knobs of the fast mode are
those of `inference.py`, which has its times.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side.compare import confusion, dice
from side_by_side.machine import describe
from side_by_side.settings import EXACT, FAST, FAST_CT, RESULTS

import medseg
from medseg.bundle.catalog import find_bundle
from medseg.io import find_dataset, load
from medseg.transforms.labels import MapLabelsd

MODES = {"exact": EXACT, "fast": FAST, "fast with foreground": FAST_CT}


def main() -> None:
    """Predict in both modes, compare the masks and write the record."""
    options = _arguments()
    modes = ["exact", "fast with foreground" if options.foreground else "fast"]
    cases = find_dataset(options.data, "val")
    record: dict[str, Any] = {
        "command": "python benchmarks/fast_mode.py " + shlex.join(sys.argv[1:]),
        "case": "fast mode",
        "bundle": options.bundle,
        "cases": len(cases),
        "knobs": {name: MODES[name] for name in modes},
        **describe(),
    }
    images = [case["image"] for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        masks = {name: _predict(options.bundle, images, Path(folder, name), MODES[name]) for name in modes}
        record |= _compared(options.bundle, cases, masks, modes)
    path = options.output or RESULTS / f"fast_mode_{options.bundle}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({key: record[key] for key in ("agreement", "truth")}, indent=1) + "\n")


def _predict(bundle: str, images: list[str], folder: Path, knobs: dict[str, Any]) -> dict[str, Path]:
    manifest = medseg.predict(bundle, images, folder, settings=knobs)
    failed = [record.error for record in manifest.cases.values() if record.status != "done"]
    if failed:
        raise SystemExit(f"{failed[0]} (and {len(failed) - 1} more)")
    return {name: folder / str(record.output) for name, record in manifest.cases.items()}


def _compared(bundle: str, cases: Any, masks: dict[str, dict[str, Path]], modes: list[str]) -> dict[str, Any]:
    config = find_bundle(bundle).load_configs("train")["train.json"]
    classes, to_classes = config["out_channels"], MapLabelsd("label", mapping=config["label_mapping"])
    counts: dict[str, list[Any]] = {"agreement": [], **{name: [] for name in modes}}
    for case in cases:
        truth = _values(to_classes({"label": load(case["label"], label=True)})["label"])
        exact, fast = (_values(load(masks[name][case["name"]], label=True)) for name in modes)
        counts["agreement"].append(confusion(fast, exact, classes))
        for name, mask in zip(modes, (exact, fast), strict=True):
            counts[name].append(confusion(mask, truth, classes))
    agreement = [dice(entry) for entry in counts["agreement"]]
    pooled = sum(counts["agreement"])
    return {
        "agreement": {
            "dice": dice(pooled),
            "lowest_of_a_case": {
                key: min(entry[key] for entry in agreement if entry[key] is not None) for key in agreement[0]
            },
            "differing": int(pooled.sum() - np.trace(pooled)),
            "voxels": int(pooled.sum()),
        },
        "truth": {name: _mean([dice(entry) for entry in counts[name]]) for name in modes},
    }


def _values(label: Any) -> Any:
    return np.asarray(label[0]).astype(np.uint8)


def _mean(scores: list[dict[str, float | None]]) -> dict[str, float]:
    return {key: statistics.fmean(values) for key, values in _known(scores).items()}


def _known(scores: list[dict[str, float | None]]) -> dict[str, list[float]]:
    """Return the scores of each class over the cases that contain it."""
    return {key: [found for entry in scores if (found := entry[key]) is not None] for key in scores[0]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="hippocampus_mri_unet")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--foreground", action="store_true", help="skip windows outside the body, as for CT")
    parser.add_argument("--output", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
