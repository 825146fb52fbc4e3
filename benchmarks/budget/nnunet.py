"""nnU-Net 2 on the same cases: its data layout, its planning, its training within the budget, its prediction."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from side_by_side.settings import environment

NAME, NUMBER = "Dataset004_Hippocampus", "4"


def run(request: dict[str, Any], work: Path, python: Path) -> dict[str, Any]:
    """Prepare once, train, predict; return iterations, batch, precision and processor seconds of the training."""
    own = _environment(request, work)
    _prepare(request, work, python, own)
    tool = [python, Path(__file__).with_name("nnunet_tool.py")]
    results = work / "results" / str(request["seed"])
    _call([*tool, "train", NUMBER, "3d_fullres", "0", "-tr", "nnUNetTrainerBudget", "-device", "cpu"], own)
    trained = next(results.rglob("fold_0"))
    given, masks = work / "given", Path(request["masks"])
    shutil.rmtree(given, ignore_errors=True)
    given.mkdir()
    for case in request["val"]:
        shutil.copy2(case["image"], given / f"{_name(case)}_0000.nii.gz")
    names = ["-d", NUMBER, "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerBudget", "-chk", "checkpoint_final.pth"]
    # Without mirroring, as the others predict.
    calm = ["--disable_tta", "-device", "cpu", "-npp", "1", "-nps", "1"]
    _call([*tool, "predict", "-i", given, "-o", masks, *names, *calm], own)
    facts: dict[str, Any] = json.loads((trained / "facts.json").read_text(encoding="utf-8"))
    return facts


def _environment(request: dict[str, Any], work: Path) -> dict[str, str]:
    own = environment(request["threads"], tuned_memory=True)
    places = {
        "nnUNet_raw": "raw",
        "nnUNet_preprocessed": "preprocessed",
        "nnUNet_results": f"results/{request['seed']}",
    }
    for variable, folder in places.items():
        (work / folder).mkdir(parents=True, exist_ok=True)
        own[variable] = str(work / folder)
    return own | {
        "nnUNet_extTrainer": str(Path(__file__).with_name("trainer")),
        # Augmentation in the process that trains, so that its processor time is counted; waiting costs none.
        "nnUNet_n_proc_DA": "0",
        "BUDGET_CPU_SECONDS": str(request["cpu_seconds"]),
        "BUDGET_SEED": str(request["seed"]),
    }


def _prepare(request: dict[str, Any], work: Path, python: Path, own: dict[str, str]) -> None:
    """Lay out training and validation cases, let nnU-Net plan, and give it our split."""
    done = work / "preprocessed" / NAME / "splits_final.json"
    if done.is_file():
        return
    raw = work / "raw" / NAME
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for case in [*request["train"], *request["val"]]:
        shutil.copy2(case["image"], raw / "imagesTr" / f"{_name(case)}_0000.nii.gz")
        shutil.copy2(case["label"], raw / "labelsTr" / f"{_name(case)}.nii.gz")
    labels = {name: int(value) for value, name in request["labels"].items()}
    count = len(request["train"]) + len(request["val"])
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": count, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    # Its planning takes this number for torch's threads, and fails at 0.
    planning = own | {"nnUNet_n_proc_DA": str(request["threads"])}
    _call([python.parent / "nnUNetv2_plan_and_preprocess", "-d", NUMBER, "-c", "3d_fullres", "-np", "2"], planning)
    split = [{part: [_name(case) for case in request[part]] for part in ("train", "val")}]
    done.write_text(json.dumps(split), encoding="utf-8")


def _name(case: dict[str, str]) -> str:
    return Path(case["image"]).name.removesuffix(".nii.gz")


def _call(command: list[Any], own: dict[str, str]) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(words[0]).name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
