"""Warped patches: against MONAI, SimpleITK and world positions; where they lie; plain crops; what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Affine, Compose, RandScaleIntensityd, SpatialPad

from medseg.errors import CaseError, RequestError
from medseg.transforms.class_indices import ClassIndicesd
from medseg.transforms.elastic import dense_field
from medseg.transforms.warp import RandWarpd

# Every part at once, for 2D and 3D.
EVERYTHING: dict[str, Any] = {
    "flip_prob": 0.5,
    "rotate_range": 0.6,
    "zoom_range": (0.7, 1.5),
    "zoom_per_axis": True,
    "elastic_sigma": 2.0,
}
SHAPES = {2: (43, 52), 3: (30, 37, 24)}
PATCHES = {2: (24, 31), 3: (14, 17, 12)}
# Voxels that images are padded by for SimpleITK, more than any warp here reaches beyond them.
MARGIN = 40


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(shape: Sequence[int]) -> torch.Tensor:
    """One channel without jumps, so that nearest and linear can be compared."""
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij")
    return sum(torch.sin(x / (4 + i)) for i, x in enumerate(axes))[None]


def oblique(dims: int, *, mirrored: bool) -> torch.Tensor:
    """An affine with unequal voxels, turned in space, of either handedness."""
    turn = np.linalg.qr(np.random.RandomState(5).normal(size=(3, 3)))[0]
    turn[:, 0] *= -np.sign(np.linalg.det(turn)) if mirrored else np.sign(np.linalg.det(turn))
    affine = np.eye(4)
    affine[:3, :3] = turn * [0.5, 1.3, 3.0]
    affine[:3, 3] = [10, -20, 5]
    return torch.from_numpy(affine)


def world(shape: Sequence[int], affine: torch.Tensor) -> MetaTensor:
    """An image whose three channels are the world position of each voxel."""
    axes = torch.meshgrid(*[torch.arange(float(n), dtype=torch.float64) for n in shape], indexing="ij")
    places = torch.stack([*axes, *[torch.zeros(shape, dtype=torch.float64)] * (3 - len(shape)), torch.ones(shape)])
    return MetaTensor((affine @ places.flatten(1).double())[:3].view(3, *shape).float(), affine=affine)


def full_matrix(warp: Any, shape: Sequence[int]) -> torch.Tensor:
    """The warp of a patch as MONAI's `Affine` of the whole image takes it: about the middle of the image."""
    change = warp.affine
    start = np.eye(len(change))
    start[:-1, -1] = -np.array(warp.start)
    middle = np.eye(len(change))
    middle[:-1, -1] = (np.array(shape) - 1) / 2
    return torch.from_numpy(np.linalg.inv(middle) @ change @ start @ middle)


def box(warp: Any) -> tuple[slice, ...]:
    return (slice(None), *[slice(first, first + count) for first, count in zip(warp.start, warp.size, strict=True)])


# Against independent software


