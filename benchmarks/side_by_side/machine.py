"""Description and measured rates of the machine.

    python -m side_by_side.machine REQUEST.json ANSWER.json

measures, on the threads and with the allocator of the samples, the rate of one large dense convolution in float32 (the
most this machine gives to such work) and that of the network on its window. FLOP are counted by torch's
`FlopCounterMode`: two for each multiplication with addition of convolutions and matrix products, nothing else.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from side_by_side.settings import ROOT

PACKAGES = ("torch", "monai", "numpy", "nibabel", "itk")


def rates(request: dict[str, Any]) -> dict[str, Any]:
    """Return the rates, and the work of one window and of the whole image."""
    import torch
    from torch import nn

    from medseg.bundle.catalog import find_bundle
    from side_by_side.bundles import network_of

    torch.set_num_threads(request["threads"])
    settings = request["settings"]
    dims = settings["network_def"]["spatial_dims"]
    side = {2: 512, 3: 64}[dims]
    convolution = (nn.Conv2d, nn.Conv3d)[dims - 2](64, 64, 3, padding=1)
    dense = _rate(convolution, torch.rand(1, 64, *[side] * dims), repeats=9)
    window = torch.rand(settings["sw_batch_size"], settings["network_def"]["in_channels"], *settings["roi_size"])
    network = _rate(network_of(find_bundle(request["bundle"])), window, repeats=5)
    shape, zooms = _grid(request["image"])
    count = windows(shape, zooms, settings)
    return {
        "shape": shape,
        "zooms": zooms,
        "dense_gflop_per_s": dense["gflop"] / dense["seconds"],
        "network_gflop_per_s": network["gflop"] / network["seconds"],
        "network_share": network["gflop"] / network["seconds"] * dense["seconds"] / dense["gflop"],
        "window_gflop": network["gflop"] / len(window),
        "window_seconds": network["seconds"] / len(window),
        "windows": count,
        "image_gflop": network["gflop"] / len(window) * count,
    }


def _rate(network: Any, image: Any, *, repeats: int) -> dict[str, float]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            network(image)
        seconds = [_seconds(lambda: network(image)) for _ in range(repeats)]
    return {"gflop": counter.get_total_flops() / 1e9, "seconds": statistics.median(seconds)}


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _grid(image: str) -> tuple[list[int], list[float]]:
    if image.endswith(".png"):
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None
        return list(Image.open(image).size), [1.0, 1.0]
    import nibabel

    header = nibabel.load(image).header
    return list(header.get_data_shape()), [round(float(step), 4) for step in header.get_zooms()[:3]]


def windows(shape: list[int], zooms: list[float], settings: dict[str, Any]) -> int:
    """Return the number of MONAI's sliding windows for the resampled image."""
    import numpy as np
    from monai.data.utils import compute_shape_offset

    size = np.array(shape)
    if "spacing" in settings:
        old, new = (np.diag([*steps, 1.0]) for steps in (zooms, settings["spacing"]))
        size = compute_shape_offset(shape, old, new)[0]
    counts = []
    for extent, roi in zip(size, settings["roi_size"], strict=True):
        step = max(int(roi * (1 - settings["overlap"])), 1)
        counts.append(1 if extent <= roi else math.ceil((int(extent) - roi) / step) + 1)
    return math.prod(counts)


def describe(python: str = "") -> dict[str, Any]:
    """Return the machine, its current load, the commit and package versions, including nnU-Net's if installed."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    pages = "".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": names[0] if names else None,
            "cores": os.cpu_count(),
            "memory_gib": round(int(memory) / 2**20, 1),
            "huge_pages": pages,
            "load_before": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **_versions(), **_nnunet_version(python)},
        **commit(),
    }


def commit() -> dict[str, Any]:
    """Return the commit of the source tree, and whether the package has uncommitted changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
        return done.stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "package_changed": bool(git("status", "--porcelain", "--", "medseg"))}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _nnunet_version(python: str) -> dict[str, str]:
    if not Path(python).is_file():
        return {}
    code = "from importlib.metadata import version; print(version('nnunetv2'), version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    own, torch = done.stdout.split()
    return {"nnunetv2": own, "torch of nnunetv2": torch}


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(rates(asked)), encoding="utf-8")
