"""The comparison of an exported network with its source, and the inputs that both are given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medseg.errors import RequestError, SizeError
from medseg.tools import export as exporting
from medseg.tools.export import TOLERANCE, Difference, ExportResult
from medseg.tools.export_formats import Shapes

SHAPES = Shapes((2, 1, 16, 16), (1, 1, 19, 14), (1, 1, 32, 48))


class Picky(torch.nn.Module):
    """Takes images whose sides are multiples of `step`, from `least` on."""

    def __init__(self, step: int, least: int = 1) -> None:
        super().__init__()
        self.step, self.least = step, least

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(n % self.step or n < self.least for n in x.shape[2:]):
            raise SizeError(f"{tuple(x.shape)}")
        return torch.cat([x, 1 - x], 1)


def shapes(network: torch.nn.Module, window: list[int], channels: int = 1) -> Shapes:
    image = {"num_channels": channels, "spatial_shape": ["*"] * len(window)}
    bundle: Any = SimpleNamespace(name="any", metadata={"network_data_format": {"inputs": {"image": image}}})
    return exporting._shapes(network, bundle, {"roi_size": window})


@pytest.mark.parametrize(
    ("largest", "relative"), [(0.0, 0.02), (0.5, 0.02), (1.0, 0.02), (4.0, 0.005), (200.0, 0.0001)]
)
def test_a_difference_is_relative_to_logits_above_one(largest: float, relative: float) -> None:
    assert Difference((1, 1, 8, 8), 0.02, largest, 0.0).relative == pytest.approx(relative)


def test_differences_are_largest_logits_and_share_of_changed_labels() -> None:
    def changed(x: torch.Tensor) -> torch.Tensor:
        y = Picky(1)(x)
        y[..., :2] = y[..., :2].flip(1)
        return y

    found = exporting._compared(Picky(1), changed, (1, 1, 8, 8))
    x = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(18))
    expected = Picky(1)(x)
    assert found.shape == (1, 1, 8, 8)
    assert found.largest == pytest.approx(float(expected.abs().max()))
    assert found.changed == pytest.approx(2 / 8)
    assert found.difference == pytest.approx(float((2 * x - 1)[..., :2].abs().max()))
    same = exporting._compared(Picky(1), Picky(1), (2, 1, 5, 7))
    assert (same.difference, same.changed) == (0, 0)


def test_one_channel_is_compared_by_its_sign() -> None:
    found = exporting._compared(torch.nn.Identity(), torch.negative, (1, 1, 6, 6))
    assert found.changed == 1


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(RequestError, match=r"\(1, 1, 4, 4\)"):
        exporting._compared(torch.nn.Identity(), lambda x: x[..., 1:, 1:], (1, 1, 5, 5))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("share", "refused"), [(0.5, False), (1.0, False), (1.01, True), (math.nan, True)])
def test_more_than_the_tolerance_is_refused_and_so_is_nan(half: bool, share: float, refused: bool) -> None:
    allowed = TOLERANCE[half]
    found = [Difference((1, 1, 4, 4), 0.0, 2.0, 0.0), Difference((1, 1, 6, 4), 2.0 * allowed * share, 2.0, 0.0)]
    if not refused:
        exporting._check_same(found, allowed, Path("n.onnx"), half=half)
        return
    with pytest.raises(RequestError, match=r"n\.onnx") as error:
        exporting._check_same(found, allowed, Path("n.onnx"), half=half)
    assert "1x1x6x4" in str(error.value)
    assert ("--half" in str(error.value)) == half


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ("batch and size", [(2, 1, 16, 16), (1, 1, 19, 14)]),
        ("batch", [(2, 1, 32, 48), (1, 1, 32, 48)]),
        ("", [(1, 1, 32, 48), (1, 1, 32, 48)]),
    ],
)
def test_inputs_vary_what_the_file_leaves_free(free: str, expected: list[tuple[int, ...]]) -> None:
    assert list(exporting._inputs(SHAPES, free)) == expected


@pytest.mark.parametrize(
    ("step", "least", "window", "example", "other"),
    [
        (1, 1, [256, 96], (2, 1, 128, 96), (1, 1, 131, 94)),
        (16, 1, [256, 96], (2, 1, 128, 96), (1, 1, 144, 96)),
        (32, 1, [256, 96], (2, 1, 128, 96), (1, 1, 160, 128)),
        # A network of large images is traced on its window; one of a single size has no other.
        (1, 200, [256, 300], (2, 1, 256, 300), (1, 1, 259, 298)),
        (64, 1, [64, 64], (2, 1, 64, 64), (1, 1, 64, 64)),
        (1, 1, [96, 40, 64], (2, 1, 48, 40, 48), (1, 1, 51, 38, 49)),
    ],
)
def test_a_network_is_traced_on_a_small_image_and_compared_on_another_that_it_takes(
    step: int, least: int, window: list[int], example: tuple[int, ...], other: tuple[int, ...]
) -> None:
    found = shapes(Picky(step, least), window)
    assert (found.example, found.other, found.window) == (example, other, (1, 1, *window))


def test_a_network_that_takes_not_even_its_window_is_refused() -> None:
    with pytest.raises(RequestError, match="Picky") as error:
        shapes(Picky(64), [40, 40])
    assert "[40, 40]" in str(error.value)


def test_half_precision_stays_within_and_leaves_the_network_alone() -> None:
    network = torch.nn.Conv2d(1, 2, 3)
    half = exporting._half(network)
    found = half(torch.ones(1, 1, 8, 8))
    assert found.dtype == torch.float32
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert network.weight.dtype == torch.float32
    torch.testing.assert_close(found, network(torch.ones(1, 1, 8, 8)), atol=2e-3, rtol=0)


def test_a_result_counts_the_bytes_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "n.xml").write_bytes(b"12345")
    (tmp_path / "n.bin").write_bytes(b"123")
    (tmp_path / "n.ts").write_bytes(b"1")
    differences = (Difference((1, 1, 4, 4), 0.5, 2.0, 0.0),)
    found = {name: ExportResult(tmp_path / name, "batch", differences, 1e-4) for name in ("n.xml", "n.ts")}
    assert {name: result.bytes for name, result in found.items()} == {"n.xml": 8, "n.ts": 1}
    content = json.loads(json.dumps(found["n.xml"].to_dict()))
    assert content["bytes"] == 8
    assert content["path"] == str(tmp_path / "n.xml")
    assert content["differences"][0]["shape"] == [1, 1, 4, 4]
