"""nnU-Net 2's predictor with medseg's network, in a separate environment (see `benchmarks/README.md`).

Given: network and weights, window size, overlap, model spacing, the intensity window as the parameters of
`CTNormalization`. Its own: reading, resampling, windows, blending, restoring, writing, by
`predict_from_files_sequential`, which starts no further processes. No mirroring. Two choices in its favor: it resamples
the image linearly, as the others do, not by its cubic splines; and, as it keeps the axes of the file where the others
turn the image to RAS, the kernels are mirrored and transposed, which costs nothing at run time.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

import nibabel
import nnunetv2.inference.predict_from_raw_data as predictor_module
import numpy as np
import torch
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from side_by_side.sample import Phases, import_targets

READERS = {".png": NaturalImage2DIO, ".gz": SimpleITKIO}


def import_all(request: dict[str, Any]) -> None:
    """Import the network's module, and the modules that nnU-Net looks up by name."""
    torch.set_num_threads(request["threads"])
    import_targets(request["settings"]["network_def"])
    manager = PlansManager(plans(request))
    configuration = manager.get_configuration("benchmark")
    for name in ("preprocessor_class", "resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        getattr(configuration, name)
    manager.get_label_manager(dataset(request))
    Path(request["output"]).mkdir(parents=True, exist_ok=True)


def work(request: dict[str, Any], phases: Phases) -> None:
    """Predict one image."""
    phases.watch(DefaultPreprocessor, "run_case", "run_case")
    phases.watch(predictor_module.nnUNetPredictor, "predict_logits_from_preprocessed_data", "predict_logits")
    phases.watch(predictor_module, "export_prediction_from_logits", "export_prediction")
    manager = PlansManager(plans(request))
    image = Path(request["image"])
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = predictor_module.nnUNetPredictor(
            tile_step_size=1 - request["settings"]["overlap"],
            use_gaussian=True,
            use_mirroring=False,
            device=torch.device("cpu"),
            allow_tqdm=False,
        )
        network = turned_network(request)
        predictor.manual_initialization(
            network=network,
            plans_manager=manager,
            configuration_manager=manager.get_configuration("benchmark"),
            parameters=[network.state_dict()],
            dataset_json=dataset(request),
            trainer_name="nnUNetTrainer",
            inference_allowed_mirroring_axes=None,
        )
        predictor.predict_from_files_sequential([[str(image)]], [str(Path(request["output"]) / "mask")])


def plans(request: dict[str, Any]) -> dict[str, Any]:
    """Return the plans of one request, with axes in nnU-Net's order (slowest first)."""
    settings, flat = request["settings"], request["kind"] == "RGB"
    low, high = settings.get("intensity_range", (0.0, 1.0))
    middle, width = ((low + high) / 2, (high - low) / 2) if flat else (low, high - low)
    bounds = {"percentile_00_5": low, "percentile_99_5": high, "mean": middle, "std": width}
    channels = range(settings["network_def"]["in_channels"])
    normalization = "ZScoreNormalization" if request["kind"] == "MR" else "CTNormalization"
    linear = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 1,
        "patch_size": settings["roi_size"][:: 1 if flat else -1],
        "spacing": [1.0, 1.0] if flat else settings["spacing"][::-1],
        "normalization_schemes": [normalization for _ in channels],
        "use_mask_for_norm": [False for _ in channels],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": linear,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**linear, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": linear,
        "architecture": {"network_class_name": "given", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    axes = [0, 1, 2]
    return {
        "dataset_name": "benchmark",
        "plans_name": "benchmark",
        "image_reader_writer": READERS[Path(request["image"]).suffix].__name__,
        "transpose_forward": axes,
        "transpose_backward": axes,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): bounds for channel in channels},
        "configurations": {"benchmark": configuration},
    }


def dataset(request: dict[str, Any]) -> dict[str, Any]:
    """Return the content of nnU-Net's `dataset.json`."""
    image, network = Path(request["image"]), request["settings"]["network_def"]
    labels = {"background": 0, **{f"class {n}": n for n in range(1, network["out_channels"])}}
    return {
        "channel_names": {str(channel): "CT" for channel in range(network["in_channels"])},
        "labels": labels,
        "file_ending": image.suffix if image.suffix == ".png" else ".nii.gz",
    }


def turned_network(request: dict[str, Any]) -> Any:
    """Return the network with kernels permuted to the axes of the file, slowest first."""
    definition = dict(request["settings"]["network_def"])
    module, _, name = definition.pop("_target_").rpartition(".")
    network = getattr(importlib.import_module(module), name)(**definition).eval()
    state = torch.load(request["weights"], map_location="cpu", weights_only=True)
    network.load_state_dict({key: turned(value, request["image"]) for key, value in state.items()})
    return network


def turned(kernel: torch.Tensor, image: str) -> torch.Tensor:
    """Permute a kernel from RAS to the axes of the file, slowest first; for a 2D image, from (x, y) to (y, x)."""
    if kernel.ndim == 4:
        return kernel.transpose(2, 3).contiguous()
    if kernel.ndim != 5:
        return kernel
    turns = nibabel.io_orientation(nibabel.load(image).affine)
    if not np.array_equal(turns[:, 0], [0, 1, 2]):
        raise SystemExit(f"nnU-Net: the axes of {image} are not in the order x, y, z")
    mirrored = [axis + 2 for axis in range(3) if turns[axis, 1] < 0]
    return kernel.flip(mirrored).permute(0, 1, 4, 3, 2).contiguous()
