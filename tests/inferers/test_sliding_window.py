"""The sliding window: MONAI's values from a slab of accumulators, and what it does under pressure."""

from __future__ import annotations

import math

import monai.inferers
import pytest
import torch
from monai.data import MetaTensor

from medseg.errors import CaseError, RequestError, SizeError
from medseg.inferers.blend import count_windows, cut_windows
from medseg.inferers.sliding_window import SlidingWindowInferer

CUTS = [
    ((40, 56, 40), (40, 56, 40), 0.5),
    ((41, 57, 30), (32, 32, 32), 0.25),
    ((100, 64), (48, 48), 0.5),
    ((100, 64), (48, 48), (0.0, 0.75)),
    ((30, 30), (48, -1), 0.5),
    ((33, 35), 16, 0.9),
]


def _image(size, batch: int = 2, channels: int = 1) -> torch.Tensor:
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def _network(dims: int, channels: int = 1, classes: int = 3) -> torch.nn.Module:
    torch.manual_seed(1)
    kind = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
    return kind(channels, classes, 3, padding=1).eval().requires_grad_(False)


@pytest.mark.parametrize(("size", "roi", "overlap"), CUTS)
def test_progress_ends_at_the_number_of_windows_that_monai_cuts(size, roi, overlap) -> None:
    inferer = SlidingWindowInferer(roi_size=roi, sw_batch_size=3, overlap=overlap, mode="gaussian")
    told: list[tuple[int, int]] = []
    inferer.on_progress = lambda done, total: told.append((done, total))
    image = _image(size)
    reference = monai.inferers.SlidingWindowInferer(roi_size=roi, sw_batch_size=3, overlap=overlap, mode="gaussian")
    windows = 0

    def network(x: torch.Tensor) -> torch.Tensor:
        nonlocal windows
        windows += len(x)
        return x * 2

    expected = reference(image, network)
    cut = windows
    assert cut == 2 * count_windows(size, roi, overlap)
    assert torch.equal(inferer(image, network), expected)
    assert told[-1] == (cut, cut)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize(
    ("size", "roi", "overlap", "mode", "windows", "batch", "padding"),
    [
        ((40, 50, 30), (16, 16, 16), 0.25, "gaussian", 3, 2, "constant"),
        ((40, 50, 30), (16, 64, 16), 0.5, "constant", 4, 1, "reflect"),
        ((10, 50, 30), (16, 24, -1), (0.5, 0.25, 0), "gaussian", 2, 1, "replicate"),
        ((90, 20, 20), 16, 0.75, "gaussian", 5, 1, "constant"),
        ((10, 9, 30), (16, 12, 16), 0.25, "gaussian", 1, 3, "circular"),
        ((70, 50), (32, 16), 0.25, "gaussian", 4, 2, "constant"),
        ((20, 50), (32, 64), 0.25, "constant", 1, 1, "reflect"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_those_of_monai_bit_for_bit(size, roi, overlap, mode, windows, batch, padding, dtype) -> None:
    image = _image(size, batch, channels=2).to(dtype)
    network = _network(len(size), channels=2).to(dtype)
    settings = (roi, windows, overlap, mode, 0.125, padding)
    expected = monai.inferers.SlidingWindowInferer(*settings)(image, network)
    found = SlidingWindowInferer(*settings)(image, network)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("axis", [1, 2, None])
def test_windows_along_any_axis_are_the_same_windows(axis) -> None:
    usual = cut_windows((40, 50, 90), (16, 16, 16), 0.25)
    other = cut_windows((40, 50, 90), (16, 16, 16), 0.25, axis=axis)
    assert sorted(other.starts) == sorted(usual.starts)
    along = [start[other.axis] for start in other.starts]
    assert along == sorted(along)


def test_the_slab_is_cut_from_the_axis_where_it_is_smallest() -> None:
    windows = cut_windows((40, 50, 90), (16, 16, 16), 0.25, axis=None)
    assert windows.axis == 2
    assert windows.slab_values(4) == 5 * 16 * 40 * 50


def test_the_slab_does_not_grow_with_the_slices() -> None:
    slabs = {
        cut_windows((64, 64, slices), (32, 32, 32), 0.5, axis=None).slab_values(3) for slices in (64, 128, 512, 4096)
    }
    assert len(slabs) == 1


def test_metadata_of_the_image_stay_on_the_logits() -> None:
    image = MetaTensor(_image((20, 20, 20)), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    found = SlidingWindowInferer((16, 16, 16))(image, _network(3))
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, image.affine)


@pytest.mark.parametrize(
    "network",
    [
        lambda x: (x, x[..., ::2, ::2] * 2),
        lambda x: {"a": x, "b": x * 2},
        lambda x: x[..., ::2, ::2],
    ],
)
def test_networks_that_a_stream_cannot_take_go_to_monai(network) -> None:
    image = _image((40, 40))
    expected = monai.inferers.SlidingWindowInferer((16, 16), 2, 0.5)(image, network)
    found = SlidingWindowInferer((16, 16), 2, 0.5)(image, network)
    for key in expected if isinstance(expected, dict) else range(len(expected)):
        assert torch.equal(found[key], expected[key])


def test_coordinates_are_passed_like_monai() -> None:
    seen = []

    def network(x: torch.Tensor, where) -> torch.Tensor:
        seen.append(where)
        return x

    SlidingWindowInferer((16, 16), 2, 0.5, with_coord=True)(_image((40, 40)), network)
    assert seen[0][0][2:] == [slice(0, 16), slice(0, 16)]


def test_gradients_flow_as_with_monai() -> None:
    image, network = _image((20, 20), 1), _network(2).requires_grad_(True)
    SlidingWindowInferer((16, 16))(image, network).sum().backward()
    found = network.weight.grad.clone()
    network.weight.grad = None
    monai.inferers.SlidingWindowInferer((16, 16))(image, network).sum().backward()
    assert torch.equal(found, network.weight.grad)


def test_a_network_that_returns_its_input_does_not_change_the_image() -> None:
    image = _image((40, 40))
    before = image.clone()
    SlidingWindowInferer((16, 16), 1, 0.5, "gaussian")(image, lambda x: x)
    assert torch.equal(image, before)


def test_values_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(CaseError, match="non-finite values"):
        SlidingWindowInferer((16, 16))(_image((40, 40)), lambda x: x / 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "mask"}, "labels"),
        ({"activation": "relu"}, "sigmoid"),
        ({"output": "logits", "foreground": 0.1}, "foreground"),
        ({"max_memory": "much"}, "2G"),
    ],
)
def test_impossible_requests_are_refused_with_the_choices(options, message) -> None:
    with pytest.raises(RequestError, match=message):
        SlidingWindowInferer((16, 16), **options)


