"""The small functions that our configs call where other bundles write a `$` expression.

They exist so that a shipped config is pure data: which callable, which arguments, which references.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medseg.bundle.trust import load_json
from medseg.errors import RequestError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

__all__ = ["inside", "item", "load_weights", "on_device", "parameters", "run", "select_device"]


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


def item(value: Any) -> Any:
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
    _load_state(network, _state(content, path), path)


def _expected_hash(file: Path, bundle_root: str | None) -> str | None:
    if bundle_root is None:
        return None
    metadata = Path(bundle_root) / "configs" / "metadata.json"
    if not metadata.is_file() or not file.resolve().is_relative_to(Path(bundle_root).resolve()):
        return None
    name = file.resolve().relative_to(Path(bundle_root).resolve()).as_posix()
    listed: str | None = load_json(metadata).get("weights", {}).get(name, {}).get("sha256")
    return listed


def _state(content: bytes, path: str) -> Mapping[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on odd pickles; they end in a refusal below
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"'{path}' holds more than tensors and was not loaded: it could run code") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(
            f"'{path}' is no readable weight file ({type(error).__name__}); it may be cut off"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"'{path}' holds {type(state).__name__}, expected a state dict: names and tensors")
    return state


def _load_state(network: nn.Module, state: Mapping[str, torch.Tensor], path: str) -> None:
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
