"""Conversion of published weights to a bundle: network, arguments and renamed tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle, find_bundle
from medseg.bundle.compose import Config, compose, nearest
from medseg.bundle.trust import require_trust
from medseg.errors import BundleError, RequestError, WeightsError
from medseg.files import check_folder, load_json, replace_text
from medseg.networks.registry import SOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from medseg.networks.convert import Converted

    State = Mapping[str, Tensor | NDArray[Any]]

__all__ = ["SOURCE_NAMES", "Conversion", "convert"]

SOURCE_NAMES = tuple(SOURCES)
# Fields of bundle.json about the data and its processing; the others describe the weights of the original.
_KEPT = ("template", "authors", "channels", "labels", "label_mapping", "image_classes", "label_classes")
_SETTINGS = ("blocks", "knobs")
# Module attributes that do not affect inference.
_TRAINING_ONLY = ("training", "momentum", "inplace")
_DIFFERENCES_SHOWN = 6
_NAMES_SHOWN = 5
# Compressed arrays may expand to a thousand times the size of their file.
_MAX_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Conversion:
    """Result of `convert`.

    Attributes:
        weights: Weight file of the bundle.
        source: Code base of the weights, one of `SOURCE_NAMES`.
        network: Class name of the network.
        tensors: Number of tensors in the weight file.
        parameters: Number of parameters of the network.
        left_out: Names of tensors of the source that its network never uses.
        background: Whether a background channel was added.
    """

    weights: Path
    source: str
    network: str
    tensors: int
    parameters: int
    left_out: tuple[str, ...]
    background: bool


def convert(
    weights: str | Path,
    source: str,
    to: str | Path,
    *,
    like: str | Path | None = None,
    prefix: str = "",
    settings: Mapping[str, Any] | None = None,
    reverse_channels: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Convert the weights of published code to the weights of a bundle.

    If the network has a single sigmoid channel and the bundle two labels, a background channel of zeros is added: the
    softmax of both channels equals the sigmoid.

    Args:
        weights: State dict as `.npz` (arrays without pickles) or written by `torch.save`.
        source: Code base of the weights, one of `SOURCE_NAMES`.
        to: Bundle with a `bundle.json` of the same network, or a new folder, which requires `like`.
        like: Bundle from which a new one takes template, channels, labels, blocks and settings.
        prefix: Prefix of the tensor names to use; it is removed from the names.
        settings: Arguments of the network that cannot be inferred from the tensors.
        reverse_channels: Whether to convert the first layer from BGR to RGB input.
        overwrite: Whether to replace the weights of the bundle.

    Returns:
        Weight file, and the converted and skipped tensors.

    Raises:
        RequestError: The request is invalid; nothing was written.
        BundleError: The bundle has another network, or the network does not fit the channels and labels.
        WeightsError: The file cannot be read safely, or its tensors do not fit the source.
    """
    file, target = Path(weights), Bundle(Path(to).absolute())
    plan = _checked(file, source, target, like, overwrite=overwrite)
    from medseg.networks.convert import read_reference
    from medseg.training.checkpoint import save_tensors

    found = read_reference(source, _taken(_state(file), prefix, file), **(settings or {}))
    if reverse_channels:
        _reverse_channels(found.network)
    background = found.arguments["out_channels"] == 1 and len(plan["labels"]) == 2
    if background:
        found = _with_background(found)
    if like is None:
        _check_same(found.network, target)
    else:
        content = _bundle_json(plan, target.name, source, file, found)
        _check_fits(content, Path(like))
        replace_text(target.root / "bundle.json", json.dumps(content, indent=2) + "\n")
    save_tensors(dict(found.network.state_dict()), target.weights)
    build(target)
    return Conversion(
        target.weights,
        source,
        type(found.network).__name__,
        len(found.network.state_dict()),
        sum(parameter.numel() for parameter in found.network.parameters()),
        found.left_out,
        background,
    )


def _checked(file: Path, source: str, target: Bundle, like: str | Path | None, *, overwrite: bool) -> Config:
    """Check the request without importing torch, and return the `bundle.json` of the target or of `like`."""
    if source not in SOURCE_NAMES:
        raise RequestError(f"unknown source '{source}' of weights{nearest(source, SOURCE_NAMES)}")
    if not file.is_file():
        raise WeightsError(f"no weights at '{file}': give the file of a published checkpoint")
    if target.weights.is_file() and not overwrite:
        raise RequestError(f"'{target.weights}' exists; give --overwrite to replace it, or another folder")
    exists = (target.root / "bundle.json").is_file()
    if exists and like is not None:
        raise RequestError(f"'{target.root}' is already a bundle: remove --like, or give a new folder")
    if not exists and target.root.exists() and (not target.root.is_dir() or any(target.root.iterdir())):
        raise RequestError(f"'{target.root}' exists without a bundle.json; give a bundle or a new folder")
    if not exists and like is None:
        raise RequestError(
            f"no bundle at '{target.root}': give --like BUNDLE to create one with the channels and labels of BUNDLE"
        )
    origin = target if like is None else find_bundle(like)
    path = origin.root / "bundle.json"
    if not path.is_file():
        raise BundleError(f"no bundle.json in '{origin.root}'; give a bundle that has one")
    content: Config = load_json(path)
    _compose({**content, "name": target.name})
    check_folder(target.root if exists else _nearest_folder(target.root))
    return content


