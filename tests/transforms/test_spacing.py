"""Resampling axis by axis, against MONAI's in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd

from medseg.errors import GeometryError
from medseg.transforms.spacing import SeparableSpacingd


def _image(dtype, shape=(30, 26, 22), channels: int = 2, order: str = "F") -> MetaTensor:
    values = (np.random.default_rng(0).normal(size=(channels, *shape)) * 500).astype(dtype)
    affine = np.array([[0.8, 0.02, 0, 3], [-0.02, 0.8, 0, 4], [0, 0, 1.5, 5], [0, 0, 0, 1.0]])
    array = np.ascontiguousarray(values) if order == "C" else values.transpose(3, 2, 1, 0).copy().transpose(3, 2, 1, 0)
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
@pytest.mark.parametrize("pixdim", [(1.5, 1.5, 2.0), (0.5, 0.8, 3.0), (1.0, 0.3, 1.5)])
def test_values_place_and_size_are_those_of_monai_in_float64(pixdim, dtype, order) -> None:
    image = _image(dtype, order=order)
    expected = Spacingd("i", pixdim, mode="bilinear", padding_mode="border", dtype=np.float64)({"i": image})["i"]
    found = SeparableSpacingd("i", pixdim)({"i": image})["i"]
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert torch.equal(found.affine, expected.affine)
    assert float((found - expected).abs().max()) < 1e-6 * 2000


def test_it_is_inverted_like_monai() -> None:
    image = _image(np.float32)
    ours, monai = SeparableSpacingd("i", (1.5, 1.5, 2.0)), Spacingd("i", (1.5, 1.5, 2.0), padding_mode="border")
    back = ours.inverse(ours({"i": image}))["i"]
    expected = monai.inverse(monai({"i": image}))["i"]
    assert back.shape == image.shape
    assert torch.allclose(back.affine, image.affine)
    # MONAI inverts in the type of the way there, which is float32 here: positions are rounded to 1e-5 voxels
    assert float((back - expected).abs().max()) < 1e-4 * 2000


@pytest.mark.parametrize(("pixdim", "diagonal"), [((0.8, 0.8, 1.5), False), ((1.0, 1.0, 1.0), True)])
def test_what_it_does_not_take_apart_is_left_to_monai(pixdim, diagonal) -> None:
    image = _image(np.float32)
    expected = Spacingd("i", pixdim, diagonal, mode="bilinear", padding_mode="border", dtype=np.float32)({"i": image})
    assert torch.equal(SeparableSpacingd("i", pixdim, diagonal)({"i": image})["i"], expected["i"])


def test_pictures_are_resampled_in_two_dimensions() -> None:
    image = MetaTensor(torch.rand(3, 30, 20), affine=torch.eye(4, dtype=torch.float64))
    expected = Spacingd("i", (0.7, 1.6), mode="bilinear", padding_mode="border", dtype=np.float64)({"i": image})["i"]
    assert torch.allclose(SeparableSpacingd("i", (0.7, 1.6))({"i": image})["i"], expected, atol=1e-6)


def test_an_image_that_no_memory_would_hold_is_refused_with_the_way_out() -> None:
    image = MetaTensor(torch.rand(1, 10, 10, 10), affine=torch.diag(torch.tensor([900.0, 900, 900, 1])).double())
    image.meta["filename_or_obj"] = "scan.nii"
    with pytest.raises(GeometryError, match=r"scan.nii has 10x10x10 voxels and would have 8101x8101x8101 after"):
        SeparableSpacingd("i", 1.0)({"i": image})