@pytest.mark.parametrize("padding", ["border", "constant"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_patch_is_the_crop_of_monais_affine_of_the_whole_image(dims, padding):
    image = noise(2, *SHAPES[dims])
    options = {**EVERYTHING, "elastic_sigma": 0.0, "padding": padding}
    transform = RandWarpd("image", PATCHES[dims], num_samples=1, **options).set_random_state(1)
    zeros = {"border": "border", "constant": "zeros"}[padding]
    for _ in range(6):
        found = transform({"image": image})[0]["image"]
        matrix = full_matrix(transform.warp, SHAPES[dims])
        whole = Affine(affine=matrix, padding_mode=zeros, image_only=True, dtype=torch.float64)(image)
        torch.testing.assert_close(found, whole.as_tensor().float()[box(transform.warp)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_angles_and_zooms_mean_what_monai_means_by_them(dims):
    image = noise(1, *SHAPES[dims])
    turns = 0.3 if dims == 2 else (0.3, -0.2, 0.5)
    angles = [turns] if dims == 2 else list(turns)
    transform = RandWarpd("image", SHAPES[dims], rotate_range=[(a, a) for a in angles], zoom_range=(1.25, 1.25))
    whole = Affine(rotate_params=turns, scale_params=[0.8] * dims, padding_mode="border", image_only=True)(image)
    torch.testing.assert_close(transform({"image": image})[0]["image"], whole.as_tensor(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("padding", ["constant", "reflect", "border"])
def test_every_part_together_is_the_resampling_of_simpleitk(dims, padding):
    shape, size = SHAPES[dims], PATCHES[dims]
    image = noise(1, *shape)
    transform = RandWarpd("image", size, padding=padding, padding_value=-2.0, **EVERYTHING).set_random_state(4)
    outside = 0
    for _ in range(6):
        found = transform({"image": image})[0]["image"]
        warp = transform.warp
        index = np.stack([*np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), np.ones(size)])
        places = np.tensordot(warp.affine, index, 1)[:-1] + dense_field(warp.control, size).numpy()
        modes = {"constant": {"constant_values": -2.0}, "reflect": {}, "border": {}}
        name = {"constant": "constant", "reflect": "reflect", "border": "edge"}[padding]
        wide = np.pad(image[0].numpy(), MARGIN, mode=name, **modes[padding])
        shift = np.ascontiguousarray(np.moveaxis((places - index[:-1])[::-1], 0, -1))
        field = sitk.DisplacementFieldTransform(sitk.GetImageFromArray(shift, isVector=True))
        source = sitk.GetImageFromArray(wide)
        source.SetOrigin([-float(MARGIN)] * dims)
        reference = sitk.GetImageFromArray(np.zeros(size, np.float32))
        expected = sitk.GetArrayFromImage(sitk.Resample(source, reference, field, sitk.sitkLinear, -9.0))
        outside += int((places < 0).any())
        np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-4)
    assert outside > 1


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_affine_of_a_patch_tells_where_its_voxels_are_in_space(dims, mirrored):
    affine = oblique(dims, mirrored=mirrored)
    image = world(SHAPES[dims], affine)
    # Zooming in keeps the places within the image, where its values are exact.
    options = {"flip_prob": 0.5, "rotate_range": 0.15, "zoom_range": (2.5, 3.0), "zoom_per_axis": True}
    for parts in ({}, {"flip_prob": 1.0}, options):
        transform = RandWarpd("image", PATCHES[dims], **parts).set_random_state(2)
        for _ in range(5):
            patch = transform({"image": image})[0]["image"]
            torch.testing.assert_close(
                patch.as_tensor(), world(PATCHES[dims], patch.affine).as_tensor(), atol=2e-4, rtol=0
            )


@pytest.mark.parametrize("mirrored", [False, True])
def test_rotations_are_rigid_in_millimeters(mirrored):
    image = MetaTensor(noise(1, *SHAPES[3]), affine=oblique(3, mirrored=mirrored))
    transform = RandWarpd("image", PATCHES[3], rotate_range=1.0).set_random_state(2)
    for _ in range(5):
        axes = transform({"image": image})[0]["image"].affine[:3, :3]
        assert not torch.allclose(axes, image.affine[:3, :3])
        # Lengths and angles of the voxels' edges stay.
        torch.testing.assert_close(axes.T @ axes, image.affine[:3, :3].T @ image.affine[:3, :3])


def test_a_range_for_the_first_axis_alone_turns_within_planes():
    image = MetaTensor(noise(1, *SHAPES[3]), affine=torch.diag(torch.tensor([5.0, 1.0, 1.5, 1.0])))
    transform = RandWarpd("image", PATCHES[3], rotate_range=(3.0, 0.0, 0.0)).set_random_state(0)
    transform({"image": image})
    matrix = transform.warp.matrix
    assert matrix[0].tolist() == [1, 0, 0]
    assert matrix[:, 0].tolist() == [1, 0, 0]
    assert abs(matrix[1, 2]) > 0.01


# Labels


@pytest.mark.parametrize("label_mode", ["nearest", "votes"])
@pytest.mark.parametrize("dims", [2, 3])
def test_labels_stay_on_the_image_under_all_parts(dims, label_mode):
    image = smooth(SHAPES[dims])
    label = (image > 0.3).to(torch.uint8) + (image > 0.9).to(torch.uint8) * 2
    transform = RandWarpd(["image", "label"], PATCHES[dims], label_mode=label_mode, **EVERYTHING).set_random_state(6)
    wrong = []
    for _ in range(8):
        case = transform({"image": image, "label": label})[0]
        found = case["image"]
        expected = (found > 0.3).to(torch.uint8) + (found > 0.9).to(torch.uint8) * 2
        assert case["label"].dtype == torch.uint8
        assert case["label"].shape == found.shape
        wrong.append((case["label"] != expected).float().mean())
    # Only voxels that a border runs through can differ.
    assert torch.stack(wrong).max() < 0.1


def test_the_nearest_label_is_taken():
    label = torch.randint(0, 2**31 - 1, (1, *SHAPES[3]), generator=torch.Generator().manual_seed(0))
    transform = RandWarpd("label", PATCHES[3], padding="constant", padding_label=-1, **EVERYTHING).set_random_state(3)
    found = transform({"label": label})[0]["label"]
    warp = transform.warp
    index = np.stack([*np.meshgrid(*[np.arange(n) for n in PATCHES[3]], indexing="ij"), np.ones(PATCHES[3])])
    places = np.rint(np.tensordot(warp.affine, index, 1)[:-1] + dense_field(warp.control, PATCHES[3]).numpy()).astype(
        int
    )
    inside = ((places >= 0) & (places < np.array(SHAPES[3]).reshape(3, 1, 1, 1))).all(0)
    clipped = [np.clip(p, 0, n - 1) for p, n in zip(places, SHAPES[3], strict=True)]
    expected = np.where(inside, label[0].numpy()[tuple(clipped)], -1)
    assert not inside.all()
    assert (found[0].numpy() != expected).mean() < 1e-3


def test_votes_are_the_largest_share_of_the_labels_masks():
    label = torch.randint(0, 4, (1, *SHAPES[2]), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    masks = torch.cat([label == value for value in range(4)]).float()
    options = {**EVERYTHING, "label_mode": "votes", "padding": "constant", "padding_label": 3}
    transform = RandWarpd(["label", "masks"], PATCHES[2], **options)
    outside = torch.zeros(0)
    for seed in range(4):
        transform.set_random_state(seed)
        case = transform({"label": label, "masks": masks})[0]
        shares = case["masks"]
        shares[3] += 1 - shares.sum(0)
        best = shares.max(0).values
        taken = shares.gather(0, case["label"].long())[0]
        torch.testing.assert_close(taken, best, atol=1e-4, rtol=0)
        outside = torch.cat([outside, (case["masks"].sum(0) - shares[3] < 1e-6).float().flatten()])
    assert case["label"].dtype == torch.int16
    assert outside.max() == 1


# Plain crops


@pytest.mark.parametrize("dims", [2, 3])
def test_without_a_warp_a_patch_is_a_crop_bit_for_bit(dims):
    image, label = noise(3, *SHAPES[dims]), noise(1, *SHAPES[dims], seed=1).mul(9).int()
    parts = {"rotate_range": 1.0, "rotate_prob": 0.0, "zoom_range": (0.5, 2.0), "zoom_prob": 0.0, "elastic_prob": 0.0}
    transform = RandWarpd(["image", "label"], PATCHES[dims], elastic_sigma=3.0, num_samples=5, **parts)
    for case in transform.set_random_state(0)({"image": image, "label": label}):
        first = torch.nonzero(image[0] == case["image"][0].flatten()[0])[0]
        crop = (slice(None), *[slice(int(f), int(f) + n) for f, n in zip(first, PATCHES[dims], strict=True)])
        assert torch.equal(case["image"], image[crop])
        assert torch.equal(case["label"], label[crop])
        assert case["image"].is_contiguous()
        assert case["image"].untyped_storage().data_ptr() != image.untyped_storage().data_ptr()


@pytest.mark.parametrize("dims", [2, 3])
def test_with_flips_alone_a_patch_is_a_flipped_crop_bit_for_bit(dims):
    image = noise(1, *SHAPES[dims]).transpose(1, 2).contiguous().transpose(1, 2)
    flips = [1.0, 0.0, 1.0][:dims]
    transform = RandWarpd("image", PATCHES[dims], flip_prob=flips).set_random_state(0)
    found = transform({"image": image})[0]["image"]
    expected = image[box(transform.warp)].flip([axis + 1 for axis, flip in enumerate(flips) if flip])
    assert torch.equal(found, expected)
    assert found.is_contiguous()


def test_a_warp_that_changes_nothing_gives_the_crop_too():
    image = noise(2, *SHAPES[3])
    still = RandWarpd("image", PATCHES[3], rotate_range=[(0.0, 1e-12)] * 3).set_random_state(0)
    found = still({"image": image})[0]["image"]
    assert still.warp.matrix is not None
    torch.testing.assert_close(found, image[box(still.warp)], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("padding", "mode"), [("border", "edge"), ("reflect", "reflect"), ("constant", "constant")])
def test_images_smaller_than_the_patch_are_padded_as_monai_pads_them(padding, mode):
    image = noise(2, 9, 30, 6)
    transform = RandWarpd("image", (16, 20, 11), padding=padding, padding_value=0.0).set_random_state(0)
    found = transform({"image": image})[0]["image"]
    padded = SpatialPad((16, 30, 11), mode=mode)(image).as_tensor()
    first = transform.warp.start[1]
    assert transform.warp.start[0] == -3
    assert torch.equal(found, padded[:, :, first : first + 20])
    flipped = RandWarpd("image", (16, 20, 11), padding=padding, flip_prob=1.0).set_random_state(0)
    assert torch.equal(flipped({"image": image})[0]["image"], found.flip(1, 2, 3))
    # The same by interpolation.
    still = RandWarpd("image", (16, 20, 11), padding=padding, rotate_range=[(1e-12, 2e-12)] * 3).set_random_state(0)
    torch.testing.assert_close(still({"image": image})[0]["image"], found, atol=1e-5, rtol=0)


def test_within_the_margin_patches_reach_every_voxel_and_none_beyond_and_see_the_mirror_image_around_it():
    image = torch.arange(11.0 * 9)[None].view(1, 11, 9)
    transform = RandWarpd("image", (13, 12), margin=(4, 3), padding="reflect", num_samples=400).set_random_state(0)
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (3, 3)), mode="reflect")
    seen = set()
    for case in transform({"image": image}):
        first = int(case["image"][0, 4, 3])
        row, column = divmod(first, 9)
        assert np.array_equal(case["image"], padded[:, row : row + 13, column : column + 12])
        seen.add((row, column))
    assert seen == {(row, column) for row in range(7) for column in range(4)}


def test_a_foreground_voxel_at_the_corner_is_brought_to_the_middle_as_far_as_the_image_reaches():
    label = torch.zeros(1, 20, 20, dtype=torch.uint8)
    label[0, 0, 19] = 1
    transform = RandWarpd("label", (12, 12), margin=3, foreground=1.0, padding="reflect").set_random_state(0)
    assert transform({"label": label})[0]["label"][0, 3, 8] == 1


@pytest.mark.parametrize("margin", [-1, 6, (2, 6), (1, 2, 3)])
def test_a_margin_that_leaves_nothing_or_does_not_fit_the_axes_is_refused(margin):
    with pytest.raises(RequestError, match="margin="):
        RandWarpd("image", (24, 12), margin=margin)


def test_tiny_images_can_be_warped():
    for padding in ("border", "reflect", "constant"):
        transform = RandWarpd(["image", "label"], (4, 5), padding=padding, **EVERYTHING).set_random_state(0)
        case = transform({"image": torch.ones(1, 1, 1), "label": torch.ones(1, 1, 1, dtype=torch.int32)})[0]
        assert case["image"].shape == case["label"].shape == (1, 4, 5)
        if padding != "constant":
            assert (case["image"] == 1).all()
            assert (case["label"] == 1).all()


# Places


def spots() -> torch.Tensor:
    """Class 1 large, class 2 rare, class 7 a single voxel, and 255 for no annotation."""
    label = torch.zeros(1, 40, 50, 30, dtype=torch.uint8)
    label[:, 5:20, 5:25, 5:20] = 1
    label[:, 30:32, 40:42, 20:22] = 2
    label[0, 35, 10, 25] = 7
    label[:, :2] = 255
    return label


@pytest.mark.parametrize("noted", [False, True])
def test_foreground_patches_are_centered_at_each_class_as_often(noted):
    case: dict[Any, Any] = {"image": noise(1, 40, 50, 30), "label": spots()}
    if noted:
        case = ClassIndicesd("label", max_places=500, ignore_label=255)(case)
    size = (3, 3, 3)
    transform = RandWarpd(["image", "label"], size, foreground=1.0, num_samples=600, ignore_label=255)
    patches = transform.set_random_state(0)(case)
    centers = torch.stack([patch["label"][0, 1, 1, 1] for patch in patches])
    values, counts = centers.unique(return_counts=True)
    assert values.tolist() == [1, 2, 7]
    assert (counts - 200).abs().max() < 50
    assert "label_places" not in patches[0]
    starts = {tuple(map(float, patch["image"].flatten()[:2])) for patch in patches}
    assert len(starts) > 150


def test_notes_hold_the_voxels_of_each_class():
    note = ClassIndicesd("label", max_places=500, ignore_label=255)({"label": spots()})["label_places"]
    flat = spots().flatten()
    assert [len(places) for places in note] == [500, 8, 1]
    assert [flat[places].unique().tolist() for places in note] == [[1], [2], [7]]
    again = ClassIndicesd("label", max_places=500, ignore_label=255)({"label": spots()})["label_places"]
    assert all(torch.equal(a, b) for a, b in zip(note, again, strict=True))
    assert ClassIndicesd("label")({"label": torch.zeros(1, 4, 4)})["label_places"] == []


def test_other_patches_lie_anywhere_and_wholly_in_the_image():
    transform = RandWarpd("image", (10, 12), foreground=0.0).set_random_state(0)
    starts = []
    for _ in range(400):
        transform({"image": noise(1, 13, 14)})
        starts.append(transform.warp.start)
    assert sorted({start[0] for start in starts}) == [0, 1, 2, 3]
    assert sorted({start[1] for start in starts}) == [0, 1, 2]


def test_the_probability_of_the_foreground_is_kept_and_cases_without_any_are_taken():
    label = torch.zeros(1, 60, 60, dtype=torch.int32)
    label[0, 30, 30] = 1
    transform = RandWarpd("label", (3, 3), foreground=0.3, num_samples=300).set_random_state(0)
    hits = sum(bool(patch["label"].any()) for patch in transform({"label": label}))
    assert 65 < hits < 125
    empty = transform({"label": torch.zeros(1, 60, 60, dtype=torch.int32)})
    assert len(empty) == 300


# Random state, metadata, chains


def test_a_seed_repeats_the_patches():
    case = {"image": noise(1, *SHAPES[3]), "label": noise(1, *SHAPES[3], seed=1).mul(3).int()}
    options = {**EVERYTHING, "foreground": 0.5, "num_samples": 3}
    transform = RandWarpd(["image", "label"], PATCHES[3], **options)
    runs = [transform.set_random_state(9)(case) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])
    assert not torch.equal(runs[0][0]["image"], runs[0][1]["image"])


def test_the_threads_do_not_change_a_patch():
    image = noise(2, *SHAPES[3])
    transform = RandWarpd("image", PATCHES[3], **EVERYTHING)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(transform.set_random_state(0)({"image": image})[0]["image"])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_patches_come_as_they_are_asked_for_and_the_case_stays():
    affine = oblique(3, mirrored=True)
    image = MetaTensor(noise(1, *SHAPES[3]), affine=affine, meta={"filename_or_obj": "a.nii.gz", "big": [0] * 9})
    before = image.as_tensor().clone()
    case = {"image": image, "label": image.as_tensor().short(), "name": "a"}
    patch = RandWarpd(["image", "label"], PATCHES[3], **EVERYTHING).set_random_state(0)(case)[0]
    assert isinstance(patch["image"], MetaTensor)
    assert patch["image"].meta["filename_or_obj"] == "a.nii.gz"
    assert "big" not in patch["image"].meta
    assert not isinstance(patch["label"], MetaTensor)
    assert patch["name"] == "a"
    assert torch.equal(image.as_tensor(), before)
    assert torch.equal(image.affine, affine)
    plain = RandWarpd("image", PATCHES[3], track_meta=False)(case)[0]["image"]
    assert not isinstance(plain, MetaTensor)


def test_pictures_with_an_affine_of_space_keep_it():
    affine = torch.diag(torch.tensor([0.5, 0.25, 1.0, 1.0], dtype=torch.float64))
    picture = MetaTensor(noise(3, 20, 20), affine=affine)
    transform = RandWarpd("image", (8, 8)).set_random_state(1)
    patch = transform({"image": picture})[0]["image"]
    start = torch.tensor([*transform.warp.start, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(patch.affine[:, -1], affine @ start)


def test_it_works_in_a_cached_data_set_with_a_loader():
    data = [{"image": noise(1, 30, 30, seed=i), "label": noise(1, 30, 30, seed=i).mul(3).int()} for i in range(3)]
    chain = Compose(
        [
            ClassIndicesd("label"),
            RandWarpd(["image", "label"], (16, 16), foreground=0.7, num_samples=2, **EVERYTHING),
            RandScaleIntensityd("image", factors=0.1, prob=1.0),
        ]
    )
    loaded = CacheDataset(data, chain, progress=False, copy_cache=False)
    batches = []
    for _ in range(2):
        torch.manual_seed(0)
        batches.append([batch["image"].as_tensor().clone() for batch in DataLoader(loaded, batch_size=3)])
    assert batches[0][0].shape == (6, 1, 16, 16)
    assert torch.equal(batches[0][0], batches[1][0])


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": (8,)}, "patch_size"),
        ({"patch_size": (8, 0)}, "patch_size"),
        ({"patch_size": (8, 8, 8)}, r"patch_size=\(8, 8, 8\) does not match an image of shape \(9, 9\)"),
        ({"rotate_range": (0.1, 0.1, 0.1)}, "rotate_range"),
        ({"rotate_range": [(0.1, 0.2, 0.3)]}, "rotate_range"),
        ({"zoom_range": (0.0, 1.0)}, "zoom_range"),
        ({"zoom_range": (1.5, 1.2)}, "zoom_range"),
        ({"flip_prob": (0.5, 0.5, 0.5)}, "flip_prob"),
        ({"flip_prob": (0.5, -0.5)}, "flip_prob"),
        ({"foreground": 33.0}, "foreground"),
        ({"rotate_prob": float("nan")}, "rotate_prob"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"elastic_sigma": -1.0}, "sigma"),
        ({"elastic_grid": 1}, "grid"),
        ({"label_mode": "linear"}, "label_mode"),
        ({"padding": "wrap"}, "padding"),
        ({"foreground": 0.5, "label_key": "truth"}, "'truth'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        RandWarpd("image", **{"patch_size": (8, 8), **options})({"image": noise(1, 9, 9)})


def test_entries_of_different_shape_are_refused():
    with pytest.raises(CaseError, match=r"'label' \(9, 8\)"):
        RandWarpd(["image", "label"], (4, 4))({"image": noise(1, 9, 9), "label": noise(1, 9, 8)})


def test_missing_keys_are_allowed_only_if_asked_for():
    case = {"image": noise(1, 9, 9)}
    assert RandWarpd(["image", "label"], (4, 4), allow_missing_keys=True)(case)[0].keys() == {"image"}
    with pytest.raises(KeyError, match="label"):
        RandWarpd(["image", "label"], (4, 4))(case)
