"""Amounts of memory: reading, showing, and what fits."""

from __future__ import annotations

import pytest

from medseg.errors import RequestError
from medseg.inferers.memory import fitting_batch, parse_memory, shown_bytes

MEBI = 1 << 20


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("2G", 2 << 30), ("1500M", 1500 * MEBI), ("1.5 GiB", 3 << 29), ("4096", 4096), ("10kb", 10240), (7, 7)],
)
def test_amounts_are_read(text, count) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["much", "-1G", "2X", "0", "G", "1 000M"])
def test_other_texts_are_refused(text) -> None:
    with pytest.raises(RequestError, match="write for instance 2G"):
        parse_memory(text)


def test_the_batch_fills_what_is_left() -> None:
    parts = {"held": 500 * MEBI, "slab": 100 * MEBI, "result": 50 * MEBI, "window": 100 * MEBI}
    assert fitting_batch(1000 * MEBI, 8, **parts) == 3
    assert fitting_batch(1000 * MEBI, 2, **parts) == 2
    with pytest.raises(RequestError, match=r"700 MiB.*500 MiB are held"):
        fitting_batch(700 * MEBI, 8, **parts)


def test_large_amounts_are_shown_in_gibibytes() -> None:
    assert shown_bytes(1 << 31) == "2.00 GiB"
    assert shown_bytes(10 * MEBI) == "10 MiB"
