"""The border weight map: reference values, objects in 2D and 3D, voxels and mm, and what does not fit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medseg.errors import CaseError, RequestError
from medseg.transforms.weight_map import BorderWeightMapd, border_term, two_nearest

GOLDEN = Path(__file__).parents[1] / "golden" / "unet_metrics.npz"


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        names = ("ref_labels", "d1", "d2", "border_term", "class_weight", "weight_map")
        return {name: file[name] for name in names}


def balls(shape: tuple[int, ...], *, count: int = 5, seed: int = 0) -> torch.Tensor:
    """Objects of random place, some of which touch."""
    random = np.random.RandomState(seed)
    axes = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    label = np.zeros(shape, np.int32)
    for number in range(1, count + 1):
        middle = random.uniform(0, 1, len(shape)) * shape
        radius = random.uniform(2, 5)
        inside = sum((x - m) ** 2 for x, m in zip(axes, middle, strict=True)) < radius**2
        label[inside & (label == 0)] = number * 7
    return torch.from_numpy(label)[None]


def distances_by_hand(objects: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Sorted distances of each voxel to the nearest voxel of each object, `(objects, *shape)`."""
    places = np.stack(np.meshgrid(*[np.arange(n) for n in objects.shape], indexing="ij"), -1) * np.array(spacing)
    found = []
    for number in np.unique(objects[objects > 0]):
        voxels = places[objects == number]
        found.append(np.min([np.linalg.norm(places - voxel, axis=-1) for voxel in voxels], axis=0))
    return np.sort(found, axis=0)


def test_the_reference_map_is_reproduced(reference):
    label = torch.from_numpy(reference["ref_labels"].astype(np.int64))[None]
    first, second = two_nearest(label[0].numpy())
    background = reference["ref_labels"] == 0
    np.testing.assert_allclose(first[background], reference["d1"][background], atol=1e-5)
    np.testing.assert_allclose(second[background], reference["d2"][background], atol=1e-5)
    border = np.where(background, border_term(label[0].numpy()), 0)
    np.testing.assert_allclose(border, reference["border_term"], atol=1e-5)
    classes, weights = BorderWeightMapd("label", separate=False)({"label": label})["label"].numpy()
    assert np.array_equal(classes, reference["ref_labels"] > 0)
    np.testing.assert_allclose(weights, reference["weight_map"], atol=1e-5)
    np.testing.assert_allclose(weights - border, reference["class_weight"], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((40, 33), (1.0, 1.0)), ((18, 15, 12), (1.0, 1.0, 1.0)), ((18, 15, 12), (3.0, 0.7, 1.5))]
)
def test_distances_are_exact(shape, spacing):
    objects = balls(shape)[0].numpy()
    first, second = two_nearest(objects.astype(np.int64), spacing=spacing)
    expected = distances_by_hand(objects, spacing)
    np.testing.assert_allclose(first, expected[0], atol=1e-5)
    np.testing.assert_allclose(second, expected[1], atol=1e-5)


def test_a_limit_leaves_what_lies_within_it_and_the_border_term_as_it_is():
    objects = balls((90, 80), count=12)[0].numpy().astype(np.int64)
    first, second = two_nearest(objects)
    near, next_near = two_nearest(objects, limit=10.0)
    assert np.array_equal(near[first <= 10], first[first <= 10])
    assert np.array_equal(next_near[second <= 10], second[second <= 10])
    assert np.isinf(next_near).any()
    np.testing.assert_allclose(border_term(objects, sigma=2.0), 10 * np.exp(-((first + second) ** 2) / 8), atol=3e-7)


def test_distances_are_in_millimeters_where_asked_for():
    label = MetaTensor(balls((18, 15, 12)), affine=torch.diag(torch.tensor([-3.0, 0.7, 1.5, 1])))
    plain = BorderWeightMapd("label", class_weights=(0, 0), separate=False)({"label": label})["label"]
    scaled = BorderWeightMapd("label", class_weights=(0, 0), separate=False, use_spacing=True)({"label": label})[
        "label"
    ]
    expected = distances_by_hand(label[0].numpy(), (3.0, 0.7, 1.5))[:2].sum(0)
    term = np.where(label[0].numpy() > 0, 0, 10 * np.exp(-(expected**2) / 50))
    np.testing.assert_allclose(scaled[1].numpy(), term, atol=1e-5)
    assert not torch.allclose(plain[1], scaled[1])
    assert torch.equal(scaled.affine, label.affine)


