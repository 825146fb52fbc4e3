"""The small functions that our configs call where other bundles write a `$` expression.

They exist so that a shipped config is pure data: which callable, which arguments, which references.
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
    """Return the torch device of that name; `auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        RequestError: the name is unknown or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device '{name}' is not there: {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return device


def inside(root: str, path: str) -> str:
    """Return `path` within the folder `root`.

    Raises:
        RequestError: the path leads out of the folder.
    """
    folder = Path(root)
    target = folder / path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise RequestError(f"'{path}' leads out of '{root}'; give a path inside it")
    return str(target)


def identity(value: Any) -> Any:
    """Return the value: an entry of a list of components that is named, and referred to, outside the list."""
    return value


def on_device(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Return the network with its weights on the device."""
    return network.to(device)


def parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """Return the network's parameters, as optimizers take them."""
    return network.parameters()


def run(engine: Any) -> None:
    """Run a MONAI engine."""
    engine.run()


def load_weights(network: nn.Module, path: str, bundle_root: str | None = None) -> None:
    """Load a plain state dict into the network, without running code of the file.

    Args:
        network: where every tensor must find its place.
        path: file written by `torch.save(network.state_dict(), ...)`.
        bundle_root: where `configs/metadata.json` names the expected SHA-256 of this file, if it does.

    Raises:
        WeightsError: the file is missing, altered, holds anything but tensors, or is of another network.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"no weights at '{path}': train the bundle first, or give --set weights=FILE")
    content = file.read_bytes()
    expected = _expected_hash(file, bundle_root)
    found = hashlib.sha256(content).hexdigest()
    if expected is not None and found != expected:
        raise WeightsError(
            f"'{path}' has SHA-256 {found}, but the bundle's metadata expects {expected}: the file was altered or "
            f"replaced. If you replaced it, run `medseg bundle build {bundle_root}`"
        )
    load_state(network, read_state(content, path), path)


def start_from(network: nn.Module, path: str, *, resume: bool = False, cat_order: str | None = None) -> str:
    """Give a network, before its training, the weights of an earlier one.

    Weights of the same network are taken as they are. A network with a method `transfer` (see
    `medseg.types.TransferNetwork`) also starts from another one, as in its paper's pre-training.

    Args:
        network: changed in place.
        path: file written by `torch.save(network.state_dict(), ...)`; empty to leave the network as it is.
        resume: leave the network as it is: the state to resume from holds its weights.
        cat_order: Order in which the other network joins its features, "up_first" or "skip_first", where that is not
            its default.

    Returns:
        What was taken over, for people; empty if nothing was.

    Raises:
        WeightsError: the file is missing, holds anything but tensors, or does not fit the network.
    """
    if not path or resume:
        return ""
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"no weights at '{path}' to start from: give --set pretrained=FILE, or leave it out")
    state = read_state(file.read_bytes(), path)
    if isinstance(network, TransferNetwork) and set(state) != set(network.state_dict()):
        try:
            taken = str(network.transfer(state, cat_order=cat_order))
        except WeightsError as error:
            raise WeightsError(f"'{path}': {error}") from error
    else:
        load_state(network, state, path)
        taken = f"all {len(state)} tensors taken over"
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
        raise WeightsError(f"'{metadata}' lists weights in a form that medseg does not know") from error
    return listed


def read_state(content: bytes, path: str) -> Mapping[str, torch.Tensor]:
    """Read a state dict without running code of the file.

    Args:
        content: of a file written by `torch.save`: names and tensors, or these under `model` or `state_dict`.
        path: of the file, for messages.

    Raises:
        WeightsError: it cannot be read, or holds anything but tensors.
    """
    try:
        problem = _size_problem(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on odd pickles; they end in a refusal below
            state = None if problem else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"'{path}' holds more than tensors and was not loaded: it could run code. If you trust where it comes "
            "from, save its state dict alone: torch.save(network.state_dict(), FILE)"
        ) from error
    except Exception as error:  # whatever torch makes of it
        raise WeightsError(
            f"'{path}' is no readable weight file ({type(error).__name__}); it may be cut off"
        ) from error
    if problem:
        raise WeightsError(f"'{path}' is {problem}: save its state dict anew, torch.save(network.state_dict(), FILE)")
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise WeightsError(f"'{path}' holds {type(state).__name__}, expected a state dict: names and tensors")
    if odd := [name for name, tensor in state.items() if not _is_plain(tensor)]:
        raise WeightsError(
            f"'{path}' holds {odd[0]!r} in a form that no network has: sparse, quantized, complex, without data or "
            "larger than what was stored; expected plain tensors"
        )
    return state


def _size_problem(content: bytes) -> str:
    """Say why torch should not even read a file; files of its form before version 1.6 are never packed."""
    file = io.BytesIO(content)
    if not content.startswith(b"PK"):
        return ""
    with zipfile.ZipFile(file) as archive:
        return weights_problem(archive, len(content))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether every number of a tensor was in the file, once."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return False
    return not tensor.is_complex() and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], path: str) -> None:
    """Load a state dict of exactly this network.

    Args:
        network: unchanged if anything does not fit.
        state: names and tensors.
        path: where they come from, for messages.

    Raises:
        WeightsError: a tensor is missing, surplus or of another shape.
    """
    own = network.state_dict()
    faults = [f"missing {name}" for name in own if name not in state]
    faults += [f"surplus {name}" for name in state if name not in own]
    faults += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        shown = "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
        raise WeightsError(
            f"'{path}' is of another network than {type(network).__name__} of this bundle: "
            f"{len(faults)} tensors do not fit ({shown})"
        )
    network.load_state_dict(dict(state))
