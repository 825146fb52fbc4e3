"""Waiting time for data in training: profile of short epochs of the shipped bundles on real data.

    python benchmarks/training_pipeline.py --data ../shared/data --steps 60

For each bundle and number of workers: the share of an epoch's time that its steps wait for their batch (target: below
5 %), milliseconds per step, the processor time of the training process in them (which other programs do not lengthen),
and that of the pipeline, measured by making the same batches without a network. The bundles are trained in a temporary
copy with their own recipes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from side_by_side.machine import describe

from medseg.bundle.catalog import Bundle, find_bundle
from medseg.jobs.job import open_workflow, prepare

BUNDLES = {"hippocampus_mri_unet": "msd_hippocampus", "gland_pathology_unet": "glas"}
TARGET = 0.05


def main() -> None:
    """Print the table, and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of the data sets (default ../shared/data)"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps per epoch; the second epoch is measured")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="numbers of loader processes to measure")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = [
        profile(name, arguments.data / folder, workers, arguments.steps)
        for name, folder in BUNDLES.items()
        for workers in arguments.workers
    ]
    print(f"{'bundle':24} workers  waiting  ms/step  processor ms  of pipeline  patches/s")
    for row in rows:
        print(
            f"{row['bundle']:24} {row['workers']:7}  {row['waiting']:7.1%}  {row['step_ms']:7.0f}  "
            f"{row['processor_ms']:12.0f}  {row['pipeline_ms']:11.0f}  {row['patches_per_second']:9.1f}"
        )
    if arguments.output:
        import torch

        settings = {"steps": arguments.steps, "target": TARGET, "threads": torch.get_num_threads()}
        record = {"command": "python benchmarks/training_pipeline.py", **settings, **describe(), "rows": rows}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def profile(name: str, data: Path, workers: int, steps: int) -> dict[str, Any]:
    """Train a copy for two short epochs and measure the second."""
    from ignite.engine import Events

    # the run ends before the last epoch, which would be validated
    settings = {"num_workers": workers, "steps_per_epoch": steps, "max_epochs": 3, "val_interval": 1000}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle(Path(folder) / name)
        shutil.copytree(find_bundle(name).root / "configs", bundle.root / "configs")
        job = prepare("train", bundle, settings, paths={"dataset_dir": str(data.absolute()), "resume": False})
        workflow = open_workflow(job, "train")
        workflow.initialize()
        trainer = workflow.trainer
        found: dict[str, Any] = {}
        begun = 0.0

        def begin() -> None:
            nonlocal begun
            begun = time.process_time()

        def note() -> None:
            state = trainer.state
            found.update(waiting=state.waiting, patches_per_second=state.patches_per_second)
            found["step_ms"] = 1000 * state.times["EPOCH_COMPLETED"] / steps
            found["processor_ms"] = 1000 * (time.process_time() - begun) / steps
            if state.epoch == 2:
                trainer.terminate()

        trainer.add_event_handler(Events.EPOCH_STARTED, begin)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, note)
        trainer.run()
        return {"bundle": name, "workers": workers, **found, "pipeline_ms": pipeline_ms(trainer.data_loader, steps)}


def pipeline_ms(loader: Any, steps: int) -> float:
    """Return the CPU time for producing one batch."""
    keys = [key for _, key in zip(range(steps), loader.batches, strict=False)]
    start = time.process_time()
    for batch in keys:
        loader.collate_fn(loader.dataset.__getitems__(batch))
    return 1000 * (time.process_time() - start) / steps


if __name__ == "__main__":
    main()
