"""What transforms do to the grid and to pixels: declared by ours, in one table for MONAI's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from monai import transforms
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, GridDistortiond, Identityd, MapTransform, NormalizeIntensityd, Transform

from medseg import components
from medseg.bundle.allowed import ALLOWED
from medseg.errors import RequestError
from medseg.transforms.traits import Traits, refuse_unmapped, traced_effect, traits_of

OURS = [
    kind
    for name in components.__all__
    if isinstance(kind := getattr(components, name), type) and issubclass(kind, Transform)
]
CONTAINERS = ("Compose", "OneOf", "RandomOrder", "SomeOf")


class Undeclared(MapTransform):
    def __call__(self, data: Any) -> Any:
        return data


class Declared(Undeclared):
    traits = Traits("kept", per_pixel=True)


class Distortion(GridDistortiond):
    pass


class OwnNormalize(NormalizeIntensityd):
    pass


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_transform_of_ours_declares_its_traits(kind: type) -> None:
    assert isinstance(kind.__dict__["traits"], Traits)


@pytest.mark.parametrize("name", ALLOWED["transform"]["monai.transforms"].split())
def test_every_transform_that_bundles_may_name_is_known(name: str) -> None:
    kind = getattr(transforms, name)
    known = traits_of(kind.__new__(kind))
    assert (known is None) == (name in CONTAINERS)


STEPS = [
    Flipd("image", 0),
    transforms.Orientationd("image", "LPS", labels=None),
    transforms.Rotate90d("image"),
    transforms.Resized("image", (8, 8, 8)),
    transforms.Spacingd("image", (2, 2, 2)),
    components.SeparableSpacingd("image", (2, 2, 2)),
    transforms.SpatialPadd("image", (20, 20, 20)),
    transforms.CenterScaleCropd("image", 0.5),
    transforms.CropForegroundd("image", source_key="image", allow_smaller=True),
    transforms.Zoomd("image", 0.7),
    transforms.Rotated("image", (0.1, 0, 0)),
    transforms.Affined("image"),
    transforms.Transposed("image", (0, 2, 1, 3)),
    transforms.ToTensord("image"),
    transforms.RandFlipd("image", prob=1),
    transforms.RandSpatialCropd("image", (4, 4, 4), random_size=False),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_the_trace_in_an_image_tells_the_same_effect_as_the_transform(step: Any) -> None:
    image = MetaTensor(torch.rand(1, 12, 10, 8), affine=torch.eye(4))
    (operation,) = step({"image": image})["image"].applied_operations
    traits = traits_of(step)
    assert traits is not None
    assert traced_effect(operation) == traits.grid


def test_a_trace_of_an_unknown_class_has_no_effect_that_is_known() -> None:
    assert traced_effect({"class": "Swirl"}) is None
    assert traced_effect({"class": "Swirl", "grid": "resampled"}) == "resampled"


def test_a_class_of_its_own_maps_the_grid_like_its_base_but_may_look_at_more_than_a_pixel() -> None:
    constants = {"subtrahend": np.zeros(1), "divisor": np.ones(1)}
    plain, own = NormalizeIntensityd("image", **constants), OwnNormalize("image", **constants)
    assert traits_of(plain).is_per_pixel(plain)
    assert not traits_of(NormalizeIntensityd("image")).is_per_pixel(NormalizeIntensityd("image"))
    assert traits_of(own) == Traits("kept")
    assert traits_of(Declared("image")) == Traits("kept", per_pixel=True)
    assert traits_of(Undeclared("image")) is None
    assert traits_of(lambda data: data) is None


def test_steps_that_can_be_undone_by_position_pass() -> None:
    refuse_unmapped(Compose([Flipd("image", 0), Compose([Declared("image"), Identityd("image")])]))


@pytest.mark.parametrize("kind", [GridDistortiond, Distortion])
def test_a_deformation_is_refused_with_the_reason(kind: Any) -> None:
    step = kind("image", num_cells=2, distort_steps=[(1, 1, 1)] * 3)
    with pytest.raises(RequestError, match=rf"{kind.__name__} in the preprocessing cannot be inverted by position"):
        refuse_unmapped(Compose([Flipd("image", 0), Compose([step])]))


def test_a_step_that_declares_nothing_is_refused_with_what_to_do() -> None:
    with pytest.raises(RequestError, match=r'effect of Undeclared in .* `traits = Traits\("kept"\)`'):
        refuse_unmapped(Undeclared("image"))
    with pytest.raises(RequestError, match="unknown effect of <lambda> in the preprocessing"):
        refuse_unmapped(Compose([lambda data: data]))


def test_the_table_loads_neither_torch_nor_monai() -> None:
    code = "import sys, medseg.transforms.traits; sys.exit(bool({'torch', 'monai', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
