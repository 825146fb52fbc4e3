"""Time of training patches: medseg's transforms compared with equivalent MONAI transforms.

    python benchmarks/augmentation.py [--case NAME] [--rounds N] [--threads N] [--json FILE]

prints a markdown table of milliseconds. Every contestant gets the same generated case in memory, as a cached data set
hands it on, and draws its parameters anew in each round; contestants take turns, and the figure is the median over the
rounds. `ms` is time on the clock, `cpu` time of the processor, which other work on the machine disturbs less; the load
before each case is in the record. `ratio` is MONAI's processor time divided by that of medseg.

Patches, from a case to a patch of image (linear) and label (nearest):

- `hippocampus`: 35x51x35 to 40x56x40, rotation about all axes and zoom
- `ct`: 512x512x100 to 96x96x96 around a voxel of a random class, rotation and zoom; `ct-noted` with the places of the
  classes noted beforehand (`ClassIndicesd`, `ClassesToIndicesd`)
- `picture`: 775x522, three channels, to 224x224, flips, rotation by any angle and zoom

`medseg` is `RandWarpd`. `monai` is a chain of padding, affine warp and crop in the order that bundles of the model zoo
have them: small volumes and pictures are warped whole and then cropped, large volumes are cropped and the crop is
warped, so that what the warp brings in from beyond the crop is border. Rows `... plain` draw no warp.

Elastic deformation of whole images (`elastic-...`): `RandElasticd` beside `Rand2DElasticd` and `Rand3DElasticd`, which
deform by other fields (see docs of each), so only the time is to be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side.machine import describe

Contestants = dict[str, Callable[[], Any]]


def main() -> None:
    """Measure the selected cases and print the table."""
    options = _arguments()
    import torch

    torch.set_num_threads(options.threads)
    rows = []
    for name, make in CASES.items():
        if options.case in (None, name):
            rows += [_measured(label, contestants, options.rounds) for label, contestants in make().items()]
    print(table(rows))
    if options.json:
        settings = {"rounds": options.rounds, "threads": options.threads}
        record = {"command": "python benchmarks/augmentation.py", **settings, **describe()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), help="case to measure (default all)")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of each contestant (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write results, machine, load and versions to FILE"
    )
    return parser.parse_args()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table with a row for each case."""
    columns = ("monai_ms", "medseg_ms", "monai_cpu_ms", "medseg_cpu_ms", "ratio")
    lines = ["| case | monai, ms | medseg, ms | monai, cpu ms | medseg, cpu ms | ratio |", "|---|--:|--:|--:|--:|--:|"]
    lines += [f"| {row['case']} | {' | '.join(f'{row[column]:.1f}' for column in columns)} |" for row in rows]
    return "\n".join(lines)


