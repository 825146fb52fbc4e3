"""Labels on the native grid while the windows run, against inverting everything first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.inferers import SlidingWindowInferer as MonaiInferer
from monai.transforms import (
    Activationsd,
    Compose,
    CropForegroundd,
    Invertd,
    Orientationd,
    Rotated,
    Spacingd,
    SpatialPadd,
)

from medseg.errors import CaseError, RequestError
from medseg.inferers.native import NativeInferer
from medseg.inferers.rotations import RotationTTAInferer
from medseg.inferers.sliding_window import SlidingWindowInferer

# A top class that wins by less than this in the reference may lose to rounding.
TIE = 1e-5
STRAIGHT = np.eye(3)
PERMUTED = np.array([[0, 0, 1.0], [1, 0, 0], [0, -1, 0]])


def _turned(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    return about_z @ about_x


class _Blobs(torch.nn.Module):
    """Class scores that change smoothly, so that borders run everywhere."""

    def __init__(self, classes: int, dims: int = 3) -> None:
        super().__init__()
        torch.manual_seed(3)
        kind = torch.nn.Conv3d if dims == 3 else torch.nn.Conv2d
        self.layer = kind(1, classes, 5, padding=2).requires_grad_(False)
        self.layer.weight *= 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _smooth(shape: tuple[int, ...]) -> torch.Tensor:
    noise = torch.randn(1, 1, *(size // 3 + 2 for size in shape), generator=torch.Generator().manual_seed(0))
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    return torch.nn.functional.interpolate(noise, shape, mode=mode, align_corners=True)[0]


def _loaded(shape: tuple[int, ...], directions: np.ndarray, spacing: tuple[float, ...]) -> MetaTensor:
    affine = np.eye(4)
    affine[:3, :3] = directions @ np.diag((*spacing, 1.0)[:3])
    affine[:3, 3] = (3, -40, 5)
    meta = {"original_affine": affine.copy(), "spatial_shape": np.array(shape), "space": "RAS"}
    return MetaTensor(_smooth(shape), affine=torch.from_numpy(affine), meta=meta)


def _batch(image: MetaTensor, preprocessing: Compose) -> dict[str, Any]:
    return next(iter(DataLoader(Dataset([{"image": image}], preprocessing), batch_size=1)))


def _reference(batch: dict[str, Any], preprocessing: Compose, network: torch.nn.Module, roi, activation: str):
    batch = dict(batch)
    batch["pred"] = MonaiInferer(roi, 2, 0.25, "gaussian")(batch["image"], network)
    steps = [Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False, to_tensor=True)]
    if activation != "none":
        steps.insert(0, Activationsd("pred", softmax=activation == "softmax", sigmoid=activation == "sigmoid"))
    return Compose(steps)(decollate_batch(batch)[0])["pred"]


def _spacing(pixdim, **options) -> Spacingd:
    return Spacingd("image", pixdim, mode="bilinear", padding_mode="border", **options)


CASES = {
    "coarser": (STRAIGHT, (0.8, 0.8, 1.5), [_spacing((1.5, 1.5, 2.0))]),
    "finer": (STRAIGHT, (2.0, 2.0, 4.0), [_spacing((1.0, 1.3, 2.0))]),
    "finer along one axis": (STRAIGHT, (2.0, 2.0, 4.0), [_spacing((2.0, 2.0, 2.0))]),
    "as it is": (STRAIGHT, (1.0, 1.0, 1.0), []),
    "mirrored": (np.diag([-1.0, -1, 1]), (0.8, 0.8, 1.5), [_spacing((1.5, 1.5, 2.0))]),
    "permuted": (PERMUTED, (0.8, 0.8, 1.5), [_spacing((1.1, 1.5, 2.0))]),
    "tilted": (_turned(0.3), (0.8, 0.8, 1.5), [_spacing((1.5, 1.5, 2.0))]),
    "tilted, to the world's axes": (_turned(0.3), (0.8, 0.8, 1.5), [_spacing((1.5, 1.5, 2.0), diagonal=True)]),
    "turned and permuted, to the world's axes": (
        _turned(0.7) @ PERMUTED,
        (1.8, 0.8, 1.5),
        [_spacing((1.5, 1.5, 2.0), diagonal=True)],
    ),
    "padded": (STRAIGHT, (0.8, 0.8, 1.5), [_spacing((1.5, 1.5, 2.0)), SpatialPadd("image", (40, 30, 33))]),
    "tilted, to the world's axes, padded": (
        _turned(0.3),
        (0.8, 0.8, 1.5),
        [_spacing((1.5, 1.5, 2.0), diagonal=True), SpatialPadd("image", (60, 60, 60))],
    ),
    "cropped": (
        STRAIGHT,
        (0.8, 0.8, 1.5),
        [
            _spacing((1.5, 1.5, 2.0)),
            CropForegroundd("image", source_key="image", select_fn=lambda x: x > 1.2, allow_smaller=True),
        ],
    ),
}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_labels_are_those_of_inverting_all_scores_first(case, activation: str) -> None:
    directions, spacing, steps = case
    preprocessing = Compose([Orientationd("image", "RAS", labels=None), *steps])
    batch = _batch(_loaded((36, 32, 28), directions, spacing), preprocessing)
    network, roi = _Blobs(4), (12, 16, 16)
    scores = _reference(batch, preprocessing, network, roi, activation)
    found = SlidingWindowInferer(roi, 2, 0.25, "gaussian", output="labels", activation=activation)(
        batch["image"], network
    )[0]
    if activation == "sigmoid":
        different = found.bool() != (scores >= 0.5)
        margin = (scores - 0.5).abs()
    else:
        different = found != scores.argmax(0, keepdim=True)
        best = scores.sort(0, descending=True).values
        margin = (best[0] - best[1])[None]
    assert found.dtype == torch.uint8
    assert found.unique().numel() > 1
    assert found.shape[1:] == (36, 32, 28)
    assert not (different & (margin > TIE)).any()


@pytest.mark.parametrize("output", ["uint8", "float16"])
@pytest.mark.parametrize("case", ["coarser", "permuted", "tilted, to the world's axes", "padded"])
def test_probabilities_are_those_of_inverting_first(case: str, output: str) -> None:
    directions, spacing, steps = CASES[case]
    preprocessing = Compose([Orientationd("image", "RAS", labels=None), *steps])
    batch = _batch(_loaded((36, 32, 28), directions, spacing), preprocessing)
    network, roi = _Blobs(4), (12, 16, 16)
    expected = _reference(batch, preprocessing, network, roi, "softmax")
    found = SlidingWindowInferer(roi, 2, 0.25, "gaussian", output=output)(batch["image"], network)[0]
    step = 1 / 255 if output == "uint8" else 1 / 1024
    scaled = found.float() / (255 if output == "uint8" else 1)
    assert found.dtype == (torch.uint8 if output == "uint8" else torch.float16)
    assert float((scaled - expected).abs().max()) <= step * 0.51


@pytest.mark.parametrize("classes", [2, 300])
def test_pictures_keep_their_grid(classes: int) -> None:
    image = _loaded((50, 41), STRAIGHT, (1.0, 1.0))
    image.affine = torch.eye(4, dtype=torch.float64)
    image.meta["original_affine"] = np.eye(4)
    network = _Blobs(classes, dims=2)
    found = SlidingWindowInferer((16, 16), 4, 0.5, "gaussian", output="labels")(image[None], network)
    logits = MonaiInferer((16, 16), 4, 0.5, "gaussian")(image[None], network)
    assert torch.equal(found.long(), logits.argmax(1, keepdim=True))


def test_the_result_carries_the_native_grid_and_nothing_to_invert() -> None:
    preprocessing = Compose([Orientationd("image", "LPS", labels=None), _spacing((1.5, 1.5, 2.0))])
    image = _loaded((36, 32, 28), _turned(0.2), (0.8, 0.9, 1.5))
    batch = _batch(image, preprocessing)
    batch["pred"] = SlidingWindowInferer((16, 16, 16), output="labels")(batch["image"], _Blobs(3))
    single = decollate_batch(batch)[0]["pred"]
    assert torch.equal(single.affine, image.affine)
    assert single.applied_operations == []
    alone = SlidingWindowInferer((16, 16, 16), output="labels")(
        preprocessing({"image": image})["image"][None], _Blobs(3)
    )
    assert torch.equal(alone[0], single)


def test_images_of_a_batch_are_restored_one_by_one() -> None:
    preprocessing = Compose([Orientationd("image", "RAS", labels=None), _spacing((1.5, 1.5, 2.0))])
    image = _loaded((36, 32, 28), STRAIGHT, (0.8, 0.8, 1.5))
    other = image.clone()
    other.mul_(-1)
    both = next(iter(DataLoader(Dataset([{"image": image}, {"image": other}], preprocessing), batch_size=2)))["image"]
    inferer = SlidingWindowInferer((16, 16, 16), 3, 0.25, output="labels")
    found = inferer(both, _Blobs(3))
    for number, single in enumerate((image, other)):
        assert torch.equal(found[number], inferer(_batch(single, preprocessing)["image"], _Blobs(3))[0])


def test_what_cannot_be_undone_by_position_is_refused() -> None:
    turned = Compose([Rotated("image", angle=(0.1, 0.2, 0.3))])
    batch = _batch(_loaded((20, 20, 20), STRAIGHT, (1.0, 1.0, 1.0)), turned)
    with pytest.raises(RequestError, match="cannot be mapped back through 'Rotate'"):
        SlidingWindowInferer((16, 16, 16), output="labels")(batch["image"], _Blobs(2))


def test_a_plain_tensor_has_no_other_grid_than_its_own() -> None:
    found = SlidingWindowInferer((16, 16, 16), output="labels")(_smooth((20, 20, 20))[None], _Blobs(2))
    assert found.shape == (1, 1, 20, 20, 20)


def test_an_image_that_does_not_know_its_grid_is_refused() -> None:
    with pytest.raises(RequestError, match="load it with LoadCased"):
        SlidingWindowInferer((16, 16, 16), output="labels")(MetaTensor(torch.rand(1, 1, 20, 20, 20)), _Blobs(2))


def test_networks_with_several_outputs_cannot_give_labels() -> None:
    with pytest.raises(RequestError, match="only output 'logits'"):
        SlidingWindowInferer((16, 16), output="labels")(torch.rand(1, 1, 20, 20), lambda x: (x, x))


@pytest.mark.parametrize("case", ["coarser", "tilted, to the world's axes"])
def test_other_inferers_are_brought_to_the_native_grid_alike(case) -> None:
    directions, spacing, steps = CASES[case]
    preprocessing = Compose([Orientationd("image", "RAS", labels=None), *steps])
    batch = _batch(_loaded((36, 32, 28), directions, spacing), preprocessing)
    settings, network = ((12, 16, 16), 2, 0.25, "gaussian"), _Blobs(4)
    streamed = SlidingWindowInferer(*settings, output="labels")(batch["image"], network)
    after = NativeInferer(MonaiInferer(*settings))(batch["image"], network)
    assert torch.equal(after, streamed)
    assert torch.equal(after.affine, streamed.affine)


def test_rotations_come_to_the_native_grid_and_tell_their_progress() -> None:
    preprocessing = Compose([Orientationd("image", "RAS", labels=None), _spacing((1.5, 1.5, 2.0))])
    batch = _batch(_loaded((36, 32, 28), STRAIGHT, (0.8, 0.8, 1.5)), preprocessing)
    turned = RotationTTAInferer(SlidingWindowInferer((16, 16, 16)), angles=[0, 90])
    inferer, told = NativeInferer(turned), []
    inferer.on_progress = lambda done, total: told.append(done / total)
    assert inferer(batch["image"], _Blobs(3)).shape == (1, 1, 36, 32, 28)
    assert told[-1] == 1


def test_logits_of_other_inferers_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(CaseError, match="non-finite values"):
        NativeInferer(MonaiInferer((16, 16)))(torch.zeros(1, 2, 20, 20), lambda x: x / 0)


def test_native_logits_are_not_offered() -> None:
    with pytest.raises(RequestError, match="use the wrapped inferer"):
        NativeInferer(MonaiInferer((16, 16)), output="logits")
