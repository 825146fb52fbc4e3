"""Reading and checking `--set`."""

from __future__ import annotations

from typing import Any

import pytest

from medseg.bundle.knobs import changed, knobs, parse_settings
from medseg.errors import MedsegError, RequestError

CONFIG: dict[str, Any] = {
    "_meta_": {"version": "1"},
    "max_epochs": 10,
    "learning_rate": 0.1,
    "roi_size": [8, 8],
    "resume": False,
    "weights": {"_target_": "medseg.components.inside", "root": "@bundle_root", "path": "models/model.pt"},
    "network": {"_target_": "medseg.components.UNet"},
    "device": "@somewhere",
    "run": [{"_target_": "medseg.components.run"}],
}


def test_knobs_are_the_plain_entries_at_the_top() -> None:
    assert set(knobs(CONFIG)) == {"max_epochs", "learning_rate", "roi_size", "resume"}


def test_settings_are_json_or_text() -> None:
    parsed = parse_settings(["a=3", "b=[1,2]", "c=text", "d=a=b", "e=true", "f="])
    assert parsed == {"a": 3, "b": [1, 2], "c": "text", "d": "a=b", "e": True, "f": ""}


@pytest.mark.parametrize("settings", [["max_epochs"], ["=3"], ["a=1", "a=2"]])
def test_a_malformed_setting_is_refused(settings: list[str]) -> None:
    with pytest.raises(RequestError):
        parse_settings(settings)


def test_whole_numbers_pass_for_floats_and_paths_may_be_replaced() -> None:
    assert changed(CONFIG, {"learning_rate": 1}) == {"learning_rate": 1.0}
    assert changed(CONFIG, {"weights": "/some/file.pt"}) == {"weights": "/some/file.pt"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_epoch": 3}, "unknown setting 'max_epoch' of this bundle; did you mean 'max_epochs'?"),
        ({"network": "x"}, "unknown setting 'network'"),
        ({"train::trainer::max_epochs": 3}, "unknown setting"),
        ({"max_epochs": 2.5}, "max_epochs: found 2.5, expected an integer"),
        ({"learning_rate": float("inf")}, "learning_rate: found inf, expected a finite number"),
        ({"roi_size": [8, float("nan")]}, r"roi_size\[1\]: found nan, expected a finite number"),
        ({"max_epochs": "$__import__('os')"}, "takes a plain value"),
        ({"weights": "%other.json::x"}, "takes a plain value"),
        ({"roi_size": ["@max_epochs", 8]}, "takes a plain value"),
        ({"resume": True}, "comes from --resume"),
    ],
)
def test_what_is_no_knob_or_no_value_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MedsegError, match=message):
        changed(CONFIG, settings)
