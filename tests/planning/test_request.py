"""What is typed on the command line."""

from __future__ import annotations

import pytest

from medseg.errors import RequestError
from medseg.networks import NETWORKS
from medseg.planning.request import NETWORK_NAMES, parse_duration, parse_network, parse_size


def test_every_network_has_a_name() -> None:
    assert set(NETWORK_NAMES.values()) == set(NETWORKS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("unet", ("UNet", False)),
        ("UNet++", ("UNetPlusPlus", False)),
        ("banet+selfreg", ("BANet", True)),
        (" UCTransNet ", ("UCTransNet", False)),
    ],
)
def test_networks_by_their_names(text: str, found: tuple[str, bool]) -> None:
    assert parse_network(text) == found


def test_a_misspelt_network_gets_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"'unett'\. Did you mean 'unet'"):
        parse_network("unett")


@pytest.mark.parametrize(("text", "size"), [("8G", 8 << 30), ("1.5 GiB", 3 << 29), ("300M", 300 << 20), ("1024", 1024)])
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("90", 90), ("1d", 86400), ("5min", 300)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3m", "0", "3 weeks", "m"])
def test_no_time_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="Invalid duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "much", "0G", "-1G", "8X"])
def test_no_memory_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="Invalid amount of memory"):
        parse_size(text)
