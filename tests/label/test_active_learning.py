"""Selection of the next image to label."""

from __future__ import annotations

import pytest

from medseg.label.active_learning import INFO_KEY, choose_randomly, choose_unsure, known_values


def test_a_random_image_is_one_of_them_and_a_seed_decides_which() -> None:
    images = [f"i{number}" for number in range(50)]
    assert choose_randomly(images, 3) == choose_randomly(images[::-1], 3)
    assert len({choose_randomly(images, seed) for seed in range(20)}) > 5
    assert choose_randomly([]) == ""


def test_the_least_sure_image_is_chosen_among_known_and_measured_ones() -> None:
    values = {"a": 0.2, "b": 0.9, "c": 0.5}
    assert choose_unsure(list(values), {}, values.__getitem__) == "b"
    assert choose_unsure(list(values), {"a": 0.95}, values.__getitem__) == "a"
    assert choose_unsure([], {}, values.__getitem__) == ""


def test_labeled_images_do_not_count_however_unsure_they_were() -> None:
    assert choose_unsure(["a"], {"gone": 1.0}, lambda image: 0.1) == "a"


def test_no_more_images_are_measured_than_allowed() -> None:
    measured: list[str] = []

    def measure(image: str) -> float:
        measured.append(image)
        return 0.5

    choose_unsure([f"i{number}" for number in range(20)], {"i0": 0.1}, measure, candidates=4, seed=1)
    assert len(measured) == 4
    assert "i0" not in measured


def test_images_that_cannot_be_measured_are_passed_over() -> None:
    assert choose_unsure(["a", "b"], {}, lambda image: None if image == "a" else 0.1) == "b"
    images = [f"bad{number}" for number in range(20)] + ["good"]
    assert choose_unsure(images, {}, lambda image: 0.1 if image == "good" else None, candidates=1, seed=0) == "good"


def test_where_none_can_be_measured_none_is_called_the_least_sure() -> None:
    assert choose_unsure(["b", "a"], {}, lambda image: None) == ""


def test_nobody_waits_for_long_measurements(monkeypatch) -> None:
    now, measured = [0.0], []
    monkeypatch.setattr("medseg.label.active_learning.time.monotonic", lambda: now[0])

    def measure(image: str) -> float:
        now[0] += 20
        measured.append(image)
        return 0.5

    assert choose_unsure([f"i{number}" for number in range(20)], {}, measure, seed=1) in measured
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"m": {"weights": "w", "value": 0.3}}, {"i": 0.3}),
        ({"m": {"weights": "older", "value": 0.3}}, {}),
        ({"other": {"weights": "w", "value": 0.3}}, {}),
        ({"m": {"weights": "w"}}, {}),
        ("text", {}),
    ],
)
def test_only_values_of_these_weights_count(record: object, found: dict[str, float]) -> None:
    assert known_values({"i": {INFO_KEY: record}}, "m", "w") == found
