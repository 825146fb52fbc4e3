"""MONAI without medseg: a bundle in the style of the model zoo, run by MONAI's workflow.

"monai" resamples in float64, the default of `Spacingd`; "monai32" in float32. Everything else that is not a setting of
the task (spacing, intensities, windows, network, weights) is MONAI's default too, among it the float32 of `SaveImaged`.
One window at a time and no loader process, which is the fastest and smallest here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import itk
import monai.bundle
import monai.transforms
import nibabel
import numpy as np
import torch
from PIL import Image

from side_by_side.sample import Phases, import_targets

# LoadImaged creates every reader; these packages import submodules on first use.
LOADED_BY_MONAI = (itk.imread, nibabel.load, Image.init)


def import_all(request: dict[str, Any]) -> None:
    """Import the modules of the config, and write the config."""
    torch.set_num_threads(request["threads"])
    config = zoo_config(request)
    import_targets(config)
    Path(request["output"]).mkdir(parents=True, exist_ok=True)
    _config_file(request).write_text(json.dumps(config, indent=1), encoding="utf-8")


def work(request: dict[str, Any], phases: Phases) -> None:
    """Run the config as `python -m monai.bundle run_workflow` does."""
    for transform in _transforms(request):
        phases.watch(getattr(monai.transforms, transform), "__call__", transform)
    phases.watch(monai.inferers.SlidingWindowInferer, "__call__", "SlidingWindowInferer")
    if request.get("margin"):
        _keep_margin(request["margin"])
    workflow = monai.bundle.ConfigWorkflow(str(_config_file(request)), workflow_type="infer", logging_file=False)
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def zoo_config(request: dict[str, Any]) -> dict[str, Any]:
    """Return the inference config of one request."""
    knobs = request["settings"]
    return {
        "imports": ["$import torch"],
        "device": "$torch.device('cpu')",
        "network_def": knobs["network_def"],
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "monai.transforms.Compose", "transforms": _before(request)},
        "dataset": {
            "_target_": "monai.data.Dataset",
            "data": [{"image": request["image"]}],
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "monai.data.DataLoader", "dataset": "@dataset", "batch_size": 1, "shuffle": False},
        "inferer": {
            "_target_": "monai.inferers.SlidingWindowInferer",
            **{name: knobs[name] for name in ("roi_size", "sw_batch_size", "overlap")},
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "monai.transforms.Compose", "transforms": _after(request)},
        "handlers": [
            {
                "_target_": "monai.handlers.CheckpointLoader",
                "load_path": request["weights"],
                "load_dict": {"model": "@network"},
            }
        ],
        "evaluator": {
            "_target_": "monai.engines.SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "initialize": [],
        "run": ["$@evaluator.run()"],
        "finalize": [],
    }


def _before(request: dict[str, Any]) -> list[dict[str, Any]]:
    knobs = request["settings"]
    spacing = {"pixdim": knobs.get("spacing"), "mode": "bilinear"}
    if request["contestant"] == "monai32":
        spacing["dtype"] = "$torch.float32"
    steps = [("LoadImaged", {}), ("EnsureChannelFirstd", {})]
    if request["kind"] != "RGB":
        steps += [("Orientationd", {"axcodes": "RAS"}), ("Spacingd", spacing)]
    if request["kind"] == "MR":
        steps += [("NormalizeIntensityd", {"channel_wise": True})]
    else:
        low, high = knobs["intensity_range"]
        bottom = -1.0 if request["kind"] == "RGB" else 0.0
        steps += [("ScaleIntensityRanged", {"a_min": low, "a_max": high, "b_min": bottom, "b_max": 1.0, "clip": True})]
    return [_step(name, "image", options) for name, options in [*steps, ("EnsureTyped", {})]]


def _after(request: dict[str, Any]) -> list[dict[str, Any]]:
    invert = {"transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False, "to_tensor": True}
    save: dict[str, Any] = {"output_dir": request["output"]}
    if request["kind"] == "RGB":
        save |= {"output_ext": ".png", "output_dtype": "$torch.uint8", "resample": False}
    steps: list[tuple[str, dict[str, Any]]] = [("Activationsd", {"softmax": True})]
    if request["kind"] != "RGB":
        steps += [("Invertd", invert)]
    steps += [("AsDiscreted", {"argmax": True}), ("SaveImaged", save)]
    return [_step(name, "pred", options) for name, options in steps]


def _step(name: str, key: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": f"monai.transforms.{name}", "keys": key, **options}


def _transforms(request: dict[str, Any]) -> list[str]:
    return [step["_target_"].rpartition(".")[2] for step in _before(request) + _after(request)]


def _config_file(request: dict[str, Any]) -> Path:
    return Path(request["output"]) / "inference.json"


def _keep_margin(path: str) -> None:
    """Write the margin of the best class before the argmax, in an untimed run."""
    inner = monai.transforms.AsDiscreted.__call__

    def keeping(self: Any, data: Any) -> Any:
        scores = data["pred"].as_tensor()
        margin = np.lib.format.open_memmap(path, "w+", np.float32, tuple(scores.shape[1:]))
        for plane in range(scores.shape[1]):
            best = scores[:, plane].float().topk(2, dim=0).values
            margin[plane] = (best[0] - best[1]).numpy()
        margin.flush()
        return inner(self, data)

    monai.transforms.AsDiscreted.__call__ = keeping
