"""Accuracy at equal CPU time: nnU-Net, a plain MONAI script, and a bundle planned by medseg.

    python benchmarks/training.py --cpu-seconds 3500 --contestants nnunet,monai,medseg --seeds 0

Each contestant trains on the training cases of a data set (`--data`, in `../shared/data`) within the same processor
time, on its own, and predicts the validation cases without test-time flips. One scorer reads all masks: mean Dice of
the labels on the grid of the file, and paired differences to medseg with 95 % bootstrap intervals over the cases. Runs
are kept in `--work`, so they can be made one by one; the record holds all that are there. Needs Linux and a machine
that is idle.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from budget import nnunet
from budget.calls import call
from budget.table import render
from budget.tasks import TASKS, Task
from side_by_side.machine import describe
from side_by_side.settings import RESULTS, environment, nnunet_python
from side_by_side.work import children_cpu, install_nnunet, say, threads_here

CONTESTANTS = ("nnunet", "monai", "monai-plain", "medseg")
DRAWS = 10_000
ONLY_AFTER_THE_LAST = 1_000_000  # epochs between validations


def main() -> None:
    """Run the missing trainings of the request, and score all trainings in the work folder."""
    options = _arguments()
    if options.table:
        render(RESULTS, options.table)
        return
    task = TASKS[options.data]
    for name in options.contestants:
        for seed in options.seeds:
            run = options.work / "runs" / f"{task.name}_{options.cpu_seconds}" / f"{name}_{seed}"
            if not (run / "facts.json").is_file():
                _run(task, name, seed, run, options)
    record = _record(task, options)
    path = options.output or RESULTS / f"training_{task.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({key: record[key] for key in ("dice", "differences")}, indent=1) + "\n")


def _run(task: Task, name: str, seed: int, run: Path, options: argparse.Namespace) -> None:
    say(f"{task.name}: {name}, seed {seed}")
    shutil.rmtree(run, ignore_errors=True)
    (run / "masks").mkdir(parents=True)
    request = {
        "task": task.name,
        "seed": seed,
        "threads": options.threads,
        "augment": name != "monai-plain",
        "cpu_seconds": options.cpu_seconds,
        "masks": str(run / "masks"),
        "facts": str(run / "partial.json"),
        **{split: task.prepared(split, options.work / "prepared") for split in ("train", "val")},
    }
    before, started, load = children_cpu(), time.perf_counter(), os.getloadavg()[0]
    if name == "nnunet":
        if not (options.work / "nnunet" / "installed").is_file():
            install_nnunet(options.work)
        facts = nnunet.run(task, request, options.work / "nnunet_work", nnunet_python(options.work))
    else:
        facts = _medseg(task, request, run) if name == "medseg" else _monai(request, run)
    facts |= {"all_cpu_s": children_cpu() - before, "all_s": time.perf_counter() - started, "load_before": load}
    (run / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    say(f"{task.name}: {name}, seed {seed}: {facts['iterations']} steps, {facts['cpu_s']:.0f} CPU s")


def _monai(request: dict[str, Any], run: Path) -> dict[str, Any]:
    (run / "request.json").write_text(json.dumps(request), encoding="utf-8")
    own = environment(request["threads"], tuned_memory=True)
    call([sys.executable, "-W", "ignore", "-m", "budget.monai_script", run / "request.json"], own)
    facts: dict[str, Any] = json.loads((run / "partial.json").read_text(encoding="utf-8"))
    return facts


def _medseg(task: Task, request: dict[str, Any], run: Path) -> dict[str, Any]:
    """Plan for the wall time in which all threads consume the budget, then train, without selecting by scored cases."""
    bundle, medseg = run / task.bundle, [sys.executable, "-m", "medseg"]
    own = environment(request["threads"], tuned_memory=True)
    seconds = int(request["cpu_seconds"] / request["threads"])
    call([*medseg, "plan", task.root, "-o", bundle, "--network", "unet", "--budget", f"{seconds}s"], own)
    before, started = children_cpu(), time.perf_counter()
    settings = ["--set", f"seed={request['seed']}", "--set", f"val_interval={ONLY_AFTER_THE_LAST}"]
    call([*medseg, "train", bundle, "--data", task.root, *settings], own)
    used, wall = children_cpu() - before, time.perf_counter() - started
    images = [case["image"] for case in task.cases("val")]
    call([*medseg, "predict", bundle, *images, "-o", run / "masks"], own)
    config = json.loads((bundle / "configs" / "train.json").read_text(encoding="utf-8"))
    steps = config.get("steps_per_epoch") or -(-len(request["train"]) // config["batch_size"])
    manifest = json.loads((bundle / "runs" / "train" / "manifest.json").read_text(encoding="utf-8"))
    names = ("batch_size", "patches_per_case", "precision", "patch_size", "max_epochs", "val_interval", "learning_rate")
    return {
        **{name: config[name] for name in names},
        "features": config["network_def"].get("features"),
        "validations": manifest["validations"],
        "iterations": steps * config["max_epochs"],
        "cpu_s": used,
        "train_s": wall,
    }


def _record(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    runs = sorted((options.work / "runs" / f"{task.name}_{options.cpu_seconds}").glob("*/facts.json"))
    scores = {path.parent.name: task.scores(path.parent / "masks") for path in runs}
    facts = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in runs}
    dice = {
        name: {label: statistics.fmean(case[label] for case in found.values()) for label in next(iter(found.values()))}
        for name, found in scores.items()
    }
    differences = {
        f"{ours} - {other}": _difference(scores[ours], scores[other])
        for ours in scores
        for other in scores
        if ours.startswith("medseg") and not other.startswith("medseg")
    }
    return {
        "command": f"python benchmarks/training.py --data {task.name} --cpu-seconds {options.cpu_seconds}",
        "data": task.name,
        "labels": task.labels,
        "cases": {split: len(task.cases(split)) for split in ("train", "val")},
        "cpu_seconds": options.cpu_seconds,
        "threads": options.threads,
        **describe(str(nnunet_python(options.work))),
        "dice": dice,
        "differences": differences,
        "runs": facts,
        "scores": scores,
    }


def _difference(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the mean paired difference of the mean Dice, and its 95 % bootstrap interval over the cases."""
    values = np.array([ours[case]["mean"] - other[case]["mean"] for case in ours])
    means = np.random.default_rng(0).choice(values, (DRAWS, len(values))).mean(1)
    return {
        "mean": float(values.mean()),
        "interval": np.percentile(means, [2.5, 97.5]).tolist(),
        "cases_better": int((values > 0).sum()),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(TASKS), default="msd_hippocampus")
    parser.add_argument("--cpu-seconds", type=int, default=3500)
    parser.add_argument("--contestants", type=lambda text: text.split(","), default=list(CONTESTANTS))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--threads", type=int, default=threads_here())
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "medseg-benchmark")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument(
        "--table", type=Path, metavar="PAGE", help="insert the tables of all records into PAGE, or print them if '-'"
    )
    options = parser.parse_args()
    options.work = options.work.absolute()
    unknown = set(options.contestants) - set(CONTESTANTS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose of {', '.join(CONTESTANTS)}")
    return options


if __name__ == "__main__":
    main()
