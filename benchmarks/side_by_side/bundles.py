"""Bundles of the benchmark, created once in the work folder, each in a separate process.

    python -m side_by_side.bundles FOLDER CASE NETWORK [CLASSES]

"light" is trained on phantoms and "shipped" comes with its weights. The others start from a fixed seed and stay there:
their speed and memory are those of trained networks, their masks mean nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

import medseg
from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle, find_bundle
from medseg.training.checkpoint import save_tensors
from side_by_side.settings import CT_BUNDLE, FEATURES, SHIPPED, bundle_path

SEED = 20


def make_bundle(folder: Path, case: str, network: str, classes: int | None = None) -> None:
    """Create a bundle with weights atomically."""
    target = bundle_path(folder, case, network, classes)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        new = Bundle(Path(temporary) / target.name)
        if case in SHIPPED:
            shutil.copytree(find_bundle(target.name).root, new.root, ignore=shutil.ignore_patterns("runs"))
        else:
            new.root.mkdir()
            content = ct_bundle(target.name, network, classes)
            (new.root / "bundle.json").write_text(json.dumps(content), encoding="utf-8")
            build(new)
        if network == "light" and classes is None:
            _train(new, folder / "training")
        elif not new.weights.is_file():
            _draw(new)
        new.root.replace(target)


def ct_bundle(name: str, network: str, classes: int | None) -> dict[str, Any]:
    """Return the `bundle.json` of a CT network with the given width and number of classes."""
    content: dict[str, Any] = json.loads(CT_BUNDLE.read_text(encoding="utf-8"))
    content["name"] = name
    content["network_def"]["features"] = FEATURES[network]
    if classes:
        content["network_def"]["out_channels"] = classes
        content["labels"] = {str(number): f"class {number}" for number in range(classes)}
    return content


def network_of(bundle: Bundle) -> Any:
    """Return the bundle's network as its config defines it, in evaluation mode, without weights."""
    config = bundle.load_configs("inference")["inference.json"]
    return ConfigParser({"network_def": config["network_def"]}).get_parsed_content("network_def").eval()


def _train(bundle: Bundle, data: Path) -> None:
    manifest = medseg.train(bundle.root, data)
    best = max(manifest.validations, key=lambda entry: entry["val_mean_dice"])
    scores = medseg.evaluate(bundle.root, data, output=bundle.root / "runs" / "evaluate")
    cases = [record.metrics for record in scores.cases.values()]
    means = {name: round(sum(case[name] for case in cases) / len(cases), 4) for name in cases[0]}
    (bundle.root / "training.json").write_text(json.dumps({"best": best, "dice": means}), encoding="utf-8")


def _draw(bundle: Bundle) -> None:
    torch.manual_seed(SEED)
    bundle.weights.parent.mkdir(exist_ok=True)
    save_tensors(network_of(bundle).state_dict(), bundle.weights)
    build(bundle)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    make_bundle(Path(arguments[0]), arguments[1], arguments[2], int(arguments[3]) if len(arguments) > 3 else None)
