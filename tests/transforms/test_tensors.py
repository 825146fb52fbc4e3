"""Entries of a case as plain tensors, and the metadata of what results come from."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from medseg.errors import CaseError
from medseg.transforms.tensors import one_shape, plain_tensor, single_label, with_metadata


def test_a_result_has_the_metadata_of_its_source_if_that_has_any():
    source = MetaTensor(torch.zeros(1, 2, 2), affine=2 * torch.eye(4), meta={"filename_or_obj": "a.nii"})
    result = with_metadata(torch.ones(1, 2, 2, dtype=torch.int32), source)
    assert torch.equal(result.affine, source.affine)
    assert result.meta["filename_or_obj"] == "a.nii"
    assert type(plain_tensor(result)) is torch.Tensor
    assert type(with_metadata(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))) is torch.Tensor


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 3), (1, 1, 3, 3, 3)])
def test_a_label_of_another_shape_than_one_channel_is_refused(shape):
    with pytest.raises(CaseError, match="expected \\(1, \\*spatial\\)"):
        single_label(torch.zeros(shape), "label")


def test_entries_of_several_shapes_are_refused():
    with pytest.raises(CaseError, match=r"'a' \(2, 2\), 'b' \(2, 3\)"):
        one_shape({"a": torch.zeros(1, 2, 2), "b": torch.zeros(1, 2, 3)})
