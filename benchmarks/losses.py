"""Time and memory of the Dice and cross-entropy loss: medseg compared with MONAI.

    python benchmarks/losses.py [--rounds N] [--threads N] [--json FILE]

prints a markdown table. Value and gradient of random logits and labels are computed in turn by
`SoftDiceCELoss` and by `monai.losses.DiceCELoss(softmax=True, to_onehot_y=True, include_background=False,
batch=True)`; the times are medians over the rounds, on the clock and of the processor. Memory (MiB) is the largest
resident set of a fresh process less that before the loss, so the gradient of the logits is part of it. `difference` is
the largest one of the two gradients, divided by the largest gradient. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from side_by_side.machine import describe
from side_by_side.sample import reset_peak, status

SHAPES = ((2, 3, 40, 56, 40), (2, 14, 96, 96, 96))
NAMES = ("monai", "medseg")


def main() -> None:
    """Measure every shape and print the table."""
    options = _arguments()
    if options.memory:
        name, *shape = options.memory
        print(_memory(name, tuple(map(int, shape)), options.threads))
        return
    rows = [_row(shape, options.rounds, options.threads) for shape in SHAPES]
    print(table(rows))
    if options.json:
        settings = {"rounds": options.rounds, "threads": options.threads}
        record = {"command": "python benchmarks/losses.py", **settings, **describe()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="repetitions of each loss (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write results, machine, load and versions to FILE"
    )
    parser.add_argument(
        "--memory", nargs="+", metavar="NAME SIZE", help="measure the memory of one loss in this process"
    )
    return parser.parse_args()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table with a row for each shape."""
    kinds = {"ms": "ms", "cpu_ms": "cpu ms", "mib": "MiB"}
    titles = [f"{name}, {title}" for title in kinds.values() for name in NAMES]
    lines = [f"| logits | {' | '.join(titles)} | logits, MiB | difference |", "|---" + "|--:" * (len(titles) + 2) + "|"]
    for row in rows:
        figures = [f"{row[f'{name}_{kind}']:.1f}" for kind in kinds for name in NAMES]
        shape = "x".join(map(str, row["shape"]))
        lines.append(f"| {shape} | {' | '.join(figures)} | {row['logits_mib']:.1f} | {row['difference']:.1e} |")
    return "\n".join(lines)


def _row(shape: tuple[int, ...], rounds: int, threads: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    logits, label = _batch(shape)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    gradients = {}
    for turn in range(rounds + 1):
        for name in NAMES[:: 1 if turn % 2 else -1]:
            loss = _loss(name)
            logits.grad = None
            start = (time.perf_counter(), time.process_time())
            loss(logits, label).backward()
            samples[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            gradients[name] = logits.grad
    largest = gradients["monai"].abs().max()
    difference = float((gradients["monai"] - gradients["medseg"]).abs().max() / largest)
    # The first round is a warm-up.
    medians = {
        f"{name}_{kind}": round(statistics.median(value[index] for value in samples[name][1:]) * 1000, 2)
        for index, kind in enumerate(("ms", "cpu_ms"))
        for name in NAMES
    }
    memory = {f"{name}_mib": _in_child(name, shape, threads) for name in NAMES}
    print(shape, medians, memory, file=sys.stderr)
    size = round(logits.numel() * 4 / 2**20, 1)
    return {
        "shape": shape,
        **medians,
        "ratio": round(medians["monai_cpu_ms"] / medians["medseg_cpu_ms"], 2),
        **memory,
        "logits_mib": size,
        "difference": difference,
        "load_before": round(load, 2),
    }


def _batch(shape: tuple[int, ...]) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).requires_grad_()
    return logits, torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=generator, dtype=torch.int32)


def _loss(name: str) -> Any:
    from monai.losses import DiceCELoss

    from medseg.losses.dice_ce import SoftDiceCELoss

    if name == "medseg":
        return SoftDiceCELoss()
    return DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)


def _in_child(name: str, shape: tuple[int, ...], threads: int) -> float:
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(threads), "--memory", name, *map(str, shape)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _memory(name: str, shape: tuple[int, ...], threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    # The first call imports modules and initializes caches.
    small, truth = _batch((1, shape[1], *[4] * (len(shape) - 2)))
    loss = _loss(name)
    loss(small, truth).backward()
    logits, label = _batch(shape)
    before = reset_peak()
    loss(logits, label).backward()
    return round(status("VmHWM") - before, 1)


if __name__ == "__main__":
    main()