@pytest.mark.parametrize("dims", [2, 3])
def test_touching_objects_are_parted_by_background(dims):
    label = torch.zeros(1, *(9, 8, 7)[:dims], dtype=torch.int32)
    label[:, 2:5, 2:6], label[:, 5:8, 2:6] = 4, 9
    classes, weights = BorderWeightMapd("label")({"label": label})["label"]
    expected = (label[0] > 0).float()
    expected[4:6, 2:6] = 0
    assert torch.equal(classes, expected)
    # In the gap both objects are one and two voxels away.
    gap = weights[4, 3] if dims == 2 else weights[4, 3, 3]
    share = float((classes == 0).float().mean())
    assert gap == pytest.approx(0.5 / share + 10 * np.exp(-9 / 50), rel=1e-5)
    together = BorderWeightMapd("label", separate=False)({"label": label})["label"]
    assert torch.equal(together[0], (label[0] > 0).float())


def test_objects_that_touch_at_a_corner_are_parted_too():
    label = torch.zeros(1, 6, 6, dtype=torch.int32)
    label[:, 1:3, 1:3], label[:, 3:5, 3:5] = 1, 2
    classes = BorderWeightMapd("label")({"label": label})["label"][0]
    assert classes[2, 2] == classes[3, 3] == 0
    assert classes.sum() == 6


def test_the_border_term_is_for_the_background_unless_asked_for_everywhere():
    label = balls((40, 33))
    outside, everywhere = (
        BorderWeightMapd("label", class_weights=(1, 1), on_foreground=on)({"label": label})["label"]
        for on in (False, True)
    )
    objects = outside[0] > 0
    assert (outside[1][objects] == 1).all()
    assert (everywhere[1][objects] > 1).all()
    assert torch.equal(outside[1][~objects], everywhere[1][~objects])


def test_fewer_than_two_objects_have_no_border():
    for count in (0, 1):
        label = balls((20, 20), count=count)
        classes, weights = BorderWeightMapd("label")({"label": label})["label"]
        assert len(weights.unique()) == count + 1
        assert float(weights.mean()) == pytest.approx(1)
        assert torch.equal(classes, (label[0] > 0).float())


def test_classes_weigh_the_same_by_default_and_as_given_otherwise():
    label = torch.zeros(1, 20, 20, dtype=torch.uint8)
    label[:, :4, :5], label[:, 10:, 10:] = 1, 3
    options = {"w0": 0.0, "components": True, "separate": False}
    classes, weights = BorderWeightMapd("label", **options)({"label": label})["label"]
    assert classes.unique().tolist() == [0, 1, 3]
    sums = [float(weights[classes == value].sum()) for value in (0, 1, 3)]
    assert sums == pytest.approx([400 / 3] * 3)
    given = BorderWeightMapd("label", class_weights=(1, 2, 3, 4), **options)({"label": label})["label"][1]
    assert [float(given[classes == value].unique()) for value in (0, 1, 3)] == [1, 2, 4]
    with pytest.raises(RequestError, match="class 3"):
        BorderWeightMapd("label", class_weights=(1, 2), **options)({"label": label})


def test_components_of_classes_are_objects():
    label = balls((40, 33))
    binary = (label > 0).byte()
    numbered = torch.zeros_like(label)
    seen = 0
    for at in itertools.product(range(40), range(33)):
        if binary[0][at] and not numbered[0][at]:
            seen += 1
            stack = [at]
            while stack:
                y, x = stack.pop()
                if 0 <= y < 40 and 0 <= x < 33 and binary[0, y, x] and not numbered[0, y, x]:
                    numbered[0, y, x] = seen
                    stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    assert seen > 1
    found = BorderWeightMapd("label", components=True)({"label": binary})["label"]
    assert torch.equal(found, BorderWeightMapd("label")({"label": numbered})["label"])


