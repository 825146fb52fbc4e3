"""Time of reading a CT and writing its mask, compared with other libraries.

    python benchmarks/volumes.py

prints a markdown table: wall time (the best of three), processor time, and the size of what was written. The volume is
int16, 512 x 512 x 300, packed by gzip; the label map has 512 x 512 x 100 voxels in thirty overlapping balls with ragged
surfaces. That all read the same voxels is checked. Run it on an idle machine: one thread unpacks while another turns
the axes, which shows only where two cores are free.
"""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from isal import igzip

from medseg.io import load, write_mask

SHAPE = (512, 512, 300)
SLICES = 100
BALLS = 30
ROUNDS = 3


def main() -> None:
    """Measure all operations and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        scan, mask_like = Path(folder, "scan.nii.gz"), Path(folder, "short.nii.gz")
        values, labels = phantom_ct(), phantom_labels()
        save(values, scan)
        save(values[..., :SLICES], mask_like)
        if not np.array_equal(load(scan, dtype="stored")[0].numpy(), nib.load(scan).dataobj):
            raise SystemExit("the readers returned different voxels")
        print("| what | wall, s | processor, s | size, kB |\n|---|---|---|---|")
        show("inflate alone (ISA-L)", lambda: inflate(scan))
        show("medseg.io.load, stored", lambda: load(scan, dtype="stored"))
        show("medseg.io.load, float32", lambda: load(scan))
        show("nibabel, float32", lambda: nib.load(scan).get_fdata(dtype=np.float32))
        show("SimpleITK", lambda: sitk.ReadImage(str(scan)))
        packed = labels.tobytes(order="F")
        show("deflate alone (zlib, level 4)", lambda: len(gzip.compress(packed, 4, mtime=0)))
        for level in range(4):
            show(f"deflate alone (ISA-L, level {level})", lambda level=level: len(igzip.compress(packed, level)))
        show("medseg.io.write_mask", lambda: write(labels, mask_like))


def phantom_ct() -> np.ndarray[Any, np.dtype[np.int16]]:
    """Return soft gradients with the noise of a CT, x fastest."""
    random = np.random.default_rng(0)
    ramps = np.add.outer(np.add.outer(np.arange(SHAPE[2]), np.arange(SHAPE[1])), np.arange(SHAPE[0])) % 400
    return (ramps + random.normal(0, 15, ramps.shape).astype(np.float32)).astype(np.int16).T


def phantom_labels() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return overlapping balls, numbered from 1."""
    random = np.random.default_rng(0)
    labels = np.zeros((*SHAPE[:2], SLICES), np.uint8)
    x, y, z = np.ogrid[: SHAPE[0], : SHAPE[1], :SLICES]
    for value in range(1, BALLS + 1):
        center, radius = random.uniform((60, 60, 0), (450, 450, SLICES)), random.uniform(10, 60)
        ragged = random.uniform(0.97, 1.03, labels.shape).astype(np.float32)
        away = (x - center[0]) ** 2 + (y - center[1]) ** 2 + (3 * (z - center[2])) ** 2
        labels[away * ragged < radius**2] = value
    return labels


def save(values: np.ndarray[Any, Any], path: Path) -> None:
    """Write a NIfTI file without scale factors."""
    nib.save(nib.Nifti1Image(values, np.diag([-0.8, -0.8, 1, 1])), path)


def inflate(path: Path) -> None:
    """Decompress a file and discard the result."""
    buffer = bytearray(1 << 23)
    with igzip.open(path, "rb") as file:
        while file.readinto(buffer):
            pass


def write(labels: np.ndarray[Any, Any], like: Path) -> int:
    """Write a mask and return its size."""
    write_mask(labels, like.with_name("mask.nii.gz"), like=like)
    return like.with_name("mask.nii.gz").stat().st_size


def show(name: str, work: Callable[[], Any]) -> None:
    """Print the row of one operation; a returned number is a file size in bytes."""
    walls, processor = [], []
    for _ in range(ROUNDS):
        wall, spent = time.perf_counter(), time.process_time()
        result = work()
        walls.append(time.perf_counter() - wall)
        processor.append(time.process_time() - spent)
    size = f"{result / 1e3:.0f}" if isinstance(result, int) else ""
    print(f"| {name} | {min(walls):.2f} | {min(processor):.2f} | {size} |", flush=True)


if __name__ == "__main__":
    main()
