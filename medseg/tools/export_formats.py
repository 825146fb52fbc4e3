"""Writers and readers of the formats of `medseg export`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import in_a_line
from medseg.extras import EXTRAS, installed, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from torch import Tensor, nn

    Run = Callable[[Tensor], Tensor]

__all__ = ["FORMATS", "READERS", "WRITERS", "Shapes", "missing_packages"]

# Suffix and required optional packages of each format.
FORMATS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "ts": (".ts", ()),
    "onnx": (".onnx", EXTRAS["onnx"]),
    "pt2": (".pt2", ()),
    "openvino": (".xml", EXTRAS["openvino"]),
}


def missing_packages(file_format: str) -> tuple[str, ...]:
    """Return the packages that a format needs and that are not installed."""
    return tuple(name for name in FORMATS[file_format][1] if not installed(name))


@dataclass(frozen=True)
class Shapes:
    """Valid input shapes of the network `(B, C, *spatial)`.

    Attributes:
        example: Shape for tracing.
        other: Shape of another size, for verification.
        window: Shape of the bundle's sliding window.
    """

    example: tuple[int, ...]
    other: tuple[int, ...]
    window: tuple[int, ...]


# Writers: each returns the dynamic axes of the input


def _write_ts(network: nn.Module, shapes: Shapes, path: Path, notes: Mapping[str, str], half: bool) -> str:
    """Script the network, for inputs of any size. The notes are extra files, as MONAI reads them."""
    import torch

    scripted = torch.jit.script(network)
    torch.jit.save(scripted, str(path), _extra_files=dict(notes))
    return "batch and size"


def _write_pt2(network: nn.Module, shapes: Shapes, path: Path, notes: Mapping[str, str], half: bool) -> str:
    import torch

    program, free = _program(network, shapes)
    torch.export.save(program, path, extra_files=dict(notes))
    return free


def _write_onnx(network: nn.Module, shapes: Shapes, path: Path, notes: Mapping[str, str], half: bool) -> str:
    import torch

    program, free = _program(network, shapes)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["pred"]}
    exported: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    for node in exported.model.graph:
        # Contains source paths of this machine.
        node.metadata_props.clear()
    exported.model.metadata_props.update(notes)
    exported.save(path)
    return free


def _write_openvino(network: nn.Module, shapes: Shapes, path: Path, notes: Mapping[str, str], half: bool) -> str:
    from medseg.inferers.engines import load_openvino, without_reports
    from medseg.inferers.faster_layers import with_exact_norms

    openvino = load_openvino()
    # Instance norms are replaced as in the OpenVINO backend.
    program, free = _program(with_exact_norms(network), shapes)
    with without_reports():
        model = openvino.convert_model(program)
    for name, text in notes.items():
        model.set_rt_info(text, ["medseg", name.removesuffix(".json")])
    openvino.save_model(model, path, compress_to_fp16=False)
    return free


def _program(network: nn.Module, shapes: Shapes) -> tuple[torch.export.ExportedProgram, str]:
    """Export with dynamic batch and size, else with dynamic batch, else with fixed shape."""
    import torch

    ways: dict[str, Iterable[int]] = {"batch and size": range(len(shapes.example)), "batch": (0,), "": ()}
    for free, axes in ways.items():
        example = torch.zeros(shapes.example if free == "batch and size" else (2 if free else 1, *shapes.window[1:]))
        dims = {axis: torch.export.Dim.DYNAMIC for axis in axes if axis != 1}
        try:
            with torch.no_grad():
                return torch.export.export(network, (example,), dynamic_shapes=(dims,)), free
        except Exception as error:
            if not free:
                raise
            logging.getLogger(__name__).info("not for any %s: %s", free, in_a_line(error))
    raise AssertionError


WRITERS: Final[dict[str, Callable[[nn.Module, Shapes, Path, Mapping[str, str], bool], str]]] = {
    "ts": _write_ts,
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "openvino": _write_openvino,
}

# Readers


def _read_ts(path: Path) -> Run:
    import torch

    network: Any = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return lambda x: network(x)


def _read_pt2(path: Path) -> Run:
    import torch

    module = torch.export.load(path).module()
    return lambda x: module(x)


def _read_onnx(path: Path) -> Run:
    import torch

    runtime = require("onnxruntime", "Format onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["pred"], {"image": x.numpy()})[0])


def _read_openvino(path: Path) -> Run:
    import torch

    from medseg.inferers.engines import openvino_core

    compiled = openvino_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


READERS: Final[dict[str, Callable[[Path], Run]]] = {
    "ts": _read_ts,
    "onnx": _read_onnx,
    "pt2": _read_pt2,
    "openvino": _read_openvino,
}
