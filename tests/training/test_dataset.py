"""Samples that depend on seed, pass and case alone; what is kept in memory and on disk; errors that name the case."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    Lambdad,
    MapTransform,
    RandCoarseDropoutd,
    RandFlipd,
    RandGaussianNoised,
    Randomizable,
    RandSpatialCropd,
    RandSpatialCropSamplesd,
    Transform,
)

from medseg.errors import CaseError, GeometryError, OutputError, RequestError
from medseg.notices import collect, warn
from medseg.training.cache import DiskCache, memory_bound, size_of, strip_metadata
from medseg.training.dataset import SeededDataset

CASES = [{"image": f"/somewhere/{name}.nii.gz", "name": f"{name}.nii.gz"} for name in "abcdef"]
SIZE = 8 * 8 * 4


class Load(Transform):
    """Makes an image of the letter in a name, and counts how often."""

    def __init__(self) -> None:
        self.loads: list[str] = []

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        self.loads.append(case["name"])
        value = float(ord(case["name"][0]))
        image = MetaTensor(torch.full((1, 8, 8), value), affine=torch.eye(4) * 2, meta={"long": "header"})
        return {**case, "image": image}

    def __getstate__(self) -> dict[str, Any]:
        return {}


class GlobalNoise(Randomizable, MapTransform):
    """Draws from the global generators, as a transform should not."""

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        drawn = float(torch.rand(())) + float(np.random.rand())
        return {**case, "image": case["image"] + drawn}


def _dataset(*steps: Any, **options: Any) -> tuple[SeededDataset, Load]:
    load = Load()
    steps = steps or (RandGaussianNoised("image", prob=1.0), RandFlipd("image", prob=0.5), GlobalNoise("image"))
    return SeededDataset(CASES, Compose([load, *steps]), **{"seed": 1, **options}), load


def _same(a: Any, b: Any) -> bool:
    return torch.equal(torch.as_tensor(a["image"]), torch.as_tensor(b["image"]))


def test_a_sample_does_not_depend_on_what_was_made_before() -> None:
    dataset, _ = _dataset()
    first = dataset[3, 2]
    for key in [(0, 1), (3, 3), (2, 2)]:
        assert not _same(dataset[key], first)
    torch.rand(5)
    assert _same(dataset[3, 2], first)
    other, _ = _dataset()
    assert _same(other[3, 2], first)
    assert not _same(_dataset(seed=2)[0][3, 2], first)


def test_samples_leave_the_global_generators_alone() -> None:
    dataset, _ = _dataset()
    torch.manual_seed(1)
    expected = float(torch.rand(()))
    torch.manual_seed(1)
    dataset[0, 0]
    assert float(torch.rand(())) == expected


@pytest.mark.parametrize("room", ["0", str(SIZE * 3 + 10), "auto"])
@pytest.mark.parametrize("disk", [False, True])
def test_samples_are_the_same_wherever_the_cases_are_kept(room: str, disk: bool, tmp_path: Path) -> None:
    options = {"cache_memory": room, "disk_cache": disk, "cache_dir": str(tmp_path / "cache")}
    reference, _ = _dataset()
    for _ in range(2):  # the second time from the disk
        dataset, _ = _dataset(**options)
        for index in range(len(CASES)):
            assert _same(dataset[1, index], reference[1, index])
            assert torch.equal(dataset[1, index]["image"].affine, reference[1, index]["image"].affine)


@pytest.mark.parametrize(("room", "kept"), [("0", 0), (str(SIZE * 3 + 10), 3), (str(SIZE), 1), ("auto", 6), ("1G", 6)])
def test_as_many_cases_are_kept_as_fit(room: str, kept: int) -> None:
    dataset, load = _dataset(cache_memory=room)
    assert dataset.kept == kept
    load.loads.clear()
    for epoch in (0, 1):
        for index in range(len(CASES)):
            dataset[epoch, index]
    assert sorted(load.loads) == sorted(2 * [case["name"] for case in CASES[kept:]])


def test_prepared_cases_hold_nothing_but_voxels_and_their_place() -> None:
    case = strip_metadata(
        {"image": MetaTensor(torch.zeros(1, 4, 4).permute(0, 2, 1), meta={"long": "header"}), "name": "a"}
    )
    assert case["image"].is_contiguous()
    assert "long" not in case["image"].meta
    assert case["name"] == "a"
    assert size_of({**case, "places": [torch.zeros(3, dtype=torch.int64)]}) == 4 * 16 + 8 * 3


@pytest.mark.parametrize("first", [RandSpatialCropd("image", (4, 4)), RandFlipd("image", prob=0.0)])
def test_transforms_that_write_in_place_do_not_change_the_kept_case(first: Any) -> None:
    dropout = RandCoarseDropoutd("image", holes=2, spatial_size=2, fill_value=0, prob=1.0)
    dataset, _ = _dataset(first, dropout)
    for epoch in range(3):
        assert float(torch.as_tensor(dataset[epoch, 0]["image"]).min()) == 0
    assert all(float(torch.as_tensor(case["image"]).min()) > 90 for case in dataset._kept)


def test_several_patches_of_a_case_are_several_samples() -> None:
    dataset, _ = _dataset(
        RandSpatialCropSamplesd("image", (4, 4), num_samples=3), RandGaussianNoised("image", prob=1.0)
    )
    samples = dataset[0, 1]
    assert len(samples) == 3
    assert not _same(samples[0], samples[1])
    assert _same(samples[2], dataset[0, 1][2])


def test_a_dataset_without_random_transforms_gives_its_cases() -> None:
    dataset, _ = _dataset(Lambdad("image", lambda image: image + 1))
    assert float(torch.as_tensor(dataset[0, 0]["image"]).max()) == ord("a") + 1


def test_prepared_cases_on_disk_are_used_again_until_something_changes(tmp_path: Path) -> None:
    cases = []
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"x")
        cases.append({"image": str(tmp_path / f"{name}.png"), "name": name})
    options = {"cache_memory": "0", "disk_cache": True, "cache_dir": str(tmp_path / "cache")}

    def loads(load: Load, *steps: Any) -> list[str]:
        dataset = SeededDataset(cases, Compose([load, *steps, RandFlipd("image", prob=0.5)]), **options)
        _ = dataset[0, 0], dataset[0, 1]
        return load.loads

    assert loads(Load()) == ["a", "b"]
    assert loads(Load()) == []
    assert loads(Load(), Identity()) == ["a", "b"]
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert loads(Load()) == ["a"]
    kept = sorted((tmp_path / "cache").iterdir())
    for path in kept:
        path.write_bytes(path.read_bytes()[:50])
    assert loads(Load()) == ["a", "b"]
    assert loads(Load()) == []


class Warns(Transform):
    """Warns of a case and of the run."""

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        warn(logging.getLogger("medseg.test"), "identity-affine", "warned of", case["name"])
        return case


@pytest.mark.parametrize("options", [{"cache_memory": "1G"}, {"cache_memory": "0", "disk_cache": True}], ids=str)
def test_what_preparing_a_case_warned_of_is_said_again_when_it_comes_from_the_cache(
    options: dict[str, Any], tmp_path: Path
) -> None:
    steps = Compose([Load(), Warns(), RandFlipd("image", prob=0.5)])
    for _ in range(2):
        with collect() as found:
            dataset = SeededDataset(CASES, steps, cache_dir=str(tmp_path / "cache"), **options)
            for index in range(len(CASES)):
                sample = dataset[0, index]
                assert set(sample) == {"image", "name"}
        assert sorted(warning.file for warning in found) == [f"{name}.nii.gz" for name in "abcdef"]


def test_a_damaged_cache_and_a_full_disk_are_warnings_about_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_warns: Any
) -> None:
    cache = DiskCache(tmp_path, [])

    def load_damaged() -> None:
        cache.save(CASES[0], {"image": torch.zeros(1000)})
        (kept,) = tmp_path.glob("*.pt")
        kept.write_bytes(kept.read_bytes()[:50])
        assert cache.load(CASES[0]) is None

    assert_warns(load_damaged, "cache-damaged", run=True)
    monkeypatch.setattr("medseg.training.cache.replacing", _full_disk)
    assert_warns(lambda: cache.save(CASES[0], {"image": torch.zeros(1)}), "cache-not-written", run=True)


def _full_disk(path: Path) -> None:
    raise OutputError("no space left")


class Identity(Transform):
    def __call__(self, case: Any) -> Any:
        return case


class Fails(Transform):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        if case["name"].startswith("c"):
            raise self.error
        return case


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GeometryError("c.nii.gz is nowhere"), "c.nii.gz is nowhere"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (MemoryError("no room"), "lower num_workers, cache_memory or patch_size"),
    ],
)
@pytest.mark.parametrize("kept", ["0", "auto"])
def test_an_error_names_the_case_and_the_cause(error: Exception, said: str, kept: str) -> None:
    def make() -> None:
        dataset = SeededDataset(CASES, Compose([Load(), Fails(error), RandFlipd("image")]), cache_memory=kept)
        dataset[0, 2]

    with pytest.raises(CaseError, match=r"training case 'c\.nii\.gz'") as caught:
        make()
    assert said in str(caught.value)


def test_a_batch_carries_its_error_as_a_sample() -> None:
    dataset = SeededDataset(CASES, Compose([Load(), Fails(ValueError("odd")), RandFlipd("image")]), cache_memory="0")
    (error,) = dataset.__getitems__([(0, 0), (0, 2)])
    assert isinstance(pickle.loads(pickle.dumps(error)), CaseError)


def test_fingerprints_tell_lists_of_cases_apart() -> None:
    dataset, _ = _dataset()
    again, _ = _dataset(seed=3)
    fewer = SeededDataset(CASES[:-1], Compose([Load()]))
    assert dataset.fingerprint() == again.fingerprint() != fewer.fingerprint()


def test_amounts_of_memory() -> None:
    assert memory_bound("0") == 0
    assert memory_bound("2G") == 2 << 30
    assert memory_bound("auto") > 0
    with pytest.raises(RequestError, match="invalid amount of memory"):
        memory_bound("much")