def test_voxels_without_annotation_weigh_nothing_and_do_not_count():
    label = balls((40, 33))
    label[:, :10] = 255
    classes, weights = BorderWeightMapd("label", ignore_label=255)({"label": label})["label"]
    assert (weights[:10] == 0).all()
    assert (classes[:10] == 0).all()
    rest = BorderWeightMapd("label")({"label": label[:, 10:]})["label"]
    torch.testing.assert_close(torch.stack([classes, weights])[:, 10:], rest)


def test_weights_may_have_a_key_of_their_own():
    label = MetaTensor(balls((20, 20)), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])))
    both = BorderWeightMapd("label")({"label": label})["label"]
    case = BorderWeightMapd("label", weight_key="weight")({"label": label, "x": 1})
    assert case["label"].dtype == torch.int32
    assert both.dtype == case["weight"].dtype == torch.float32
    assert torch.equal(case["label"].as_tensor().float(), both.as_tensor()[:1])
    assert torch.equal(case["weight"].as_tensor(), both.as_tensor()[1:])
    assert torch.equal(case["weight"].affine, label.affine)
    assert case["x"] == 1


def test_large_object_numbers_are_told_apart():
    label = torch.zeros(1, 10, 10, dtype=torch.int64)
    label[:, 2:5, 2:8], label[:, 5:8, 2:8] = 2**40, 2**40 + 1
    assert BorderWeightMapd("label")({"label": label})["label"][0, 4:6].sum() == 0


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.zeros(2, 5, 5), r"\(2, 5, 5\)"),
        (torch.zeros(5, 5), r"\(5, 5\)"),
        (torch.full((1, 5, 5), 0.5), "expected non-negative integers"),
        (torch.full((1, 5, 5), -1), "expected non-negative integers"),
    ],
)
def test_labels_that_number_no_objects_are_refused(label, message):
    with pytest.raises(CaseError, match=message):
        BorderWeightMapd("label")({"label": label})


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(RequestError, match="sigma"):
        BorderWeightMapd("label", sigma=0)
    with pytest.raises(RequestError, match="weight_key"):
        BorderWeightMapd(["a", "b"], weight_key="weight")
    with pytest.raises(CaseError, match="use_spacing"):
        BorderWeightMapd("label", use_spacing=True)({"label": balls((9, 9))})


def test_missing_keys_are_allowed_only_if_asked_for():
    assert BorderWeightMapd("label", allow_missing_keys=True)({"x": 1}) == {"x": 1}
    with pytest.raises(KeyError, match="label"):
        BorderWeightMapd("label")({"x": 1})


def test_a_mapping_with_other_keeps_numbered_objects_apart():
    label = balls((40, 40))
    mapped = BorderWeightMapd("label", mapping={"0": 0, "other": 1})({"label": label})["label"]
    assert torch.equal(mapped, BorderWeightMapd("label")({"label": label})["label"])


def test_a_mapping_without_other_makes_objects_of_the_classes():
    label = (balls((40, 40)) > 0).int() * 255
    mapped = BorderWeightMapd("label", mapping={"0": 0, "255": 1})({"label": label})["label"]
    assert torch.equal(mapped, BorderWeightMapd("label", components=True)({"label": label // 255})["label"])


def test_a_mapping_with_inverted_foreground_holds():
    label = (balls((40, 40)) == 0).int()
    mapped = BorderWeightMapd("label", mapping={"0": 1, "1": 0})({"label": label})["label"]
    assert torch.equal(mapped, BorderWeightMapd("label", components=True)({"label": 1 - label})["label"])


def test_a_mapping_needs_not_name_what_is_ignored_and_may_name_background_otherwise_than_0():
    label = balls((40, 40))
    plain = label.clone()
    plain[:, :9] = 255
    # The same objects, numbered from 0 on, in a background of 99.
    renamed = torch.where(plain == 255, 255, torch.where(plain == 0, 99, plain // 7 - 1))
    mapped = BorderWeightMapd("label", mapping={"99": 0, "other": 1}, ignore_label=255)({"label": renamed})["label"]
    assert torch.equal(mapped, BorderWeightMapd("label", ignore_label=255)({"label": plain})["label"])
