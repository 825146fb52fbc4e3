"""Elastic deformation: the reference field, the same field for all keys, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from torch.nn import functional as F

from medseg.errors import CaseError, RequestError
from medseg.transforms import elastic as module
from medseg.transforms.elastic import RandElasticd, dense_field

GOLDEN = Path(__file__).parents[1] / "golden" / "unet_metrics.npz"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def resampled(image: torch.Tensor, field: torch.Tensor) -> np.ndarray:
    """Warp one channel by SimpleITK, after mirroring the image by hand."""
    wide = np.pad(image.numpy(), 40, mode="reflect")
    source = sitk.GetImageFromArray(wide)
    source.SetOrigin([-40.0] * image.ndim)
    vectors = np.moveaxis(field.double().numpy()[::-1], 0, -1)
    displacement = sitk.GetImageFromArray(np.ascontiguousarray(vectors), isVector=True)
    reference = sitk.GetImageFromArray(image.numpy())
    transform = sitk.DisplacementFieldTransform(displacement)
    return sitk.GetArrayFromImage(sitk.Resample(source, reference, transform, sitk.sitkLinear, -9.0))


def test_the_reference_field_is_reproduced():
    with np.load(GOLDEN) as file:
        control, field = file["elastic_control"], file["elastic_field"]
    found = dense_field(torch.from_numpy(control), field.shape[1:])
    np.testing.assert_allclose(found.numpy(), field, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("grid", "size"), [((3, 3), (17, 30)), ((5, 4), (40, 9)), ((2, 6), (2, 6)), ((3, 3), (1, 5))])
def test_the_field_in_2d_is_bicubic_with_aligned_corners(grid, size):
    control = torch.randn(2, *grid, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(control[None], size, mode="bicubic", align_corners=True)[0]
    torch.testing.assert_close(dense_field(control, size), expected, atol=1e-5, rtol=1e-5)


def test_the_field_in_3d_is_the_same_kernel_along_each_axis_in_turn():
    control = torch.randn(3, 3, 4, 3, generator=torch.Generator().manual_seed(0))
    planes = F.interpolate(control.flatten(0, 1)[None], (9, 11), mode="bicubic", align_corners=True)[0]
    lines = planes.view(3, 3, 99)
    expected = F.interpolate(lines[None], (8, 99), mode="bicubic", align_corners=True)[0].view(3, 8, 9, 11)
    torch.testing.assert_close(dense_field(control, (8, 9, 11)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense_field(control, (8, 9, 11), first=3, count=2), expected[:, 3:5])


def test_nodes_keep_their_displacements():
    control = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dense_field(control, (41, 61))[:, ::20, ::30], control)


@pytest.mark.parametrize("shape", [(33, 47), (20, 24, 17)])
def test_the_warp_is_that_of_simpleitk(shape, monkeypatch):
    # Several blocks, so that their seams are looked at too.
    monkeypatch.setattr(module, "_BLOCK", 700)
    image, label = noise(2, *shape), (noise(1, *shape, seed=1) * 5).int()
    warp = RandElasticd(["image", "label"], sigma=4.0).set_random_state(3)
    case = warp({"image": image, "label": label})
    field = dense_field(warp.control, shape)
    assert field.abs().max() > 4
    for channel in range(2):
        np.testing.assert_allclose(case["image"][channel].numpy(), resampled(image[channel], field), atol=2e-5)
    places = field + torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"))
    folded = [(n - 1) - (x.remainder(2 * (n - 1)) - (n - 1)).abs() for x, n in zip(places, shape, strict=True)]
    nearest = label[0][tuple(x.round().long() for x in folded)]
    assert case["label"].dtype == torch.int32
    # A place halfway between two voxels may go either way.
    assert (case["label"][0] != nearest).float().mean() < 1e-3


def test_images_and_labels_move_together_and_displacements_follow_the_given_deviation():
    label = torch.zeros(1, 60, 60, dtype=torch.uint8)
    label[:, 20:40, 15:45] = 1
    warp = RandElasticd(["image", "label"], sigma=(6.0, 0.0)).set_random_state(0)
    case = warp({"image": label.float(), "label": label})
    assert ((case["image"] > 0.5) != case["label"].bool()).float().mean() < 0.01
    assert not torch.equal(case["label"], label)
    assert warp.control[1].abs().max() == 0
    drawn = np.stack([(warp.randomize(2), warp.control[0].numpy())[1] for _ in range(300)])
    assert abs(drawn.std() - 6) < 0.3
    assert abs(drawn.mean()) < 0.4


def test_a_seed_repeats_the_draws_and_the_probability_is_kept():
    image = noise(1, 12, 12)
    warp = RandElasticd("image", prob=0.5)
    runs = [[warp({"image": image})["image"] for _ in range(40)] for _ in range(2) if warp.set_random_state(7)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    unchanged = sum(torch.equal(found, image) for found in runs[0])
    assert 10 < unchanged < 30


def test_metadata_stay_and_the_input_does_not_change():
    image = MetaTensor(noise(1, 8, 9, 7), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])))
    before = image.as_tensor().clone()
    case = RandElasticd("image").set_random_state(0)({"image": image, "name": "a"})
    assert torch.equal(case["image"].affine, image.affine)
    assert torch.equal(image.as_tensor(), before)
    assert case["name"] == "a"
    whole = (before * 100).short()
    assert RandElasticd("image", prob=0)({"image": whole})["image"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 1}, "grid"),
        ({"sigma": -1.0}, "sigma"),
        ({"grid": (3, 3, 3)}, "axes"),
        ({"sigma": (1.0, 2, 3)}, "axes"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        RandElasticd("image", **options)({"image": noise(1, 8, 8)})


def test_entries_of_different_shape_are_refused():
    with pytest.raises(CaseError, match=r"'label' \(8, 9\)"):
        RandElasticd(["image", "label"])({"image": noise(1, 8, 8), "label": noise(1, 8, 9)})


def test_missing_keys_are_allowed_only_if_asked_for():
    assert RandElasticd("label", allow_missing_keys=True)({"x": 1}) == {"x": 1}
    with pytest.raises(KeyError, match="label"):
        RandElasticd("label")({"x": 1})
