"""Rounds of a comparison, and its record."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from side_by_side.machine import describe
from side_by_side.settings import EXACT, FAST, FAST_CT, KINDS, REFERENCES, nnunet_python, truth_path
from side_by_side.work import Setup, say, sha256

MEASURES = ("work_s", "work_cpu_s", "process_s", "process_cpu_s", "peak_mib", "added_mib")


def contest(setup: Setup, contestants: Sequence[str], rounds: int) -> dict[str, Any]:
    """Run every contestant once per round, in an order that rotates by one, and return the record."""
    about = describe(str(nnunet_python(setup.work)))
    say("measuring the rates of the machine and the network")
    rates = setup.start("machine", setup.request())
    margins = {name: margin(setup, name) for name in contestants if name in ("monai", "monai32")}
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    masks: dict[str, list[str]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in turned(contestants, number):
            folder = setup.runs / name / str(number)
            samples[name].append({"round": number, **sample(setup, name, folder)})
            masks[name].append(str(mask_in(folder)))
    say("comparing the masks")
    question = {"masks": masks, "margins": margins, "references": REFERENCES, "truth": _truth(setup)}
    agreement = setup.start("compare", {**question, "classes": setup.settings()["network_def"]["out_channels"]})
    del agreement["process_s"], agreement["process_cpu_s"]
    return {**_about(setup, about), "rates": rates, **summary(samples, rates), **agreement, "samples": samples}


def turned(contestants: Sequence[str], number: int) -> list[str]:
    """Return the contestants in the order of a round."""
    first = number % len(contestants)
    return [*contestants[first:], *contestants[:first]]


def sample(setup: Setup, name: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Run one contestant once."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python = {"python": str(nnunet_python(setup.work))} if name == "nnunet" else {}
    # The image must be in the page cache for all contestants.
    setup.image.read_bytes()
    request = setup.request(contestant=name, case=setup.case, output=str(folder), **more)
    load = os.getloadavg()[0]
    found = setup.start("sample", request, **python)
    found |= {"load_before": load, "added_mib": found["peak_mib"] - found["imported_mib"]}
    say(f"{name}: {found['work_s']:.1f} s, {found['work_cpu_s']:.1f} CPU s, {found['peak_mib']:.0f} MiB")
    return found


def mask_in(folder: Path) -> Path:
    """Return the one mask that a contestant wrote.

    Raises:
        SystemExit: there is none, or several.
    """
    masks = [path for path in folder.rglob("*") if path.name.endswith((".nii.gz", ".png"))]
    if len(masks) != 1:
        raise SystemExit(f"expected one mask in {folder}, found {[path.name for path in masks]}")
    return masks[0]


def margin(setup: Setup, name: str) -> str:
    """Return the file of the margin of a reference's best class at each voxel, from an untimed run."""
    told = json.dumps([sha256(setup.weights), setup.settings()], sort_keys=True)
    path = setup.runs / f"lead_{name}_{hashlib.sha256(told.encode()).hexdigest()[:8]}.npy"
    if not path.is_file():
        partial = path.with_name(f".partial-{path.name}")
        sample(setup, name, setup.runs / "lead", margin=str(partial))
        partial.replace(path)
    return str(path)


def summary(samples: dict[str, list[dict[str, Any]]], rates: dict[str, Any]) -> dict[str, Any]:
    """Return the medians, and their ratios to those of (a), (b) and (c)."""
    medians = {
        name: {key: statistics.median(entry[key] for entry in found) for key in MEASURES}
        for name, found in samples.items()
    }
    for values in medians.values():
        values["share_of_rate"] = rates["image_gflop"] / values["work_s"] / rates["dense_gflop_per_s"]
    compared = ("work_s", "work_cpu_s", "process_s", "peak_mib", "added_mib")
    ratios = {
        name: {
            other: {key: medians[other][key] / values[key] for key in compared if values[key] > 0}
            for other in ("monai", "monai32", "nnunet")
            if other in medians and other != name
        }
        for name, values in medians.items()
    }
    return {"medians": medians, "ratios": ratios}


def _truth(setup: Setup) -> str | None:
    path = truth_path(setup.work, setup.case)
    return str(path) if path.is_file() else None


def _about(setup: Setup, about: dict[str, Any]) -> dict[str, Any]:
    trained = setup.bundle / "training.json"
    return {
        "case": setup.case,
        "network": setup.network,
        "image_bytes": setup.image.stat().st_size,
        "settings": setup.settings(),
        "knobs": {"medseg": EXACT, "medseg-fast": FAST if setup.case in KINDS else FAST_CT},
        "weights": {
            "sha256": sha256(setup.weights),
            "trained": setup.network in ("light", "shipped"),
            **(json.loads(trained.read_text(encoding="utf-8")) if trained.is_file() else {}),
        },
        "threads": setup.threads,
        "tuned_memory": setup.tuned_memory,
        **about,
    }
