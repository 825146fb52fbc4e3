import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Flip

import medseg.transforms
from medseg.errors import CaseError, RequestError
from medseg.transforms.labels import MapLabelsd

EXACT = {"0": 0, "255": 1}


def test_every_public_name_is_listed():
    assert sorted(medseg.transforms.__all__) == medseg.transforms.__all__
    assert all(hasattr(medseg.transforms, name) for name in medseg.transforms.__all__)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("mapping", [EXACT, {0: 0, 255: 1}, {"0": 0, "other": 1}])
def test_values_become_classes_whatever_the_type(dtype, mapping):
    label = torch.tensor([[[0, 255], [255, 0]]]).to(dtype)
    if dtype is torch.int16:
        label = label.short()
    mapped = MapLabelsd("label", mapping)({"label": label})["label"]
    assert mapped.dtype == torch.int32
    assert mapped.tolist() == [[[0, 1], [1, 0]]]


@pytest.mark.parametrize("values", [[-1, 0, 7], [0, 1, 2_000_000_000], [-2_000_000_000, 0, 5], [10**12, 0, 3]])
def test_negative_and_far_apart_values_are_mapped(values):
    mapping = {str(value): index for index, value in enumerate(values)}
    label = torch.tensor(values).repeat(4)
    assert MapLabelsd("label", mapping)({"label": label})["label"].tolist() == [0, 1, 2] * 4


def test_all_instances_can_become_one_class():
    label = torch.arange(0, 300).reshape(1, 20, 15)
    mapped = MapLabelsd("label", {"0": 0, "other": 1})({"label": label})["label"]
    assert torch.equal(mapped, (label > 0).int())


def test_the_place_and_history_of_a_label_stay():
    label = Flip(0)(MetaTensor(torch.ones(1, 3, 4), affine=torch.diag(torch.tensor([2.0, 3, 4, 1]))))
    mapped = MapLabelsd("label", {"1": 5})({"label": label})["label"]
    assert torch.equal(mapped.affine, label.affine)
    assert len(mapped.applied_operations) == len(label.applied_operations) == 1
    assert mapped.unique().tolist() == [5]
    assert label.unique().tolist() == [1]


def test_numpy_labels_and_empty_ones_are_taken():
    mapped = MapLabelsd("label", EXACT)({"label": np.array([[0, 255]], np.uint8)})["label"]
    assert mapped.tolist() == [[0, 1]]
    assert MapLabelsd("label", EXACT)({"label": torch.zeros(1, 0)})["label"].shape == (1, 0)


@pytest.mark.parametrize("far", [0, 2_000_000_000])
def test_an_unknown_value_names_file_value_and_known_ones(far):
    label = MetaTensor(torch.tensor([[0, 255, 128, 3, far]]), meta={"filename_or_obj": "tile_7.png"})
    with pytest.raises(CaseError) as error:
        MapLabelsd("label", {"0": 0, "255": 1, "2000000000": 2})({"label": label})
    assert "tile_7.png contains the unmapped label 3, 128:" in str(error.value)
    assert "0, 255, 2000000000" in str(error.value)


def test_many_unknown_values_are_counted():
    with pytest.raises(CaseError, match="The label 'label' contains the unmapped label 1, 2, 3, 4, 5 and 94 more"):
        MapLabelsd("label", {"0": 0})({"label": torch.arange(100)})


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_values_between_labels_are_refused(value):
    with pytest.raises(CaseError, match="expected integers"):
        MapLabelsd("label", {"0": 0, "other": 1})({"label": torch.tensor([0.0, value])})


@pytest.mark.parametrize(
    ("mapping", "part"),
    [
        ({}, "Empty label mapping"),
        ({"0": "a"}, "'a'"),
        ({"0": True}, "True"),
        ({"0": -1}, "-1"),
        ({"0": 1.0}, "1.0"),
        ({"liver": 1}, "'liver'"),
        ({1.5: 1}, "1.5"),
        ({"0": 0, 0: 1}, "Duplicate value 0"),
        ({"0": 0, "00": 1}, "Duplicate value 0"),
    ],
)
def test_wrong_mappings_are_refused(mapping, part):
    with pytest.raises(RequestError) as error:
        MapLabelsd("label", mapping)
    assert part in str(error.value)


def test_missing_keys_are_allowed_only_if_asked_for():
    assert MapLabelsd("label", EXACT, allow_missing_keys=True)({"x": 1}) == {"x": 1}
    with pytest.raises(KeyError, match="label"):
        MapLabelsd("label", EXACT)({"x": 1})