def _nearest_folder(folder: Path) -> Path:
    """Return the folder or its nearest existing parent, to check write permission before anything is created."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _compose(content: Config) -> Config:
    return compose(content)["inference"]


def _state(file: Path) -> State:
    if file.suffix.lower() == ".npz":
        return _arrays(file)
    from medseg.jobs.config_functions import read_state

    return read_state(file.read_bytes(), str(file))


def _arrays(file: Path) -> dict[str, NDArray[Any]]:
    """Read the numeric arrays of an `.npz`; text, such as notes, is skipped."""
    import numpy as np

    try:
        # NumPy leaks the handle if it opened a damaged file itself.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            size = sum(info.file_size for info in archive.zip.infolist())
            if size > _MAX_BYTES:
                raise ValueError(f"{size} bytes of arrays, limit {_MAX_BYTES}")
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy and zipfile raise many types
        raise WeightsError(
            f"'{file}' is not a readable .npz of plain arrays ({error}); pickled content is never loaded"
        ) from error
    return {name: array for name, array in arrays.items() if _is_number(array)}


def _is_number(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "biuf"


def _taken(state: State, prefix: str, file: Path) -> State:
    taken = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not taken:
        shown = ", ".join(list(state)[:_NAMES_SHOWN]) or "no tensor"
        raise WeightsError(f"no tensor in '{file}' has a name starting with '{prefix}'; found {shown}, ...")
    return taken


def _reverse_channels(network: nn.Module) -> None:
    """Reverse the input channels of the first convolution; images with reversed channels keep their results."""
    first = next(parameter for parameter in network.parameters() if parameter.dim() > 3)
    first.data = first.data.flip(1)


def _with_background(found: Converted) -> Converted:
    """Return the network with two channels of logits, the first of which is zero."""
    import torch

    from medseg.networks.convert import Converted

    arguments = {**found.arguments, "out_channels": 2}
    network = type(found.network)(**arguments)
    state = found.network.state_dict()
    for name, tensor in network.state_dict().items():
        if tensor.shape != state[name].shape:
            state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])
    network.load_state_dict(state)
    return Converted(network.eval(), arguments, found.left_out)


def _bundle_json(plan: Config, name: str, source: str, file: Path, found: Converted) -> Config:
    """Return the source of the new bundle: the data as in the original, and the known facts about the weights."""
    version = "0.1.0"
    return {
        "name": name,
        "version": version,
        "changelog": {version: f"weights of {source}"},
        "description": f"{type(found.network).__name__} with weights of {source}. Converted from {file.name}.",
        **{key: plan[key] for key in _KEPT if key in plan},
        "network_def": json.loads(
            json.dumps({"_target_": f"medseg.components.{type(found.network).__name__}", **found.arguments})
        ),
        **{key: plan[key] for key in _SETTINGS if key in plan},
    }


def _check_fits(content: Config, like: Path) -> None:
    network = content["network_def"]
    for argument, listed in (("in_channels", "channels"), ("out_channels", "labels")):
        if network[argument] != len(content[listed]):
            raise BundleError(
                f"mismatch of {listed}: the weights are of a network with {argument}={network[argument]}, but '{like}' "
                f"lists {len(content[listed])} {listed}; give a matching bundle, or a copy with an edited bundle.json"
            )
    dims = _compose(content)["spatial_dims"]
    if network["spatial_dims"] != dims:
        raise BundleError(
            f"mismatch of spatial dimensions: the weights are of a {network['spatial_dims']}D network, but '{like}' is "
            f"for {dims}D images; give a {network['spatial_dims']}D bundle"
        )


def _check_same(network: nn.Module, target: Bundle) -> None:
    """Refuse a bundle whose network computes something else with these weights."""
    from monai.bundle import ConfigParser

    from medseg.jobs.config_functions import load_state

    content = load_json(target.root / "bundle.json")
    definition = {"network_def": content["network_def"]}
    require_trust(target.root, {"bundle.json": definition})
    theirs = ConfigParser(definition).get_parsed_content("network_def")
    load_state(theirs, network.state_dict(), str(target.root / "bundle.json"))
    ours, described = _traits(network), _traits(theirs)
    unlike = [
        f"{name} is {described.get(name, 'missing')}, not {ours.get(name, 'missing')}"
        for name in sorted(ours.keys() | described.keys())
        if ours.get(name) != described.get(name)
    ]
    if unlike:
        rest = f"; and {len(unlike) - _DIFFERENCES_SHOWN} more" if len(unlike) > _DIFFERENCES_SHOWN else ""
        raise BundleError(
            f"network_def of '{target.root}' has matching tensors, but computes something else: "
            f"{'; '.join(unlike[:_DIFFERENCES_SHOWN])}{rest}. Change network_def, or give --set name=value for "
            "arguments that the tensors do not determine"
        )


def _traits(network: nn.Module) -> dict[str, str]:
    """Return what determines the network's computation besides its tensors: types and plain attributes of modules."""
    traits = {}
    for name, module in network.named_modules():
        if "Dropout" in type(module).__name__:
            continue
        traits[name or "the network"] = type(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and key not in _TRAINING_ONLY and _is_plain(value):
                traits[f"{name}.{key}".lstrip(".")] = repr(value)
    return traits


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
