"""A bundle that is well-formed and whose masks would not lie on their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.build import build
from medseg.errors import RequestError
from medseg.jobs.job import build_evaluator, open_workflow, prepare
from medseg.networks import UNet
from medseg.training.checkpoint import save_tensors

DEFORMATION = {
    "_target_": "monai.transforms.GridDistortiond",
    "keys": "image",
    "num_cells": 2,
    "distort_steps": [[0.9, 1.0, 1.1]] * 3,
}


@pytest.mark.parametrize(("command", "kind"), [("predict", "infer"), ("evaluate", "train")])
def test_a_deformation_in_the_preprocessing_is_refused_with_the_reason(
    command: str, kind: str, make_bundle: Any, tiny_source: dict[str, Any], tmp_path: Path
) -> None:
    bundle = make_bundle({**tiny_source, "name": "bent_mri_unet", "blocks": {"intensity": [DEFORMATION]}})
    arguments = {name: value for name, value in tiny_source["network_def"].items() if name != "_target_"}
    bundle.weights.parent.mkdir()
    save_tensors(UNet(**arguments).state_dict(), bundle.weights)
    build(bundle)
    workflow = open_workflow(prepare(command, bundle, {}, paths={"output_dir": str(tmp_path)}), kind, ())
    with pytest.raises(RequestError, match="GridDistortiond in the preprocessing cannot be inverted"):
        build_evaluator(workflow)