def _full_above(limit: int):
    sizes = []

    def network(windows: torch.Tensor) -> torch.Tensor:
        if len(windows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(windows))
        return windows * 2

    return network, sizes


def test_a_full_gpu_halves_the_batch_once_and_for_all(caplog) -> None:
    image = _image((64, 64), 1)
    expected = SlidingWindowInferer((16, 16), 8, 0.5)(image, lambda x: x * 2)
    network, sizes = _full_above(3)
    with caplog.at_level("WARNING"):
        found = SlidingWindowInferer((16, 16), 8, 0.5)(image, network)
    assert torch.equal(found, expected)
    assert max(sizes) == 2
    assert sum(sizes) == count_windows((64, 64), (16, 16), 0.5)
    assert [record.message for record in caplog.records] == [
        "out of GPU memory; the batch size is reduced to 4 windows",
        "out of GPU memory; the batch size is reduced to 2 windows",
    ]


def test_windows_without_foreground_are_not_run_and_become_background() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[..., 20:30, 24:44] = 1
    seen = 0

    def network(x: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(x)
        return torch.cat([torch.full_like(x, 0.5), x], 1)

    found = SlidingWindowInferer((16, 16), 1, 0.5, output="labels", foreground=0.5)(image, network)
    assert torch.equal(found, image.byte())
    assert seen == 2
    assert count_windows((64, 64), (16, 16), 0.5) == 49


def test_an_image_without_any_foreground_is_all_background() -> None:
    inferer = SlidingWindowInferer((16, 16), output="labels", foreground=0.5)
    found = inferer(torch.zeros(1, 1, 40, 40), lambda x: torch.cat([x + 1, x], 1))
    assert found.shape == (1, 1, 40, 40)
    assert not found.any()


def test_a_memory_limit_chooses_the_batch() -> None:
    batches = []

    def network(x: torch.Tensor) -> torch.Tensor:
        batches.append(len(x))
        return x * 2

    image = _image((64, 64), 1)
    wide = SlidingWindowInferer((16, 16), 4, 0.5, max_memory="100G")(image, network)
    assert batches[0] == 1  # the trial
    assert max(batches) == 4
    assert torch.equal(wide, SlidingWindowInferer((16, 16), 4, 0.5)(image, lambda x: x * 2))
    with pytest.raises(CaseError, match=r"the limit is 2 MiB.*slab.*window"):
        SlidingWindowInferer((16, 16), 4, 0.5, max_memory="2M")(image, network)


def test_the_forecast_comes_after_the_first_pass_and_counts_all_windows() -> None:
    inferer = SlidingWindowInferer((16, 16), 4, 0.5, output="labels")
    told = []
    inferer.on_forecast = told.append
    inferer(_image((64, 64), 1), lambda x: torch.cat([x, 1 - x], 1))
    assert len(told) == 1
    assert told[0].windows == 49
    assert told[0].batch == 4
    assert told[0].peak_bytes > 0
    assert math.isfinite(told[0].seconds)
    assert told[0].describe().startswith("49 windows, 4 at a time: about ")


def test_weights_of_images_that_are_windows_themselves_are_not_kept():
    inferer = SlidingWindowInferer((-1, -1), mode="gaussian")
    for size in (8, 9, 10):
        inferer(torch.zeros(1, 1, size, size), torch.nn.Identity())
    assert [tuple(kept.shape) for kept in inferer._weights.values()] == [(10, 10)]


@pytest.mark.parametrize(("roi", "error"), [((-1, 16), CaseError), ((8, 16), SizeError)])
def test_an_image_too_small_for_the_network_is_about_that_image_alone(roi, error) -> None:
    def network(x: torch.Tensor) -> torch.Tensor:
        raise SizeError("needs 16 voxels")

    with pytest.raises(error, match="needs 16 voxels"):
        SlidingWindowInferer(roi)(_image((8, 16), 1), network)


@pytest.mark.parametrize(
    ("roi", "overlap", "message"),
    [
        ((16, 16), 1.0, "invalid overlap"),
        ((16, 16), (0.5,), "has 1 values, expected 1 or 2"),
        ((16, 16, 16), 0.5, "has 3 values"),
    ],
)
def test_windows_that_cannot_be_are_refused(roi, overlap, message) -> None:
    with pytest.raises(RequestError, match=message):
        SlidingWindowInferer(roi, overlap=overlap)(_image((20, 20), 1), torch.nn.Identity())


def test_a_full_gpu_is_a_warning_about_the_run(assert_warns) -> None:
    image = _image((64, 64), 1)
    assert_warns(lambda: SlidingWindowInferer((16, 16), 8, 0.5)(image, _full_above(3)[0]), "gpu-fallback", run=True)
