"""Small functions for configs, in place of the `$` expressions that other bundles use.

With them a shipped config is declarative: it has only callables, arguments and references.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medseg.bundle.weight_files import weights_problem
from medseg.errors import RequestError, WeightsError
from medseg.files import load_json
from medseg.types import TransferNetwork

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

__all__ = [
    "identity",
    "inside",
    "load_state",
    "load_weights",
    "on_device",
    "parameters",
    "read_state",
    "run",
    "select_device",
    "start_from",
]

logger = logging.getLogger(__name__)


def select_device(name: str = "auto") -> torch.device:
    """Return the torch device of a name; `auto` is the first CUDA device, or the CPU without one.

    Raises:
        RequestError: Unknown name, or a device that is not available.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"Unknown device '{name}': expected auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"Device '{name}' is not available: torch finds {torch.cuda.device_count()} CUDA devices. Use auto or cpu."
        )
    return device


def inside(root: str, path: str) -> str:
    """Return a path inside the folder `root`.

    Raises:
        RequestError: A path outside the folder.
    """
    folder = Path(root)
    target = folder / path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise RequestError(f"'{path}' is outside the folder '{root}': expected a path inside it.")
    return str(target)


def identity(value: Any) -> Any:
    """Return the value unchanged; it lets a list of components refer to one that is defined elsewhere in the config."""
    return value


def on_device(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a network to a device and return it."""
    return network.to(device)


def parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """Return the parameters of a network, for an optimizer."""
    return network.parameters()


def run(engine: Any) -> None:
    """Run a MONAI engine."""
    engine.run()


def load_weights(network: nn.Module, path: str, bundle_root: str | None = None) -> None:
    """Load a state dict into a network, without executing code from the file.

    Args:
        network: Network whose parameters and buffers the file must match exactly.
        path: File written by `torch.save(network.state_dict(), ...)`.
        bundle_root: Folder of the bundle, whose `configs/metadata.json` may list the SHA-256 of the file to verify.

    Raises:
        WeightsError: A file that is missing, altered, contains anything but tensors, or is of another network.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"No weights at '{path}': train the bundle first, or pass --set weights=FILE.")
    content = file.read_bytes()
    expected = _expected_hash(file, bundle_root)
    found = hashlib.sha256(content).hexdigest()
    if expected is not None and found != expected:
        raise WeightsError(
            f"Checksum mismatch: '{path}' has SHA-256 {found}, but the bundle's metadata lists {expected}. The file "
            f"was altered or replaced; if you replaced it, run `medseg bundle build {bundle_root}`."
        )
    load_state(network, read_state(content, path), path)


def start_from(network: nn.Module, path: str, *, resume: bool = False, cat_order: str | None = None) -> str:
    """Initialize a network with pretrained weights before its training.

    The weights must be those of the same network. A network with a method `transfer` (see
    `medseg.types.TransferNetwork`) also accepts those of another network, as in the pre-training of its paper.

    Args:
        network: Network to initialize, in place.
        path: File written by `torch.save(network.state_dict(), ...)`; empty for no pretrained weights.
        resume: Whether the training is resumed; then the weights come from its saved state and `path` is ignored.
        cat_order: Order in which the other network concatenates its features, "up_first" or "skip_first", if it is
            not its default.

    Returns:
        Summary of the tensors that were copied; empty if there were none.

    Raises:
        WeightsError: A file that is missing, contains anything but tensors, or does not match the network.
    """
    if not path or resume:
        return ""
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"No pretrained weights at '{path}' to start from: pass --set pretrained=FILE, or omit it.")
    state = read_state(file.read_bytes(), path)
    if isinstance(network, TransferNetwork) and set(state) != set(network.state_dict()):
        try:
            taken = str(network.transfer(state, cat_order=cat_order))
        except WeightsError as error:
            raise WeightsError(f"'{path}': {error}") from error
    else:
        load_state(network, state, path)
        taken = f"all {len(state)} tensors copied"
    note = f"started from {file.name}: {taken}"
    logger.info(note)
    return note


def _expected_hash(file: Path, bundle_root: str | None) -> str | None:
    if bundle_root is None:
        return None
    metadata = Path(bundle_root) / "configs" / "metadata.json"
    if not metadata.is_file() or not file.resolve().is_relative_to(Path(bundle_root).resolve()):
        return None
    name = file.resolve().relative_to(Path(bundle_root).resolve()).as_posix()
    try:
        listed: str | None = load_json(metadata).get("weights", {}).get(name, {}).get("sha256")
    except AttributeError as error:
        raise WeightsError(
            f"Malformed entry 'weights' in '{metadata}': expected an object of file names with their sha256."
        ) from error
    return listed


def read_state(content: bytes, path: str) -> Mapping[str, torch.Tensor]:
    """Read a state dict without executing code from the file.

    Args:
        content: Content of a file written by `torch.save`: a state dict, or an object with one under `model` or
            `state_dict`.
        path: Path of the file, for messages.

    Raises:
        WeightsError: Content that is unreadable, or has anything but tensors.
    """
    try:
        problem = _size_problem(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about unusual pickles, which are refused below
            state = None if problem else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"'{path}' contains more than tensors and was not loaded, because it could run code. If you trust its "
            "source, save only its state dict: torch.save(network.state_dict(), FILE)."
        ) from error
    except Exception as error:  # torch raises many types on damaged files
        raise WeightsError(
            f"'{path}' is not a readable weight file ({type(error).__name__}): it may be damaged or cut off."
        ) from error
    if problem:
        raise WeightsError(
            f"'{path}' was not loaded: it is {problem}. Save its state dict again: torch.save(network.state_dict(), "
            "FILE)."
        )
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise WeightsError(f"'{path}' contains {type(state).__name__}, expected a state dict of names and tensors.")
    if odd := [name for name, tensor in state.items() if not _is_plain(tensor)]:
        raise WeightsError(
            f"Unsupported tensor {odd[0]!r} in '{path}': it is sparse, quantized, complex, without data, or larger "
            "than its storage. Expected dense tensors."
        )
    return state


def _size_problem(content: bytes) -> str:
    """Return why torch must not read a file, see `weights_problem`; formats before torch 1.6 are never compressed."""
    file = io.BytesIO(content)
    if not content.startswith(b"PK"):
        return ""
    with zipfile.ZipFile(file) as archive:
        return weights_problem(archive, len(content))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is dense, real, and no larger than its data in the file."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return False
    return not tensor.is_complex() and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], path: str) -> None:
    """Load a state dict into a network, which it must match exactly.

    Args:
        network: Network to load into; unchanged in case of an error.
        state: Tensors by name.
        path: Path of the file they come from, for messages.

    Raises:
        WeightsError: Missing or unexpected tensors, or tensors of another shape.
    """
    own = network.state_dict()
    faults = [f"missing {name}" for name in own if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in own]
    faults += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        shown = "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
        raise WeightsError(
            f"'{path}' is of another network than {type(network).__name__} of this bundle: {len(faults)} tensors do "
            f"not match ({shown})."
        )
    network.load_state_dict(dict(state))
