"""nnU-Net 2 on the same cases: its data layout, its planning, its training within the budget, its prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from side_by_side.settings import environment

from budget.calls import call

if TYPE_CHECKING:
    from budget.tasks import Task


def run(task: Task, request: dict[str, Any], work: Path, python: Path) -> dict[str, Any]:
    """Prepare once, train and predict; return iterations, batch size, precision and CPU seconds of the training."""
    own = _environment(request, work)
    _prepare(task, request, work, python, own)
    tool = [python, Path(__file__).with_name("nnunet_tool.py")]
    results = work / "results" / str(request["seed"]) / _folder(task)
    call([*tool, "train", task.number, task.configuration, "0", "-tr", "nnUNetTrainerBudget", "-device", "cpu"], own)
    trained = next(results.rglob("fold_0"))
    given, masks = work / "given", Path(request["masks"])
    shutil.rmtree(given, ignore_errors=True)
    given.mkdir()
    for case in request["val"]:
        shutil.copy2(case["image"], given / f"{_name(case)}_0000{task.ending}")
    names = ["-d", task.number, "-c", task.configuration, "-f", "0", "-tr", "nnUNetTrainerBudget"]
    # Without mirroring, as the other contestants.
    calm = ["--disable_tta", "-device", "cpu", "-npp", "1", "-nps", "1"]
    call([*tool, "predict", "-i", given, "-o", masks, *names, "-chk", "checkpoint_final.pth", *calm], own)
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
        # Augment in the training process, so that its CPU time is counted.
        "nnUNet_n_proc_DA": "0",
        "BUDGET_CPU_SECONDS": str(request["cpu_seconds"]),
        "BUDGET_SEED": str(request["seed"]),
    }


def _prepare(task: Task, request: dict[str, Any], work: Path, python: Path, own: dict[str, str]) -> None:
    """Write training and validation cases, run nnU-Net's planning, and set the split."""
    done = work / "preprocessed" / _folder(task) / "splits_final.json"
    if done.is_file():
        return
    raw = work / "raw" / _folder(task)
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for case in [*request["train"], *request["val"]]:
        shutil.copy2(case["image"], raw / "imagesTr" / f"{_name(case)}_0000{task.ending}")
        shutil.copy2(case["label"], raw / "labelsTr" / f"{_name(case)}{task.ending}")
    labels = {name: int(value) for value, name in task.labels.items()}
    channels = ("red", "green", "blue") if task.pictures else ("MRI",)
    count = len(request["train"]) + len(request["val"])
    description = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": labels,
        "numTraining": count,
        "file_ending": task.ending,
    }
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    # nnU-Net's planning passes this number to torch as its threads, and fails at 0.
    planning = own | {"nnUNet_n_proc_DA": str(request["threads"])}
    call(
        [python.parent / "nnUNetv2_plan_and_preprocess", "-d", task.number, "-c", task.configuration, "-np", "2"],
        planning,
    )
    split = [{part: [_name(case) for case in request[part]] for part in ("train", "val")}]
    done.write_text(json.dumps(split), encoding="utf-8")


def _folder(task: Task) -> str:
    return f"Dataset{task.number:03}_{task.name}"


def _name(case: dict[str, str]) -> str:
    return Path(case["image"]).name.removesuffix(".nii.gz").removesuffix(".png")
