"""The model card, the lines of choices and the forecast of a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.compose import compose
from medseg.planning.model_card import card
from medseg.planning.plan import make_plan
from medseg.planning.probe import Measurement
from medseg.planning.request import PlanRequest
from medseg.planning.result import Forecast, Plan
from tests.planning.synthetic import fingerprint, volume

FOUND = fingerprint(volume(), volume(name="b"), dataset="spleens")
MEASURED = Measurement("cpu", 2, {"float32": 0.4}, 0.01, 0.1, 0.05, 300 << 20, 700 << 20)
FORECAST = Forecast(3 << 30, 2 << 30, step=0.421, epoch=33.0, validation=4.0, total=7200.0, device="cpu")
BUNDLE = {
    "name": "spleen_ct_unet",
    "description": "Segments spleen.",
    "data_source": "spleens",
    "knobs": {"max_epochs": 40, "val_interval": 4, "patch_size": [16, 24, 16]},
    "plan": {"max_epochs": "40 because", "patch_size": "a | b", "loss": "Dice"},
}


def plan(forecast: Forecast = FORECAST, measured: Measurement | None = MEASURED, **request: Any) -> Plan:
    return Plan(BUNDLE, forecast, measured, PlanRequest(**{"memory": 4 << 30, **request}))


def test_what_was_not_measured_has_no_figures() -> None:
    rows = plan(Forecast(3 << 30), None).forecast_rows()
    assert len(rows) == 2
    assert "3.00 GiB" in rows[0][1]
    assert "4.00 GiB" in rows[0][1]
    assert not any(character.isdigit() for character in rows[1][1])


def test_measured_memory_and_times_have_a_row_each() -> None:
    rows = plan().forecast_rows()
    figures = [figure for _, figure in rows]
    assert "2.00 GiB on the CPU" in figures[1]
    assert "0.421 s" in figures[2]
    assert figures[3] == "33 s"
    assert "4 s" in figures[4]
    assert "4 epochs" in figures[4]
    assert rows[5][0].startswith("all 40 ")
    assert "2.0 h" in figures[5]


def test_a_gpu_is_named() -> None:
    rows = plan(replace(FORECAST, device="NVIDIA H200")).forecast_rows()
    assert any("NVIDIA H200" in figure for _, figure in rows)
    assert not any("the CPU" in figure for _, figure in rows)


@pytest.mark.parametrize(("busy", "warned"), [(1.0, False), (1.7, False), (2.34, True)])
def test_a_busy_machine_is_pointed_out(busy: float, warned: bool) -> None:
    rows = plan(measured=replace(MEASURED, busy=busy)).forecast_rows()
    assert any(f"{busy:.1f} times" in figure for _, figure in rows) == warned
    assert len(rows) == (7 if warned else 6)


def test_a_choice_is_a_line_with_its_value_and_its_reason() -> None:
    assert plan().choice_lines() == ["max_epochs = 40: 40 because", "patch_size = [16, 24, 16]: a | b", "loss: Dice"]


def test_the_card_escapes_what_would_break_its_table() -> None:
    text = card(plan())
    assert "| patch_size | `[16, 24, 16]` | a \\| b |" in text
    assert "| loss |  | Dice |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {3, 4}
    assert text.endswith("\n")
    assert "\n\n\n" not in text


@pytest.mark.parametrize("budget", [None, 1800.0])
def test_the_card_names_the_limits_that_it_was_planned_for(budget: float | None) -> None:
    head = card(plan(budget=budget)).partition("```")[0]
    assert "4.00 GiB" in head
    assert ("30 min" in head) == bool(budget)


def test_the_card_shows_how_to_train_on_the_data() -> None:
    commands = card(plan()).split("```")[1].strip().splitlines()
    assert [line.split()[:3] for line in commands] == [
        ["medseg", verb, "spleen_ct_unet"] for verb in ("train", "evaluate")
    ]
    assert all(line.endswith("--data spleens") for line in commands)


def test_a_plan_prints_its_name_choices_and_forecast() -> None:
    made = replace(plan(), root=Path("here"))
    lines = str(made).splitlines()
    assert lines[0] == "spleen_ct_unet in here"
    assert lines[1:4] == made.choice_lines()
    assert len(lines) == 4 + len(made.forecast_rows())


def test_a_plan_as_json_has_no_fingerprint_and_its_record_has() -> None:
    made = plan()
    content = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert content["folder"] is None
    assert content["bundle"] == BUNDLE
    assert content["forecast"]["memory"] == 3 << 30
    assert content["measured"]["step_seconds"] == {"float32": 0.4}
    assert "fingerprint" not in content
    record = json.loads(json.dumps(made.to_json(FOUND), allow_nan=False))
    assert record["fingerprint"]["dataset"] == "spleens"
    assert record["forecast"] == content["forecast"]
    assert plan(measured=None).to_dict()["measured"] is None
    assert replace(made, root=Path("x")).to_dict()["folder"] == "x"


@pytest.mark.parametrize("network", ["UNet", "BANet"])
def test_every_choice_of_a_made_plan_is_on_its_card(network: str) -> None:
    made = make_plan(FOUND, PlanRequest(network=network), compose=compose, probe=None)
    text = card(made)
    assert made.bundle["name"] in text.splitlines()[0]
    for setting in made.bundle["plan"]:
        assert f"| {setting} |" in text
    for value in made.bundle["knobs"].values():
        assert f"`{json.dumps(value)}`" in text
