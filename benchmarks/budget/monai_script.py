"""A typical training script: MONAI's BasicUNet and transforms, AdamW with a cosine schedule, bfloat16.

    python -m budget.monai_script REQUEST.json

trains for a budget of processor time and predicts the validation cases on their own grids.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    SpatialPadd,
)
from monai.utils import set_determinism
from PIL import Image

from budget.tasks import TASKS, Task

RATE, DECAY = 1e-3, 1e-2
KEYS = ["image", "label"]


def main() -> None:
    """Train, predict, and write the measurements."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    task = TASKS[request["task"]]
    torch.set_num_threads(request["threads"])
    set_determinism(request["seed"])
    channels = 3 if task.pictures else 1
    network = BasicUNet(spatial_dims=len(task.patch), in_channels=channels, out_channels=len(task.labels))
    iterations, used = _train(network, task, request)
    if not all(bool(weight.isfinite().all()) for weight in network.parameters()):
        raise SystemExit("the training ended with non-finite weights (NaN or Inf)")
    _predict(network, task, request)
    facts = {"iterations": iterations, "batch_size": task.batch, "cpu_s": used, "precision": "bfloat16"}
    Path(request["facts"]).write_text(json.dumps(facts), encoding="utf-8")


def _load(task: Task, *keys: str) -> list[Any]:
    shaped = [EnsureChannelFirstd(key, channel_dim=_channel(task, key)) for key in keys]
    return [LoadImaged(keys), *shaped, NormalizeIntensityd("image")]


def _channel(task: Task, key: str) -> Any:
    return -1 if task.pictures and key == "image" else "no_channel"


def _vary(task: Task) -> list[Any]:
    flips = [RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in (0, 1)] if task.pictures else []
    return [
        *flips,
        RandAffined(
            KEYS,
            prob=0.5,
            rotate_range=[0.26] * (1 if task.pictures else 3),
            scale_range=[0.2] * len(task.patch),
            spatial_size=task.patch,
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        RandGaussianNoised("image", prob=0.2, std=0.1),
        RandScaleIntensityd("image", factors=0.25, prob=0.3),
        RandShiftIntensityd("image", offsets=0.1, prob=0.3),
    ]


def _train(network: Any, task: Task, request: dict[str, Any]) -> tuple[int, float]:
    cut = RandSpatialCropd(KEYS, task.patch)
    varied = _vary(task) if request["augment"] else []
    transform = Compose([*_load(task, *KEYS), SpatialPadd(KEYS, task.patch), cut, *varied])
    cases = CacheDataset(request["train"], transform, progress=False)
    loader = DataLoader(cases, batch_size=task.batch, shuffle=True, drop_last=True)
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    iterations, budget = 0, request["cpu_seconds"]
    network.train()
    while _used() < budget:
        for batch in loader:
            share = min(_used() / budget, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * share))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(batch["image"].as_tensor())
            loss(logits.float(), batch["label"].as_tensor()).backward()
            optimizer.step()
            iterations += 1
            if share >= 1:
                break
    return iterations, _used()


def _predict(network: Any, task: Task, request: dict[str, Any]) -> None:
    prepare = Compose(_load(task, "image"))
    inferer = SlidingWindowInferer(task.patch, overlap=0.5, mode="gaussian")
    network.eval()
    for case in request["val"]:
        image = prepare({"image": case["image"]})["image"]
        with torch.inference_mode():
            labels = inferer(image[None].as_tensor(), network).argmax(1)[0]
        mask, path = labels.numpy().astype(np.uint8), Path(request["masks"], Path(case["image"]).name)
        if task.pictures:
            Image.fromarray(mask.T).save(path)
        else:
            nibabel.save(nibabel.Nifti1Image(mask, nibabel.load(case["image"]).affine), path)


def _used() -> float:
    times = os.times()
    return times.user + times.system


if __name__ == "__main__":
    main()
