"""Numbered objects: by a flood fill in plain Python, drawn cases, order, holes, growth, files, what does not fit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from PIL import Image

from medseg.errors import CaseError, RequestError
from medseg.transforms.load import LoadCased
from medseg.transforms.objects import NumberObjectsd
from medseg.transforms.save import SaveMaskd


def drawn(*rows: str) -> torch.Tensor:
    """One channel from rows of digits; a dot is 0."""
    return torch.tensor([[0 if c == "." else int(c) for c in row] for row in rows], dtype=torch.uint8)[None]


def number(label: Any, **options: Any) -> Any:
    return NumberObjectsd("pred", **options)({"pred": label})["pred"]


def flooded(classes: np.ndarray) -> np.ndarray:
    """Components of each class, by a flood fill from each voxel that has no number yet."""
    numbers = np.zeros(classes.shape, int)
    steps = [step for step in itertools.product((-1, 0, 1), repeat=classes.ndim) if np.abs(step).sum() == 1]
    count = 0
    for value in range(1, classes.max() + 1):
        for start in np.argwhere(classes == value):
            if numbers[tuple(start)]:
                continue
            count += 1
            numbers[tuple(start)] = count
            todo = [tuple(start)]
            while todo:
                here = todo.pop()
                for step in steps:
                    there = tuple(np.add(here, step))
                    inside = all(0 <= n < size for n, size in zip(there, classes.shape, strict=True))
                    if inside and classes[there] == value and not numbers[there]:
                        numbers[there] = count
                        todo.append(there)
    return numbers


@pytest.mark.parametrize("shape", [(37, 23), (9, 11, 8)])
def test_objects_and_their_order_are_those_of_a_flood_fill(shape: tuple[int, ...]) -> None:
    classes = np.random.RandomState(0).choice([0, 0, 1, 1, 2], shape)
    found = number(torch.from_numpy(classes)[None])
    assert found.dtype == torch.int32
    assert np.array_equal(found[0].numpy(), flooded(classes))


def test_objects_that_are_too_small_are_left_out_and_the_others_close_ranks() -> None:
    label = drawn("1.11", "...1", "111.")
    assert number(label).tolist() == drawn("1.22", "...2", "333.").tolist()
    assert number(label, min_size=3).tolist() == drawn("..11", "...1", "222.").tolist()
    assert number(label, min_size=4).tolist() == drawn("....", "....", "....").tolist()


def test_a_hole_is_what_no_corner_leads_out_of() -> None:
    closed = drawn("1111", "1..1", "11.1", "1111")
    assert number(closed, fill_holes=True).tolist() == drawn("1111", "1111", "1111", "1111").tolist()
    assert number(closed).tolist() == closed.tolist()
    open_at_a_corner = drawn("111.", "1.1.", "11..", "....")
    assert number(open_at_a_corner, fill_holes=True).tolist() == open_at_a_corner.tolist()


def test_a_hole_keeps_the_objects_of_other_classes_and_takes_in_those_of_its_own() -> None:
    label = drawn("11111", "1.2.1", "11111", ".....", "22222", "2.2.2", "22222")
    expected = drawn("11111", "11211", "11111", ".....", "33333", "33333", "33333")
    assert number(label, fill_holes=True).tolist() == expected.tolist()
    island = drawn("11111", "1...1", "1.1.1", "1...1", "11111")
    assert number(island, fill_holes=True).unique().tolist() == [1]


def test_holes_in_volumes_are_closed_from_all_sides() -> None:
    cube = torch.zeros(1, 7, 7, 7)
    cube[:, 1:6, 1:6, 1:6] = 1
    cube[:, 3, 3, 3] = 0
    assert number(cube, fill_holes=True).sum() == 125
    cube[:, 3, 3, 3:] = 0
    assert number(cube, fill_holes=True).sum() == 125 - 3


def test_growth_stops_at_other_objects_and_undoes_the_gap_between_touching_ones() -> None:
    label = drawn(".....", ".1.1.", ".....")
    assert number(label, grow=1).tolist() == drawn("11222", "11222", "11222").tolist()
    assert number(drawn("1....."), grow=2).tolist() == drawn("111...").tolist()
    touching = drawn("11.1", "11.1")
    assert (number(touching, grow=1) > 0).all()


def test_what_is_switched_off_changes_nothing() -> None:
    label = drawn("1.1")
    assert number(label, enabled=False) is label
    assert NumberObjectsd("pred", allow_missing_keys=True)({"image": 1}) == {"image": 1}


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (1, 5, 1)])
def test_an_image_may_be_one_voxel_thin(shape: tuple[int, ...]) -> None:
    classes = np.random.RandomState(1).choice([0, 1, 2], shape)
    assert np.array_equal(number(torch.from_numpy(classes)[None], fill_holes=True)[0].numpy(), flooded(classes))


def test_nothing_stays_nothing() -> None:
    options = {"fill_holes": True, "min_size": 3, "grow": 2}
    assert not number(torch.zeros(1, 5, 4), **options).any()


def test_a_mask_of_more_than_255_objects_is_a_file_of_16_bits_on_the_grid_of_the_image(tmp_path: Path) -> None:
    picture = np.zeros((40, 60), np.uint8)
    picture[::2, ::2] = 200
    Image.fromarray(picture).save(tmp_path / "cells.png")
    case = LoadCased("image", spatial_dims=2)({"image": str(tmp_path / "cells.png"), "name": "cells.png"})
    assert isinstance(case["image"], MetaTensor)
    case["pred"] = (case["image"] > 100).to(torch.uint8)
    numbered = NumberObjectsd("pred")(case)
    SaveMaskd("pred", output_dir=tmp_path / "out")(numbered)
    mask = sitk.ReadImage(str(tmp_path / "out" / "cells.png"))
    assert mask.GetPixelID() == sitk.sitkUInt16
    found = sitk.GetArrayFromImage(mask)
    assert sorted(found[picture > 0]) == list(range(1, 601))
    assert not found[picture == 0].any()


@pytest.mark.parametrize("options", [{"min_size": -1}, {"grow": -1}])
def test_sizes_below_0_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="expected at least 0"):
        NumberObjectsd("pred", **options)


@pytest.mark.parametrize("shape", [(2, 5, 5), (5, 5), (1, 2, 2, 2, 2)])
def test_what_is_not_one_channel_of_labels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CaseError, match="'pred' has shape"):
        number(torch.zeros(shape))
