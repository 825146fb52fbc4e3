"""Amounts of memory: reading, showing, and what fits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from medseg.errors import CaseError, RequestError
from medseg.inferers.window_runner import fitting_batch
from medseg.machine import parse_memory, shown_bytes

MEBI = 1 << 20


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("2G", 2 << 30), ("1500M", 1500 * MEBI), ("1.5 GiB", 3 << 29), ("4096", 4096), ("10kb", 10240), (7, 7)],
)
def test_amounts_are_read(text, count) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["much", "-1G", "2X", "0", "G", "1 000M"])
def test_other_texts_are_refused(text) -> None:
    with pytest.raises(RequestError, match="write for instance 2G"):
        parse_memory(text)


def test_the_batch_fills_what_is_left() -> None:
    parts = {"held": 500 * MEBI, "slab": 100 * MEBI, "result": 50 * MEBI, "window": 100 * MEBI}
    assert fitting_batch(1000 * MEBI, 8, **parts) == 3
    assert fitting_batch(1000 * MEBI, 2, **parts) == 2
    with pytest.raises(CaseError, match=r"needs 750 MiB, the limit is 700 MiB \(500 MiB for programs"):
        fitting_batch(700 * MEBI, 8, **parts)


def test_large_amounts_are_shown_in_gibibytes() -> None:
    assert shown_bytes(1 << 31) == "2.00 GiB"
    assert shown_bytes(10 * MEBI) == "10 MiB"


# One image, many classes, a native grid eight times finer than the model's: complete scores would take gigabytes.
LIMITED = """
import resource, sys
import numpy as np, torch
from monai.data import MetaTensor
from medseg.inferers import NativeInferer, SlidingWindowInferer
from medseg.machine import resident_bytes

kind, classes = sys.argv[1], 14
native, model, roi = (256, 256, 200), (128, 128, 100), (32, 32, 32)
torch.set_num_threads(1)
weights = torch.randn(classes, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0))
def network(x):
    return torch.nn.functional.conv3d(x, weights, padding=1)
def image(shape, fine):
    coarse = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    values = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    return MetaTensor(values, affine=affine, meta={"original_affine": np.eye(4), "spatial_shape": np.array(fine)})
inferer = SlidingWindowInferer(roi, 2, 0.5, "gaussian", output="labels" if kind == "stream" else "logits")
with torch.no_grad():
    inferer(image((40, 40, 40), (80, 80, 80)), network)  # what libraries load on first use
    given = image(model, native)
    slab = (classes + 1) * roi[0] * model[1] * model[2] * 4
    result = native[0] * native[1] * native[2]
    window = 2 * classes * roi[0] ** 3 * 4
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    allowed = 2 * slab + result + 4 * window + (96 << 20)
    assert allowed < classes * result * 4 / 2
    resource.setrlimit(resource.RLIMIT_AS, (mapped + allowed, mapped + allowed))
    try:
        found = inferer(given, network)
        if kind == "all":
            scores = torch.nn.functional.interpolate(found.as_tensor().softmax(1), native, mode="trilinear")
            found = scores.argmax(1, keepdim=True)
    except (RuntimeError, MemoryError) as error:
        print("no memory")
        sys.exit()
print("done", tuple(found.shape[2:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize(("kind", "printed"), [("stream", "done (256, 256, 200)"), ("all", "no memory")])
def test_fourteen_classes_need_a_slab_and_not_the_volume(kind: str, printed: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, kind], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.stdout.splitlines()[-1:] == [printed], ran.stderr[-2000:]
