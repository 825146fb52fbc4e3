"""Small data sets of every kind that a plan may meet, and a probe that costs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medseg.planning.probe import Measurement


def _save_volume(path: Path, array: Any, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), affine: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, np.diag([*spacing, 1.0]) if affine is None else affine)
    image.header["qform_code"] = 0
    image.header["sform_code"] = 1
    nibabel.save(image, path)


@pytest.fixture
def save_volume() -> Callable[..., None]:
    """Return a function that writes one NIfTI file: path, array, spacing or affine."""
    return _save_volume


def ball(shape: tuple[int, ...], center: tuple[float, ...], radius: float) -> Any:
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True)) < radius**2


@pytest.fixture
def volumes(tmp_path: Path):
    """Return a function that writes volumes in the layout of the Decathlon."""

    def write(
        *,
        shapes: tuple[tuple[int, int, int], ...] = ((34, 50, 36), (36, 48, 35), (35, 52, 38), (33, 50, 36)),
        spacings: tuple[tuple[float, float, float], ...] = ((1.0, 1.0, 1.0),),
        low: float = 0.0,
        high: float = 400.0,
        classes: int = 2,
        channels: int = 1,
        listing: Mapping[str, Any] | None = None,
        dtype: Any = np.int16,
        name: str = "volumes",
    ) -> Path:
        root = tmp_path / name
        entries = []
        for number, shape in enumerate(shapes):
            rng = np.random.default_rng(number)
            label = np.zeros(shape, np.uint8)
            for value in range(1, classes + 1):
                center = tuple(n * (0.2 + 0.6 * value / (classes + 1)) for n in shape)
                label[ball(shape, center, 0.15 * min(shape) + 1)] = value
            body = low + (high - low) * (0.3 + 0.2 * label / classes) + rng.normal(0, (high - low) / 50, shape)
            body.flat[0], body.flat[1] = low, high
            image = body if channels == 1 else np.stack([body] * channels, -1)
            pair = {"image": f"imagesTr/case_{number}.nii.gz", "label": f"labelsTr/case_{number}.nii.gz"}
            spacing = spacings[number % len(spacings)]
            _save_volume(root / pair["image"], image.astype(dtype), spacing)
            _save_volume(root / pair["label"], label, spacing)
            entries.append(pair)
        content = {"training": entries[:-1], "validation": entries[-1:], **(listing or {})}
        (root / "dataset.json").write_text(json.dumps(content))
        return root

    return write


@pytest.fixture
def pictures(tmp_path: Path):
    """Return a function that writes pictures with `images/`, `labels/` and a split."""

    def write(
        *,
        sizes: tuple[tuple[int, int], ...] = ((96, 80), (80, 96), (96, 96), (96, 80), (80, 80), (96, 80)),
        colored: tuple[bool, ...] = (True,),
        tops: tuple[int, ...] = (250,),
        labels: str = "objects",
        name: str = "pictures",
    ) -> Path:
        root = tmp_path / name
        stems = []
        for number, size in enumerate(sizes):
            rng = np.random.default_rng(number)
            marks = np.zeros(size, np.uint16)
            for value in range(1, 4 + 2 * number):
                place = (8 + 14 * (value % 6), 8 + 14 * (value // 6))
                marks[ball(size, place, 5)] = value
            top = tops[number % len(tops)]
            grey = np.where(marks > 0, 0.9, 0.4) * top + rng.normal(0, 0.02 * top, size)
            color = np.stack([grey, 0.5 * grey, 0.8 * grey], -1) if colored[number % len(colored)] else grey
            label = {"objects": marks, "two": 255 * (marks > 0), "classes": 1 + (marks > 0) * (1 + marks % 2)}[labels]
            for folder, array in (("images", color.clip(0, 255).astype(np.uint8)), ("labels", label.astype(np.uint16))):
                file = root / folder / f"p{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ascontiguousarray(array.swapaxes(0, 1))).save(file)
            stems.append(f"p{number}")
        (root / "split.json").write_text(json.dumps({"train": stems[:-1], "val": stems[-1:]}))
        return root

    return write


@pytest.fixture
def fake_probe():
    """Return a function that makes a probe: the seconds given, or those of a network of width 16; nothing is run."""

    def make(
        seconds: float = 0.3, *, half: float = 0.5, bytes_per_step: int = 100 << 20, by_width: bool = False
    ) -> Callable[..., Measurement]:
        def probe(config: Mapping[str, Any]) -> Measurement:
            probe.configs.append(config)  # type: ignore[attr-defined]
            step = seconds * (config["network_def"]["features"][0] / 16) ** 2 if by_width else seconds
            steps = {"float32": step, "bfloat16": step * half}
            return Measurement("cpu", 2, steps, 0.01, 0.1, 0.05, bytes_per_step, 700 << 20)

        probe.configs = []  # type: ignore[attr-defined]
        return probe

    return make
