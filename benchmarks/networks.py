"""Parameters, GMACs and memory of the networks, in the sizes of their papers and in their small form.

    python benchmarks/networks.py [--json FILE]

prints a markdown table. Inputs have one channel and two classes come out: 224x224 pixels in 2D, 64x64x64 voxels in 3D.

- parameters: exact.
- GMAC: 10^9 multiplications with addition of one forward pass of one image, half of what torch's `FlopCounterMode`
  counts: those of convolutions and matrix products, nothing else.
- memory (MiB): the largest resident set of a process less that after building the network, for the inference of one
  image and for one training step (AdamW, Dice and cross-entropy, batch of 2, float32). Each row in a fresh process on
  one thread; needs Linux. "-" where it was not measured, as for networks of more than `--limit` GMAC.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side.machine import describe
from side_by_side.sample import reset_peak, status

FORMS = ("small", "paper")
SIDES = {2: 224, 3: 64}
COLUMNS = ("parameters", "GMAC", "inference, MiB", "training step, MiB")
BATCH = 2


def main() -> None:
    """Measure every row, or the selected one, and print the table."""
    options = _arguments()
    if options.row:
        name, form, dims = options.row
        print(json.dumps(measure(name, form, int(dims), limit=options.limit)))
        return
    from medseg.networks import NETWORKS

    rows = [
        _in_child(network.__name__, form, dims, options.limit)
        for network in (entry.load() for entry in NETWORKS.values())
        for form in FORMS
        for dims in SIDES
    ]
    print(table(rows))
    if options.json:
        settings = {"limit_gmac": options.limit, "threads": 1}
        result = {"command": "python benchmarks/networks.py", **settings, **describe(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write results, machine and versions to FILE")
    parser.add_argument(
        "--limit",
        type=float,
        default=50.0,
        metavar="GMAC",
        help="do not measure the memory of larger networks (default 50)",
    )
    parser.add_argument(
        "--row",
        nargs=3,
        metavar=("CLASS", "FORM", "DIMS"),
        help='measure one row in this process and print JSON, such as "UNet small 3"',
    )
    return parser.parse_args()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table with a row for each network and form, and "2D / 3D" in each cell."""
    lines = [f"| network | form | {' | '.join(COLUMNS)} |", "|---|---|" + "--:|" * len(COLUMNS)]
    keys = dict.fromkeys((row["network"], row["form"]) for row in rows)
    for network, form in keys:
        lines.append(f"| {network} | {form} | {cells(rows, network, form)} |")
    return "\n".join(lines)


def cells(rows: list[dict[str, Any]], network: str, form: str) -> str:
    """Return the cells of one row of the table, each "2D / 3D"."""
    flat, deep = (
        next(row for row in rows if (row["network"], row["form"], row["spatial_dims"]) == (network, form, dims))
        for dims in SIDES
    )
    pairs = [(_figures(flat)[i], _figures(deep)[i]) for i in range(len(COLUMNS))]
    return " | ".join(" / ".join(pair) for pair in pairs)


def _figures(row: dict[str, Any]) -> list[str]:
    memory = [row["inference_mib"], row["training_mib"]]
    counted = [f"{row['parameters']:,}", f"{row['gmac']:.1f}"]
    return [*counted, *("-" if value is None else f"{value:.0f}" for value in memory)]


def _in_child(name: str, form: str, dims: int, limit: float) -> dict[str, Any]:
    print(f"{name} {form} {dims}D ...", end=" ", file=sys.stderr, flush=True)
    command = [sys.executable, "-W", "ignore", __file__, "--row", name, form, str(dims), "--limit", str(limit)]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout)
    print(", ".join(_figures(row)), file=sys.stderr)
    return row


def measure(name: str, form: str, dims: int, *, limit: float) -> dict[str, Any]:
    """Return the measurements of one row, from this process, which should be new and single-threaded."""
    import torch

    import medseg.networks

    torch.set_num_threads(1)
    options = medseg.networks.small(name, dims) if form == "small" else {}
    arguments = {"spatial_dims": dims, "in_channels": 1, "out_channels": 2, **options}
    network = getattr(medseg.networks, name)
    parameters, gmac = _count(network, arguments, (1, 1, *[SIDES[dims]] * dims))
    row = {"network": name, "form": form, "spatial_dims": dims, "arguments": arguments, "parameters": parameters}
    row |= {"gmac": round(gmac, 3), "inference_mib": None, "training_mib": None}
    if gmac <= limit and Path("/proc/self/clear_refs").exists():
        row |= _memory(network, arguments, (1, *[SIDES[dims]] * dims))
    return row


def _count(network: Any, arguments: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, float]:
    """Count MACs on meta tensors, so that any size is possible."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), torch.no_grad():
        built = network(**arguments).eval()
        with FlopCounterMode(display=False) as counter:
            built(torch.empty(shape))
    return sum(p.numel() for p in built.parameters()), counter.get_total_flops() / 2e9


def _memory(network: Any, arguments: dict[str, Any], shape: tuple[int, ...]) -> dict[str, float]:
    import torch
    from torch import nn

    # torch and MONAI import modules at the first step.
    convolution = (nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    _train(convolution(1, 2, 1), torch.rand(BATCH, 1, *(4 for _ in shape[1:])))
    torch.manual_seed(0)
    built = network(**arguments)
    built.eval()
    image, batch = torch.rand(1, *shape), torch.rand(BATCH, *shape)
    before = reset_peak()
    with torch.inference_mode():
        built(image)
    inference = status("VmHWM") - before
    reset_peak()
    _train(built, batch)
    return {"inference_mib": round(inference, 1), "training_mib": round(status("VmHWM") - before, 1)}


def _train(network: Any, image: Any) -> None:
    import torch
    from monai.losses import DiceCELoss

    from medseg.losses.training import TrainingLoss
    from medseg.training.wrapper import TrainingWrapper

    network.train()
    optimizer = torch.optim.AdamW(network.parameters())
    loss = TrainingLoss(DiceCELoss(softmax=True, to_onehot_y=True))
    loss(TrainingWrapper(network)(image), (image > 0.5).float()).backward()
    optimizer.step()


if __name__ == "__main__":
    main()
