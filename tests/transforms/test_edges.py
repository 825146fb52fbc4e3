import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Flip

from medseg.errors import RequestError
from medseg.losses.boundary import edge_truth
from medseg.transforms.edges import LabelToEdged


def square() -> torch.Tensor:
    label = torch.zeros(1, 8, 9, dtype=torch.int32)
    label[:, 2:5, 3:6] = 2
    return label


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("options", [{}, {"border_is_edge": True}, {"edge_width": 2}])
def test_edges_are_those_of_the_loss_and_the_label_stays(dims, options):
    label = torch.randint(0, 3, (2, *(7, 6, 5)[:dims]), generator=torch.Generator().manual_seed(0))
    case = LabelToEdged("label", **options)({"label": label, "x": 1})
    assert torch.equal(case["label_edge"].bool(), edge_truth(label[None], **options)[0])
    assert case["label_edge"].dtype == torch.uint8
    assert case["label"] is label
    assert case["x"] == 1


def test_the_place_and_history_of_a_label_stay_with_its_edges():
    label = Flip(0)(MetaTensor(square(), affine=torch.diag(torch.tensor([2.0, 3, 4, 1]))))
    edges = LabelToEdged("label", "_rim")({"label": label})["label_rim"]
    assert torch.equal(edges.affine, label.affine)
    assert len(edges.applied_operations) == 1
    assert edges.sum() == 25 - 1
    assert label.unique().tolist() == [0, 2]


def test_numpy_labels_are_taken():
    edges = LabelToEdged(["a", "b"])({"a": square().numpy(), "b": np.zeros((1, 4, 4), np.uint8)})
    assert edges["a_edge"].sum() == 24
    assert edges["b_edge"].sum() == 0


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(RequestError, match="edge_width"):
        LabelToEdged("label", edge_width=(1, 1, 1))({"label": square()})


def test_missing_keys_are_allowed_only_if_asked_for():
    assert LabelToEdged("label", allow_missing_keys=True)({"x": 1}) == {"x": 1}
    with pytest.raises(KeyError, match="label"):
        LabelToEdged("label")({"x": 1})
