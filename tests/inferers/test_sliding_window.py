"""The sliding window and its progress."""

from __future__ import annotations

import monai.inferers
import pytest
import torch

from medseg.inferers import SlidingWindowInferer, count_windows


@pytest.mark.parametrize(
    ("size", "roi", "overlap"),
    [
        ((40, 56, 40), (40, 56, 40), 0.5),
        ((41, 57, 30), (32, 32, 32), 0.25),
        ((100, 64), (48, 48), 0.5),
        ((100, 64), (48, 48), (0.0, 0.75)),
        ((30, 30), (48, -1), 0.5),
        ((33, 35), 16, 0.9),
    ],
)
def test_progress_ends_at_the_number_of_windows_that_monai_cuts(size, roi, overlap) -> None:
    inferer = SlidingWindowInferer(roi_size=roi, sw_batch_size=3, overlap=overlap, mode="gaussian")
    told: list[tuple[int, int]] = []
    inferer.on_progress = lambda done, total: told.append((done, total))
    image = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
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
