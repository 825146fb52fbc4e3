"""The preflight in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

from medseg.bundle.compose import compose
from medseg.errors import RequestError
from medseg.io import find_dataset
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
