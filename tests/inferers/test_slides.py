"""Strips of a slide against the sliding window over the whole of it, and what is held meanwhile."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medseg import machine
from medseg.errors import CaseError, RequestError
from medseg.inferers.slides import label_strips
from medseg.inferers.sliding_window import SlidingWindowInferer
from medseg.networks import UNet


class Picture:
    """An array as a slide, which notes where it was read."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.shape = pixels.shape
        self.reads: list[tuple[int, int, int, int]] = []

    def read(self, x0: int, x1: int, y0: int, y1: int) -> np.ndarray:
        self.reads.append((x0, x1, y0, y1))
        return self.pixels[:, x0:x1, y0:y1]


class Plain:
    """A slide of any size that is made up while it is read."""

    def __init__(self, width: int, height: int) -> None:
        self.shape = (3, width, height)

    def read(self, x0: int, x1: int, y0: int, y1: int) -> np.ndarray:
        rows = (np.arange(y0, y1) // 50 % 2 * 255).astype(np.uint8)
        return np.broadcast_to(rows, (3, x1 - x0, y1 - y0))


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, -(-width // 8), -(-height // 8)), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)[:, :width, :height]


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return UNet(2, 3, 3, features=(4, 8, 8), norm="batch", dropout=0.0).eval()


class Brightness(nn.Module):
    """Two classes: dark and bright."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        bright = windows.mean(1, keepdim=True)
        return torch.cat([-bright, bright], 1)


def joined(strips) -> np.ndarray:
    return np.concatenate(list(strips), axis=1)


def whole(pixels: np.ndarray, network: nn.Module, inferer: SlidingWindowInferer) -> np.ndarray:
    with torch.no_grad():
        return inferer(scaled(torch.from_numpy(pixels))[None], network)[0, 0].numpy()


@pytest.mark.parametrize("size", [(150, 210), (210, 150), (300, 64), (40, 130), (130, 40), (30, 20), (64, 64)])
@pytest.mark.parametrize("options", [{}, {"overlap": 0.0, "mode": "constant"}, {"backend": "torch", "cval": 1.0}])
def test_strips_are_the_labels_of_the_whole_image(network, size, options):
    pixels = picture(*size)
    inferer = SlidingWindowInferer((64, 48), 4, **{"overlap": 0.5, "mode": "gaussian", "output": "labels", **options})
    expected = whole(pixels, network, inferer)
    assert len(np.unique(expected)) > 1
    assert np.array_equal(joined(label_strips(Picture(pixels), network, inferer, prepare=scaled)), expected)


def test_wanted_pixels_have_the_labels_of_the_whole_image_and_the_rest_is_not_read(network):
    pixels = picture(400, 500)
    tissue = np.zeros((400, 500), bool)
    tissue[90:170, 20:60] = tissue[300:310, 330:420] = True
    inferer = SlidingWindowInferer((64, 48), 4, 0.5, "gaussian", output="labels")
    source = Picture(pixels)
    strips = label_strips(
        source, network, inferer, prepare=scaled, wanted=lambda x0, x1, y0, y1: bool(tissue[x0:x1, y0:y1].any())
    )
    found = joined(strips)
    assert np.array_equal(found[tissue], whole(pixels, network, inferer)[tissue])
    seen = np.zeros_like(tissue)
    for x0, x1, y0, y1 in source.reads:
        assert tissue[x0:x1, y0:y1].any()
        seen[x0:x1, y0:y1] = True
    assert not seen.all()
    assert not found[~seen].any()


def test_without_any_wanted_window_all_is_background(network):
    source = Picture(picture(100, 500))
    inferer = SlidingWindowInferer((64, 48), 4, output="labels")
    found = joined(label_strips(source, network, inferer, prepare=scaled, wanted=lambda *window: False))
    assert found.shape == (100, 500)
    assert not found.any()
    assert source.reads == []


def test_a_memory_limit_changes_no_label_and_one_that_is_too_small_is_refused(network):
    pixels = picture(150, 210)
    options = {"overlap": 0.5, "mode": "gaussian", "output": "labels"}
    free = SlidingWindowInferer((64, 48), 4, **options)
    limited = SlidingWindowInferer((64, 48), 4, **options, max_memory="100G")
    assert np.array_equal(
        joined(label_strips(Picture(pixels), network, limited, prepare=scaled)), whole(pixels, network, free)
    )
    tight = SlidingWindowInferer((64, 48), 4, **options, max_memory="1M")
    with pytest.raises(CaseError, match="the limit is 1 MiB"):
        joined(label_strips(Picture(pixels), network, tight, prepare=scaled))


def test_progress_counts_the_windows_that_run_and_the_forecast_names_them(network):
    told, forecasts = [], []
    inferer = SlidingWindowInferer((64, 48), 4, 0.0, output="labels")
    inferer.on_progress = lambda done, windows: told.append((done, windows))
    inferer.on_forecast = forecasts.append
    joined(
        label_strips(Picture(picture(128, 96 * 2)), network, inferer, prepare=scaled, wanted=lambda x0, *rest: x0 == 0)
    )
    assert told == [(4, 4)]
    assert [forecast.windows for forecast in forecasts] == [4]


def peak(width: int, height: int) -> int:
    """Return the bytes that numpy and Python hold at most, and those of the accumulators."""
    inferer = SlidingWindowInferer((64, 64), 8, 0.5, output="labels")
    tracemalloc.start()
    try:
        for strip in label_strips(Plain(width, height), Brightness(), inferer, prepare=scaled):
            assert strip.shape[0] == width
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_height():
    low, high = peak(256, 1024), peak(256, 8192)
    assert high < 1.1 * low + 20_000


def _resident(width: int, height: int) -> int:
    machine.forget_peak()
    before = machine.resident_bytes()
    inferer = SlidingWindowInferer((64, 64), 8, 0.0, output="labels")
    for _ in label_strips(Plain(width, height), Brightness(), inferer, prepare=scaled):
        pass
    return machine.peak_bytes() - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process")
def test_the_process_holds_a_row_of_windows_whatever_the_height():
    """Tensors are not seen by tracemalloc: 40 million pixels would be 40 MB of labels and 320 MB of logits."""
    _resident(1024, 512)
    heights = [_resident(1024, height) for height in (1024, 8192, 40960)]
    assert max(heights) < 30 << 20


def test_a_fault_while_reading_ahead_is_raised_and_its_thread_ends(network):
    class Torn(Picture):
        def read(self, x0, x1, y0, y1):
            if y0 > 100:
                raise CaseError("torn.svs is damaged")
            return super().read(x0, x1, y0, y1)

    inferer = SlidingWindowInferer((64, 48), 4, output="labels")
    with pytest.raises(CaseError, match=r"torn\.svs is damaged"):
        joined(label_strips(Torn(picture(150, 400)), network, inferer, prepare=scaled))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("windows")]


@pytest.mark.parametrize("options", [{"activation": "sigmoid"}, {"foreground": 0.0}])
def test_what_slides_cannot_have_is_refused(network, options):
    inferer = SlidingWindowInferer((64, 48), 4, output="labels", **options)
    with pytest.raises(RequestError, match="one label per pixel"):
        label_strips(Picture(picture(64, 64)), network, inferer)


def test_a_network_whose_output_is_smaller_is_refused():
    inferer = SlidingWindowInferer((64, 48), 4, output="labels")
    with pytest.raises(CaseError, match=r"returns \(4, 3, 32, 24\)"):
        joined(label_strips(Picture(picture(128, 96)), nn.AvgPool2d(2), inferer))
