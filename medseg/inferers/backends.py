"""Inference backends: run a network on windows of a fixed shape eagerly, compiled, or in another engine.

The backends on a CPU:

- "torch" in float32 uses oneDNN for every 3D convolution (torch chooses a slower kernel for single windows with few
  voxels) and computes instance norm as group norm with one channel per group: the same operation in a faster kernel.
- "compile" fuses norms and activations with torch inductor and reorders the weights for oneDNN. Compilation takes up to
  minutes at the first window and needs a C++ compiler.
- "openvino" and "onnxruntime" run an exported copy of the network.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from medseg.errors import MedsegError, RequestError, SizeError, in_a_line
from medseg.extras import require
from medseg.inferers.engines import environment, load_openvino, openvino_core, quiet, without_reports
from medseg.inferers.faster_layers import with_exact_norms, with_faster_layers
from medseg.notices import warn

__all__ = ["BACKENDS", "MEMORY_FORMATS", "PRECISIONS", "accelerate"]

BACKENDS: Final = ("torch", "compile", "openvino", "onnxruntime")
PRECISIONS: Final = ("float32", "bfloat16", "float16")
MEMORY_FORMATS: Final = ("contiguous", "channels_last")

logger = logging.getLogger(__name__)

Runner = Callable[..., Any]


@dataclass(frozen=True)
class _Request:
    """Arguments of `accelerate`."""

    backend: str
    precision: str
    memory_format: str
    window_shape: tuple[int, ...]
    device: torch.device
    cache_dir: Path | None

    @property
    def static_shape(self) -> tuple[int, ...]:
        """Fixed input shape of a compiled network: one large window at a time on a CPU, where batches are no faster."""
        alone = self.device.type == "cpu" and math.prod(self.window_shape[2:]) >= _LARGE_WINDOW
        return (1 if alone else self.window_shape[0], *self.window_shape[1:])

    @property
    def layout(self) -> torch.memory_format:
        if self.memory_format == "contiguous":
            return torch.contiguous_format
        return torch.channels_last_3d if len(self.window_shape) == 5 else torch.channels_last

    def autocast(self) -> torch.autocast:
        dtype = {"float16": torch.float16}.get(self.precision, torch.bfloat16)
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "float32")


_LARGE_WINDOW: Final = 2**16  # voxels
_KEPT: Final = 4  # runners kept per network, for windows of several shapes
_Kept = dict[_Request, tuple[object, Runner]]
_KEPT_RUNNERS: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def accelerate(
    network: nn.Module,
    *,
    backend: str = "torch",
    precision: str = "float32",
    memory_format: str = "contiguous",
    window_shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    cache_dir: Path | str | None = None,
) -> Runner:
    """Return a function that runs a network on windows `(n, C, *roi)`, n up to N, and returns its float32 output.

    The network is not modified. Compiled and exported networks are cached for the lifetime of the network, and rebuilt
    when its weights change.

    Args:
        network: Network in evaluation mode, on `device`.
        backend: One of `BACKENDS`; "openvino" and "onnxruntime" run on the CPU only.
        precision: One of `PRECISIONS`. "bfloat16" uses autocast; "float16" requires CUDA. ONNX Runtime supports
            "float32" only.
        memory_format: One of `MEMORY_FORMATS`, for "torch" and "compile"; the other backends choose their own.
        window_shape: Shape `(N, C, *roi)` of a batch of windows.
        device: Device of the network and the windows.
        cache_dir: Folder where "compile" and "openvino" cache compiled networks for other processes.

    Returns:
        Function without gradients. "torch" passes additional arguments on to the network.

    Raises:
        RequestError: Unknown or unsupported choice, missing package, or a network that cannot be exported.
    """
    request = _Request(
        _chosen("backend", backend, BACKENDS),
        _chosen("precision", precision, PRECISIONS),
        _chosen("memory_format", memory_format, MEMORY_FORMATS),
        tuple(int(n) for n in window_shape),
        torch.device(device),
        None if cache_dir is None else Path(cache_dir),
    )
    _check(network, request)
    if request.backend == "torch" and request.memory_format == "contiguous":
        return _torch(network, request)
    kept = _KEPT_RUNNERS.setdefault(network, {})
    state = _fingerprint(network)
    if request not in kept or kept[request][0] != state:
        runner = _BUILDERS[request.backend](network, request)
        kept.pop(request, None)
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept)))
        kept[request] = (state, runner)
    return kept[request][1]


# Requests


def _chosen(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value in choices:
        return value
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise RequestError(f"invalid {option}={value!r}.{hint} Choose one of {', '.join(map(repr, choices))}.")


def _check(network: nn.Module, request: _Request) -> None:
    shape, cpu = request.window_shape, request.device.type == "cpu"
    if len(shape) not in (4, 5) or min(shape) < 1:
        raise RequestError(
            f"invalid window_shape={shape}; expected (N, C, *roi) with 2 or 3 spatial axes, all at least 1."
        )
    engine = request.backend in ("openvino", "onnxruntime")
    if engine and not cpu:
        raise RequestError(
            f"backend={request.backend!r} runs on the CPU only, not on {request.device}. Choose 'torch' or 'compile'."
        )
    if request.precision == "float16" and cpu:
        raise RequestError("precision='float16' requires CUDA. Choose 'bfloat16' or 'float32' on the CPU.")
    if request.backend == "onnxruntime" and request.precision != "float32":
        raise RequestError(
            f"backend='onnxruntime' supports float32 only, not {request.precision}. Choose 'openvino', 'compile' or "
            "'torch'."
        )
    if network.training and request.backend != "torch":
        raise RequestError(
            f"{type(network).__name__} is in training mode, which backend={request.backend!r} does not support. Call "
            "network.eval() first."
        )


def _fingerprint(network: nn.Module) -> tuple[object, ...]:
    """Return a key that changes with the weights, even if modified outside autograd, and with the thread count."""
    tensors = (*network.parameters(), *network.buffers())
    return torch.get_num_threads(), *((t.data_ptr(), tuple(t.shape), t.dtype, _checksum(t)) for t in tensors)


def _checksum(tensor: Tensor) -> int:
    # As bytes, since NumPy has no bfloat16.
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# torch


def _torch(network: nn.Module, request: _Request) -> Runner:
    if request.device.type == "cpu" and request.precision == "float32":
        network = with_faster_layers(network)
    if request.memory_format != "contiguous":
        network = _laid_out(network, request.layout)

    def run(windows: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Not inference mode, whose tensors cannot be modified in place outside of it.
        with torch.no_grad(), request.autocast():
            return _as_float(network(_plain(windows).contiguous(memory_format=request.layout), *args, **kwargs))

    return run


def _laid_out(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    own = copy.deepcopy(network)
    for parameter in own.parameters():
        if parameter.dim() == (5 if layout == torch.channels_last_3d else 4):
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return own


# torch.compile


def _compile(network: nn.Module, request: _Request) -> Runner:
    """Compile and run once; if compilation fails, warn and run the network eagerly."""
    eager = _torch(network, request)
    own = copy.deepcopy(network) if request.memory_format == "contiguous" else _laid_out(network, request.layout)
    # Freezing reorders the weights for oneDNN once; on a GPU it would only double their memory.
    compiled = torch.compile(own, dynamic=False, options={"freezing": request.device.type == "cpu"})

    def run(windows: Tensor) -> Any:
        with torch.no_grad(), request.autocast():
            return _as_float(compiled(windows.contiguous(memory_format=request.layout)))

    try:
        with quiet(), environment("TORCHINDUCTOR_CACHE_DIR", request.cache_dir):
            run(torch.zeros(request.static_shape, device=request.device))
    except (MedsegError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = f"compilation failed, {type(network).__name__} runs uncompiled ({in_a_line(error)})"
        warn(logger, "backend-fallback", f"{text}; compilation needs a C++ compiler (g++ or clang)", run=True)
        return eager
    return _static(run, request)


# Other engines


def _openvino(network: nn.Module, request: _Request) -> Runner:
    openvino = load_openvino()
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[request.precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned threads of two processes would share cores while other cores idle.
        "ENABLE_CPU_PINNING": False,
    }
    if request.cache_dir is not None:
        config["CACHE_DIR"] = str(request.cache_dir)
    with _exporting(network, request), without_reports():
        # Not as group norm, on which version 2026.4 crashes for some networks.
        model = openvino.convert_model(_exported(with_exact_norms(network), request))
        model.reshape(list(request.static_shape))
        compiled = openvino_core().compile_model(model, "CPU", config)
    infer = compiled.create_infer_request()
    shape = tuple(compiled.output(0).shape)

    def run(windows: Tensor) -> Tensor:
        # OpenVINO shares the memory of both tensors, so they must stay alive until it has finished.
        given, result = windows.contiguous(), torch.empty(shape)
        infer.set_input_tensor(openvino.Tensor(given.numpy(), shared_memory=True))
        infer.set_output_tensor(openvino.Tensor(result.numpy(), shared_memory=True))
        infer.infer()
        return result

    return _static(run, request)


def _onnxruntime(network: nn.Module, request: _Request) -> Runner:
    for needed in ("onnx", "onnxscript"):
        require(needed, "The backend onnxruntime")
    runtime = require("onnxruntime", "The backend onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    with _exporting(network, request), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        program: Any = torch.onnx.export(_exported(network, request), dynamo=True, verbose=False)
        program.save(path)
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(windows: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: windows.contiguous().numpy()})[0])

    return _static(run, request)


_BUILDERS: Final[dict[str, Callable[[nn.Module, _Request], Runner]]] = {
    "torch": _torch,
    "compile": _compile,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}


def _exported(network: nn.Module, request: _Request) -> torch.export.ExportedProgram:
    example = torch.zeros(request.static_shape)
    with torch.no_grad():
        return torch.export.export(network, (example,))


@contextmanager
def _exporting(network: nn.Module, request: _Request) -> Iterator[None]:
    """Silence exporters and convert their exceptions to a one-line error."""
    try:
        with quiet():
            yield
    except MedsegError:
        raise
    except Exception as error:
        raise RequestError(
            f"{type(network).__name__} cannot be exported for backend={request.backend!r}: {in_a_line(error)}. Choose "
            "backend='torch'."
        ) from error


def _static(run: Callable[[Tensor], Any], request: _Request) -> Runner:
    """Wrap a function with a fixed input shape for any number of windows."""
    shape = request.static_shape

    def runner(windows: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            raise RequestError(
                f"backend={request.backend!r} does not support additional network arguments: choose 'torch'."
            )
        windows = _plain(windows)
        if tuple(windows.shape[1:]) != shape[1:]:
            raise SizeError(f"Window shape mismatch: found {tuple(windows.shape[1:])}, expected {shape[1:]}.")
        parts = [run(_filled(part, shape[0])) for part in torch.split(windows.float(), shape[0])]
        return parts[0][: len(windows)] if len(parts) == 1 else torch.cat(parts)[: len(windows)]

    return runner


def _filled(windows: Tensor, count: int) -> Tensor:
    if len(windows) == count:
        return windows
    return torch.cat([windows, windows.new_zeros(count - len(windows), *windows.shape[1:])])


# Small helpers


def _plain(windows: Tensor) -> Tensor:
    return windows.as_tensor() if isinstance(windows, MetaTensor) else windows


def _as_float(output: Any) -> Any:
    return output.float() if isinstance(output, Tensor) else output
