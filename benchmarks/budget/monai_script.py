"""What many write first: MONAI's BasicUNet, its transforms, AdamW with a cosine, bfloat16.

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
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)
from monai.utils import set_determinism

PATCH = (40, 56, 40)
BATCH, RATE, DECAY = 2, 1e-3, 1e-2
KEYS = ["image", "label"]


def main() -> None:
    """Train, predict, and write down what it took."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    set_determinism(request["seed"])
    network = BasicUNet(spatial_dims=3, in_channels=1, out_channels=request["classes"])
    iterations, used = _train(network, request)
    _predict(network, request)
    facts = {"iterations": iterations, "batch_size": BATCH, "cpu_s": used, "precision": "bfloat16"}
    Path(request["facts"]).write_text(json.dumps(facts), encoding="utf-8")


def _train(network: Any, request: dict[str, Any]) -> tuple[int, float]:
    load = [
        LoadImaged(KEYS),
        EnsureChannelFirstd(KEYS),
        NormalizeIntensityd("image"),
        SpatialPadd(KEYS, PATCH),
    ]
    vary = [
        RandAffined(
            KEYS,
            prob=0.5,
            rotate_range=[0.26] * 3,
            scale_range=[0.2] * 3,
            spatial_size=PATCH,
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        RandGaussianNoised("image", prob=0.2, std=0.1),
        RandScaleIntensityd("image", factors=0.25, prob=0.3),
        RandShiftIntensityd("image", offsets=0.1, prob=0.3),
    ]
    cases = CacheDataset(request["train"], Compose([*load, *vary]), progress=False)
    loader = DataLoader(cases, batch_size=BATCH, shuffle=True, drop_last=True)
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


def _predict(network: Any, request: dict[str, Any]) -> None:
    prepare = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), NormalizeIntensityd("image")])
    inferer = SlidingWindowInferer(PATCH, overlap=0.5, mode="gaussian")
    network.eval()
    for case in request["val"]:
        image = prepare({"image": case["image"]})["image"]
        with torch.inference_mode():
            labels = inferer(image[None].as_tensor(), network).argmax(1)[0]
        mask = nibabel.Nifti1Image(labels.numpy().astype(np.uint8), nibabel.load(case["image"]).affine)
        nibabel.save(mask, Path(request["masks"], Path(case["image"]).name))


def _used() -> float:
    times = os.times()
    return times.user + times.system


if __name__ == "__main__":
    main()
