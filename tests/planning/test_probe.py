"""The preflight in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.bundle.compose import compose
from medseg.errors import RequestError
from medseg.io import find_dataset
from medseg.planning import probe
from medseg.planning.fingerprint import take_fingerprint
from medseg.planning.plan import make_plan
from medseg.planning.probe import Measurement, measure
from medseg.planning.request import PlanRequest

SMALL = {"patch_size": [16, 16, 16], "device_name": "cpu"}


def config_of(root: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    found = take_fingerprint(root)
    plan = make_plan(found, PlanRequest(settings=settings), compose=compose, probe=None)
    bundle = {**plan.bundle, "network_def": {**plan.bundle["network_def"], "features": [4, 8, 8], "strides": None}}
    del bundle["network_def"]["strides"]
    return compose(bundle)["train"], find_dataset(root, "train")[0]


def test_a_step_and_a_window_are_measured(volumes: Any) -> None:
    root = volumes(shapes=((20, 24, 20),) * 3)
    found = measure(*config_of(root, SMALL))
    assert set(found.step_seconds) == {"float32", "bfloat16"}
    assert all(0 < seconds < 60 for seconds in found.step_seconds.values())
    assert found.device == "cpu"
    assert min(found.draw_seconds, found.load_seconds, found.window_seconds) > 0
    assert found.program_bytes > 100 << 20
    assert found.step_bytes >= 0
    assert found.fits


def test_a_case_that_cannot_be_used_is_told_in_our_words(volumes: Any) -> None:
    root = volumes(shapes=((20, 24, 20),) * 3)
    config, case = config_of(root, SMALL)
    with pytest.raises(RequestError, match=r"failed: .*missing\.nii\.gz"):
        measure(config, {**case, "image": str(root / "missing.nii.gz")})


def test_bfloat16_has_to_save_a_fifth() -> None:
    def faster(share: float) -> str:
        return Measurement("cpu", 2, {"float32": 1.0, "bfloat16": share}, 0.0, 0.0, 0.0, 0, 0).precision

    assert [faster(share) for share in (0.5, 0.79, 0.81, 2.0)] == ["bfloat16", "bfloat16", "float32", "float32"]


def answered(monkeypatch: pytest.MonkeyPatch, *, code: int = 0, answer: Any = None, stderr: str = "") -> list[Any]:
    """Let the process of the probe end with `code` after it wrote `answer`; return the tasks that it was given."""
    tasks: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        tasks.append(json.loads(Path(command[-2]).read_text()))
        if answer is not None:
            Path(command[-1]).write_text(json.dumps(answer))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return tasks


def test_the_answer_of_the_process_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Measurement("cpu", 2, {"float32": 0.5}, 0.1, 0.2, 0.3, 7, 8, workers=2, busy=1.25)
    tasks = answered(monkeypatch, answer=asdict(expected))
    assert measure({"patch_size": [8, 8]}, {"image": "a", "label": "b"}) == expected
    assert tasks[0]["config"] == {"patch_size": [8, 8]}
    assert tasks[0]["case"] == {"image": "a", "label": "b"}
    assert not Path(tasks[0]["folder"]).exists()


@pytest.mark.parametrize("code", [-9, 137])
def test_a_process_killed_for_memory_does_not_fit(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, code=code)
    found = measure({}, {})
    assert not found.fits
    assert found.step_seconds == {}
    assert (found.step_bytes, found.program_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("code", "stderr", "said"), [(-11, "", "-11"), (1, "Traceback\n  line\nKeyError: 'loss'\n\n", "KeyError: 'loss'")]
)
def test_any_other_end_is_an_error_with_its_code(
    code: int, stderr: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(monkeypatch, code=code, stderr=stderr)
    with pytest.raises(RequestError, match=str(code)) as error:
        measure({}, {})
    assert said in str(error.value)
    assert "Traceback" not in str(error.value)


def test_an_error_that_the_process_wrote_down_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, answer={"error": "scan_7.nii.gz is damaged"})
    with pytest.raises(RequestError, match=r"scan_7\.nii\.gz is damaged"):
        measure({}, {})


def test_a_step_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def run(command: list[str], *, timeout: float, **options: Any) -> None:
        limits.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RequestError, match="--memory") as error:
        measure({}, {})
    assert f"{limits[0] // 60} min" in str(error.value)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (MemoryError(), 137, None),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), 137, None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 137, None),
        (RequestError("no case of this name"), 0, "no case of this name"),
        (RuntimeError("shapes differ\nin a long story"), 0, "shapes differ"),
    ],
)
def test_the_process_turns_errors_into_its_answer(
    raised: Exception, code: int, said: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(task: Any) -> Measurement:
        raise raised

    monkeypatch.setattr(probe, "_probe", fail)
    task, answer = tmp_path / "task.json", tmp_path / "answer.json"
    task.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["probe", str(task), str(answer)])
    assert probe._main() == code
    assert answer.exists() == (said is not None)
    if said is not None:
        text = json.loads(answer.read_text())["error"]
        assert said in text
        assert "\n" not in text


class Parsed:
    """A config of one linear layer, as the probe reads it."""

    def __init__(self, scale: float = 1.0) -> None:
        network = torch.nn.Conv2d(1, 1, 1)
        self.seen: list[tuple[int, ...]] = []
        self.content = {
            "training_network": network,
            "network": network,
            "loss": lambda logits, label: scale * (logits - label).square().mean(),
            "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
            "roi_size": [6, 4],
            "validate::inferer": lambda image, network: self.seen.append(tuple(image.shape)),
        }

    def get_parsed_content(self, name: str) -> Any:
        return self.content[name]


BATCH = {"image": torch.ones(2, 1, 8, 8), "label": torch.zeros(2, 1, 8, 8)}
CPU = torch.device("cpu")


def test_timed_steps_train_the_network() -> None:
    parser = Parsed()
    before = parser.content["network"].weight.detach().clone()
    seconds, used = probe._time_steps(parser, BATCH, CPU)
    assert 0 < seconds < 10
    assert used >= 0
    assert not torch.equal(parser.content["network"].weight, before)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(scale: float) -> None:
    with pytest.raises(RequestError, match="nan"):
        probe._time_steps(Parsed(scale), BATCH, CPU)


def test_a_window_is_timed_by_the_inferer_of_the_config_at_its_size() -> None:
    parser = Parsed()
    assert 0 < probe._time_window(parser, BATCH, CPU) < 10
    assert set(parser.seen) == {(1, 1, 6, 4)}
    assert not parser.content["network"].training


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_batch_is_filled_from_the_drawn_patches_in_turn(count: int) -> None:
    drawn = [{"image": torch.full((1, 2), float(number))} for number in range(3)]
    batch = probe._collated(drawn, count)
    assert batch["image"][:, 0, 0].tolist() == [float(number % 3) for number in range(count)]
