"""Averages over rotated images."""

from __future__ import annotations

import math

import monai.inferers
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import nn

from medseg.errors import RequestError, SizeError
from medseg.inferers import rotations
from medseg.inferers.overlap_tile import OverlapTileInferer
from medseg.inferers.rotations import RotationTTAInferer
from medseg.inferers.sliding_window import SlidingWindowInferer
from medseg.networks import UNet

QUARTERS = [0, 90, 180, 270]


class Symmetric(nn.Module):
    """A convolution whose kernel is the same under every symmetry of the square: it commutes with all of them."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, -5.0, 2.0], [1.0, 2.0, 1.0]]) / 6
        kernel = kernel if dims == 2 else torch.stack([kernel, kernel * 3, kernel * 0.2], dim=-1)
        self.kernel = torch.stack([kernel, -0.7 * kernel, 0.3 * kernel])[:, None]
        self.convolve = nn.functional.conv2d if dims == 2 else nn.functional.conv3d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, self.kernel, padding=1).tanh() + torch.arange(3.0).reshape(3, *[1] * (x.dim() - 2))


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def smooth_image(height: int, width: int) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(height) / 9.0, torch.arange(width) / 7.0, indexing="ij")
    return (row.sin() + column.cos() + (row * 0.7 + column * 0.4).sin())[None, None]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("angles", [QUARTERS, 4, [0], [90, -90, 450]])
@pytest.mark.parametrize(("size", "axis"), [((9, 14), -1), ((7, 9, 6), 2), ((7, 9, 6), -1)])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_network_that_commutes_with_quarter_turns_gives_its_own_result(mirror, angles, size, axis, activation):
    network, x = Symmetric(len(size)), image(2, 1, *size)
    act = torch.sigmoid if activation == "sigmoid" else lambda logits: logits.softmax(1)
    inferer = RotationTTAInferer(SimpleInferer(), angles, mirror=mirror, axis=axis, activation=activation)
    torch.testing.assert_close(act(inferer(x, network)), act(network(x)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("angles", [1, 3, 7, 8, [10.5, -33, 200], [45], [1e-9]])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("size", [(17, 40), (1, 9), (5, 8, 6), (4, 1, 1)])
def test_a_constant_network_stays_constant_at_every_voxel(angles, mirror, size):
    levels = torch.tensor([0.5, -1.0, 2.0])

    def constant(x: torch.Tensor) -> torch.Tensor:
        return levels.reshape(1, 3, *[1] * len(size)).expand(len(x), 3, *x.shape[2:])

    found = RotationTTAInferer(SimpleInferer(), angles, mirror=mirror)(image(2, 1, *size), constant)
    assert found.shape == (2, 3, *size)
    expected = levels.softmax(0).reshape(1, 3, *[1] * len(size)).expand_as(found)
    torch.testing.assert_close(found.softmax(1), expected, atol=1e-6, rtol=0)


def lopsided(x: torch.Tensor) -> torch.Tensor:
    """Look up and to the right: no symmetry."""
    up = nn.functional.pad(x, (0, 0, 1, 0))[..., :-1, :]
    right = nn.functional.pad(x, (0, 2))[..., 2:]
    return torch.cat([x, 2 * up, right - x], dim=1)


@pytest.mark.parametrize(
    ("angle", "flip"), [(90, False), (180, False), (270, False), (0, True), (90, True), (270, True)]
)
def test_each_symmetry_equals_explicit_loops(angle, flip):
    x = image(1, 1, 5, 8)
    height, width = 5, 8

    def place(row: int, column: int) -> tuple[int, int]:
        """Where a pixel of the image comes to lie."""
        column = width - 1 - column if flip else column
        return {
            0: (row, column),
            90: (width - 1 - column, row),
            180: (height - 1 - row, width - 1 - column),
            270: (column, height - 1 - row),
        }[angle]

    turned = torch.zeros(1, 1, *((5, 8) if angle % 180 == 0 else (8, 5)))
    for row in range(height):
        for column in range(width):
            turned[(..., *place(row, column))] = x[..., row, column]
    probability = lopsided(turned).softmax(1)
    expected = lopsided(x).softmax(1)
    both = torch.zeros_like(expected)
    for row in range(height):
        for column in range(width):
            both[..., row, column] = probability[(..., *place(row, column))]

    inferer = RotationTTAInferer(SimpleInferer(), [angle], mirror=flip)
    if flip:
        alone = RotationTTAInferer(SimpleInferer(), [angle])(x, lopsided).softmax(1)
        both = (both + alone) / 2
    torch.testing.assert_close(inferer(x, lopsided).softmax(1), both, atol=1e-6, rtol=0)
    assert (both - expected).abs().max() > 0.05


def test_eight_symmetries_equal_the_library_s_turns_of_a_volume_about_any_axis():
    x = image(2, 1, 4, 6, 5)
    network = nn.Conv3d(1, 3, 3, padding=1)
    for axis, plane in ((0, (3, 4)), (1, (2, 4)), (2, (2, 3)), (-1, (2, 3)), (-3, (3, 4))):
        expected = torch.zeros(2, 3, 4, 6, 5)
        with torch.no_grad():
            for quarters in range(4):
                for flip in ([], [plane[1]]):
                    turned = torch.rot90(x.flip(flip), quarters, plane)
                    expected += torch.rot90(network(turned).softmax(1), -quarters, plane).flip(flip) / 8
            found = RotationTTAInferer(SimpleInferer(), 4, mirror=True, axis=axis)(x, network)
        torch.testing.assert_close(found.softmax(1), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_interpolated_turns_approach_the_exact_ones(angle):
    x = image(1, 1, 12, 17)
    exact = RotationTTAInferer(SimpleInferer(), [angle], mirror=True)(x, lopsided)
    near = RotationTTAInferer(SimpleInferer(), [angle + 1e-5], mirror=True)(x, lopsided)
    # The plane grows by two rows, so the network's border lies one pixel further out there.
    inner = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(near.softmax(1)[inner], exact.softmax(1)[inner], atol=1e-4, rtol=0)


def test_the_rotated_image_is_the_mirrored_one_on_a_plane_that_holds_it():
    """Against bilinear sampling, pixel by pixel, of an image padded by numpy."""
    x = image(1, 1, 6, 9)
    angle = math.radians(30)
    seen = []

    def record(turned: torch.Tensor) -> torch.Tensor:
        seen.append(turned.clone())
        return turned.new_zeros(1, 2, *turned.shape[2:])

    RotationTTAInferer(SimpleInferer(), [30])(x, record)
    (turned,) = seen
    # 5 cos 30 + 8 sin 30 and 5 sin 30 + 8 cos 30, rounded up, are the distances of the outermost pixels.
    assert turned.shape == (1, 1, 10, 11)
    pad = 20
    padded = np.pad(x[0, 0].numpy().astype(np.float64), pad, mode="reflect")
    for row in range(10):
        for column in range(11):
            down, right = row - 4.5, column - 5
            y = math.cos(angle) * down + math.sin(angle) * right + 2.5 + pad
            z = -math.sin(angle) * down + math.cos(angle) * right + 4 + pad
            i, j = math.floor(y), math.floor(z)
            dy, dz = y - i, z - j
            expected = (
                padded[i, j] * (1 - dy) * (1 - dz)
                + padded[i + 1, j] * dy * (1 - dz)
                + padded[i, j + 1] * (1 - dy) * dz
                + padded[i + 1, j + 1] * dy * dz
            )
            assert float(turned[0, 0, row, column]) == pytest.approx(expected, abs=1e-5)


def test_seven_turns_of_a_pointwise_network_are_close_to_one():
    x = smooth_image(64, 50)

    def pointwise(turned: torch.Tensor) -> torch.Tensor:
        return torch.cat([turned, -turned], dim=1)

    found = RotationTTAInferer(SimpleInferer())(x, pointwise).softmax(1)
    difference = (found - pointwise(x).softmax(1)).abs()
    assert difference[..., 1:-1, 1:-1].max() < 5e-3
    assert difference.max() < 0.05  # the mirrored image has a kink at the border


@pytest.mark.parametrize("angles", [[0, 90, 180, 270], 7])
def test_results_do_not_depend_on_the_squares_of_resampling(angles, monkeypatch):
    x = image(2, 2, 40, 33)
    network = nn.Conv2d(2, 3, 3, padding=1)
    with torch.no_grad():
        whole = RotationTTAInferer(SimpleInferer(), angles, mirror=True)(x, network)
        monkeypatch.setattr(rotations, "_SQUARE", 11)
        pieces = RotationTTAInferer(SimpleInferer(), angles, mirror=True)(x, network)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


def test_the_image_stays_as_it_is_and_an_identity_network_is_no_harm():
    x = image(1, 2, 6, 6)
    before = x.clone()
    found = RotationTTAInferer(SimpleInferer(), 4)(x, nn.Identity())
    assert torch.equal(x, before)
    torch.testing.assert_close(found.softmax(1), x.softmax(1), atol=1e-6, rtol=0)


def test_other_inferers_work_within():
    torch.manual_seed(0)
    padded = UNet(2, 1, 2, (2, 3, 4), dropout=0.0).eval()
    torch.manual_seed(0)
    unpadded = UNet(2, 1, 2, (2, 3, 4), padding="valid", dropout=0.0).eval()
    x = image(1, 1, 30, 24)
    for inferer, network in (
        (SlidingWindowInferer((16, 16), 2, 0.5), padded),
        (OverlapTileInferer(52, 2), unpadded),
    ):
        with torch.no_grad():
            found = RotationTTAInferer(inferer, [0, 90])(x, network).softmax(1)
            turned = inferer(torch.rot90(x, 1, (2, 3)), network).softmax(1)
            expected = (inferer(x, network).softmax(1) + torch.rot90(turned, -1, (2, 3))) / 2
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_progress_rises_to_its_end_and_the_other_inferer_is_left_as_it_was():
    inner = SlidingWindowInferer((8, 8), 1, 0.0)
    inferer = RotationTTAInferer(inner, 3, mirror=True)
    told: list[float] = []
    inferer.on_progress = lambda done, total: told.append(done / total)
    inferer(image(1, 1, 20, 11), Symmetric(2))
    assert told == sorted(told)
    assert told[-1] == 1
    assert len(told) > 6 * 6
    assert inner.on_progress is None
    told.clear()
    simple = RotationTTAInferer(SimpleInferer(), 4)
    simple.on_progress = inferer.on_progress
    simple(image(1, 1, 8, 8), Symmetric(2))
    assert told == [0.25, 0.5, 0.75, 1]


def test_metadata_and_extra_arguments_pass():
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    x = MetaTensor(image(1, 2, 6, 6), affine=affine)

    def scaled(turned: torch.Tensor, scale: float, *, shift: float) -> torch.Tensor:
        assert type(turned) is torch.Tensor
        return turned * scale + shift

    found = RotationTTAInferer(SimpleInferer(), 4)(x, scaled, 2.0, shift=1.0)
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, affine)
    torch.testing.assert_close(found.as_tensor().softmax(1), (x.as_tensor() * 2).softmax(1), atol=1e-6, rtol=0)


def test_certain_predictions_stay_finite():
    for activation in ("softmax", "sigmoid"):
        inferer = RotationTTAInferer(SimpleInferer(), 5, activation=activation)
        found = inferer(image(1, 1, 5, 5), lambda x: torch.cat([x * 0 + 1e4, x * 0 - 1e4], dim=1))
        assert found.isfinite().all()
        assert (found[:, 0] > found[:, 1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"angles": 0}, "invalid angles=0"),
        ({"angles": []}, "invalid angles=.."),
        ({"angles": [0, float("nan")]}, "list of degrees"),
        ({"axis": 3}, "axis=3"),
        ({"activation": "relu"}, "activation='relu'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        RotationTTAInferer(SimpleInferer(), **options)


@pytest.mark.parametrize(
    ("shape", "network", "error", "message"),
    [
        ((1, 1, 8), nn.Identity(), SizeError, "2 or 3 spatial axes"),
        ((1, 2, 8, 8), lambda x: x[..., 1:-1, 1:-1], SizeError, "shape mismatch.*OverlapTileInferer"),
        ((1, 2, 8, 8), lambda x: x.argmax(1, keepdim=True), RequestError, "must return floating-point logits.*int64"),
        ((1, 2, 8, 8), lambda x: [x], RequestError, "must return floating-point logits.*list"),
        ((1, 1, 8, 8), nn.Identity(), RequestError, "softmax.*one output channel"),
    ],
)
def test_what_is_no_logits_of_the_image_is_refused(shape, network, error, message):
    with pytest.raises(error, match=message):
        RotationTTAInferer(SimpleInferer())(image(*shape), network)


def test_it_is_an_inferer_of_monai():
    assert isinstance(RotationTTAInferer(SimpleInferer()), monai.inferers.Inferer)