def _measured(case: str, contestants: Contestants, rounds: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for turn in range(rounds):
        order = list(contestants)[:: 1 if turn % 2 else -1]
        for name in order:
            start = (time.perf_counter(), time.process_time())
            contestants[name]()
            samples[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    figures = {}
    for index, kind in enumerate(("ms", "cpu_ms")):
        for name, values in samples.items():
            figures[f"{name}_{kind}"] = round(statistics.median(value[index] for value in values) * 1000, 3)
    ratio = round(figures["monai_cpu_ms"] / figures["medseg_cpu_ms"], 2)
    print(f"{case}: {figures}, load {load:.1f}", file=sys.stderr)
    return {"case": case, **figures, "ratio": ratio, "load_before": round(load, 2)}


def _case(shape: tuple[int, ...], channels: int, classes: int) -> dict[str, Any]:
    """Return noise with nested box-shaped classes, at a spacing of 1 mm."""
    import torch
    from monai.data import MetaTensor

    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(1, *shape, dtype=torch.int32)
    for value in range(1, classes):
        depth = [n * value // (2 * classes + 2) + n // 5 for n in shape]
        label[(slice(None), *[slice(d, n - d) for d, n in zip(depth, shape, strict=True)])] = value
    image = torch.rand(channels, *shape, generator=generator)
    return {"image": MetaTensor(image, affine=torch.eye(4)), "label": MetaTensor(label, affine=torch.eye(4))}


def _runs(case: dict[str, Any], **chains: list[Any]) -> Contestants:
    from monai.transforms import Compose

    composed = {name: Compose(chain).set_random_state(0) for name, chain in chains.items()}
    return {name: lambda chain=chain: chain(dict(case)) for name, chain in composed.items()}


def hippocampus() -> dict[str, Contestants]:
    """Return the contestants on a small volume, with and without a warp."""
    from monai.transforms import RandAffined, RandSpatialCropd, SpatialPadd

    from medseg.transforms.warp import RandWarpd

    keys, size = ["image", "label"], (40, 56, 40)
    case = _case((35, 51, 35), 1, 3)
    rows = {}
    for name, prob in {"hippocampus": 1.0, "hippocampus plain": 0.0}.items():
        warp = {"rotate_range": [0.26] * 3, "scale_range": [0.2] * 3, "mode": ["bilinear", "nearest"]}
        monai = [
            SpatialPadd(keys, size),
            RandAffined(keys, prob=prob, padding_mode="border", **warp),
            RandSpatialCropd(keys, size, random_size=False),
        ]
        chances = {"rotate_prob": prob, "zoom_prob": prob}
        ours = RandWarpd(keys, size, rotate_range=0.26, zoom_range=(0.83, 1.25), zoom_per_axis=True, **chances)
        rows[name] = _runs(case, monai=monai, medseg=[ours])
    return rows


def ct() -> dict[str, Contestants]:
    """Return the contestants on a large volume, with and without precomputed class indices, and a warp."""
    from monai.transforms import ClassesToIndicesd, RandAffined, RandCropByLabelClassesd, SpatialPadd

    from medseg.transforms.class_indices import ClassIndicesd
    from medseg.transforms.warp import RandWarpd

    keys, size, classes = ["image", "label"], (96, 96, 96), 3
    case = _case((512, 512, 100), 1, classes)
    indexed = ClassesToIndicesd("label", num_classes=classes)(case)
    noted = ClassIndicesd("label")(case)
    warp = {"rotate_range": [0.26] * 3, "scale_range": [0.2] * 3, "mode": ["bilinear", "nearest"]}
    rows = {}
    for name, prob in {"ct": 1.0, "ct plain": 0.0, "ct-noted": 1.0, "ct-noted plain": 0.0}.items():
        known = "noted" in name
        monai = [
            SpatialPadd(keys, size),
            RandCropByLabelClassesd(
                keys,
                "label",
                size,
                num_classes=classes,
                warn=False,
                indices_key="label_cls_indices" if known else None,
            ),
            RandAffined(keys, prob=prob, padding_mode="border", **warp),
        ]
        chances = {"rotate_prob": prob, "zoom_prob": prob, "foreground": 1.0}
        ours = [RandWarpd(keys, size, rotate_range=0.26, zoom_range=(0.83, 1.25), zoom_per_axis=True, **chances)]
        runs = _runs(indexed if known else case, monai=monai)
        rows[name] = runs | _runs(noted if known else case, medseg=ours)
    return rows


def picture() -> dict[str, Contestants]:
    """Return the contestants on a color image, with and without a warp."""
    from monai.transforms import RandAffined, RandFlipd, RandSpatialCropd, SpatialPadd

    from medseg.transforms.warp import RandWarpd

    keys, size = ["image", "label"], (224, 224)
    case = _case((775, 522), 3, 2)
    rows = {}
    for name, prob in {"picture": 1.0, "picture plain": 0.0}.items():
        warp = {"rotate_range": 3.14, "scale_range": [0.25, 0.25], "mode": ["bilinear", "nearest"]}
        monai = [
            SpatialPadd(keys, size, mode="reflect"),
            RandFlipd(keys, prob=0.5, spatial_axis=0),
            RandFlipd(keys, prob=0.5, spatial_axis=1),
            RandAffined(keys, prob=prob, padding_mode="reflection", **warp),
            RandSpatialCropd(keys, size, random_size=False),
        ]
        chances = {"rotate_prob": prob, "zoom_prob": prob, "flip_prob": 0.5, "padding": "reflect"}
        ours = RandWarpd(keys, size, rotate_range=3.14, zoom_range=(0.8, 1.33), zoom_per_axis=True, **chances)
        rows[name] = _runs(case, monai=monai, medseg=[ours])
    return rows


def elastic() -> dict[str, Contestants]:
    """Return the contestants that deform whole images."""
    from monai.transforms import Rand2DElasticd, Rand3DElasticd

    from medseg.transforms.elastic import RandElasticd

    keys, modes = ["image", "label"], ["bilinear", "nearest"]
    shapes = {"elastic-picture": (775, 522), "elastic-hippocampus": (35, 51, 35), "elastic-patch": (96, 96, 96)}
    rows = {}
    for name, shape in shapes.items():
        case = _case(shape, 3 if len(shape) == 2 else 1, 3)
        if len(shape) == 2:
            monai = Rand2DElasticd(
                keys, spacing=(200, 200), magnitude_range=(5, 10), prob=1.0, mode=modes, padding_mode="reflection"
            )
        else:
            monai = Rand3DElasticd(
                keys, sigma_range=(5, 7), magnitude_range=(50, 150), prob=1.0, mode=modes, padding_mode="reflection"
            )
        rows[name] = _runs(case, monai=[monai], medseg=[RandElasticd(keys)])
    return rows


CASES: dict[str, Callable[[], dict[str, Contestants]]] = {
    "hippocampus": hippocampus,
    "ct": ct,
    "picture": picture,
    "elastic": elastic,
}

if __name__ == "__main__":
    main()
