"""Weights of public code into a bundle: the network they belong to, its arguments, and the tensors in their places."""

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
# What a bundle.json says of the data and of what becomes of it; the rest tells of weights that are not these.
_KEPT = ("template", "authors", "channels", "labels", "label_mapping", "image_classes", "label_classes")
_SETTINGS = ("blocks", "knobs")
# Attributes of modules that change nothing once the weights are there.
_TRAINING_ONLY = ("training", "momentum", "inplace")
_DIFFERENCES_SHOWN = 6
_NAMES_SHOWN = 5
# Arrays may be packed, and unpack to a thousand times the size of their file.
_MAX_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote.

    Attributes:
        weights: the bundle's weight file.
        source: whose code the weights come from, one of `SOURCE_NAMES`.
        network: name of the network's class.
        tensors: how many the weight file holds.
        parameters: how many numbers of these are parameters.
        left_out: names of tensors of the source that its network never uses.
        background: whether a channel for the background was added.
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
    """Convert the weights of an author's public code into a bundle.

    A single sigmoid channel gets a background channel of zeros where the bundle has two labels: the softmax of both
    equals the sigmoid.

    Args:
        weights: State dict as `.npz` (arrays without pickles) or written by `torch.save`.
        source: Code that the weights come from, one of `SOURCE_NAMES`.
        to: Bundle with a `bundle.json` of the same network, or a new folder, which needs `like`.
        like: Bundle whose template, channels, labels, blocks and settings a new one takes over.
        prefix: Prefix of the tensor names to take; it is removed.
        settings: Arguments of the network that cannot be inferred from the tensors.
        reverse_channels: Whether the code read images as blue, green, red where the bundle reads red, green, blue.
        overwrite: Whether to replace the weights of the bundle.

    Returns:
        The weight file, and which tensors were taken over.

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
    """Check all that can be without torch; return the `bundle.json` to fill or to take over."""
    if source not in SOURCE_NAMES:
        raise RequestError(f"weights of source '{source}' are not known{nearest(source, SOURCE_NAMES)}")
    if not file.is_file():
        raise WeightsError(f"no weights at '{file}': give the file of a published checkpoint")
    if target.weights.is_file() and not overwrite:
        raise RequestError(f"'{target.weights}' exists; give --overwrite to replace it, or another folder")
    exists = (target.root / "bundle.json").is_file()
    if exists and like is not None:
        raise RequestError(f"'{target.root}' is a bundle already: leave out --like, or give a new folder")
    if not exists and target.root.exists() and (not target.root.is_dir() or any(target.root.iterdir())):
        raise RequestError(f"'{target.root}' exists and holds no bundle.json; give a bundle or a new folder")
    if not exists and like is None:
        raise RequestError(f"no bundle at '{target.root}': give --like BUNDLE to make one with its channels and labels")
    origin = target if like is None else find_bundle(like)
    path = origin.root / "bundle.json"
    if not path.is_file():
        raise BundleError(f"'{origin.root}' has no bundle.json to take over; name a bundle that has one")
    content: Config = load_json(path)
    _compose({**content, "name": target.name})
    check_folder(target.root if exists else _nearest_folder(target.root))
    return content


def _nearest_folder(folder: Path) -> Path:
    """Return the folder, or the first above it that exists: where something can be written before anything is."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _compose(content: Config) -> Config:
    return compose(content)["inference"]


def _state(file: Path) -> State:
    if file.suffix.lower() == ".npz":
        return _arrays(file)
    from medseg.jobs.config_functions import read_state

    return read_state(file.read_bytes(), str(file))


def _arrays(file: Path) -> dict[str, NDArray[Any]]:
    """Read an `.npz`; text in it, as in a note about its making, is passed over."""
    import numpy as np

    try:
        # NumPy leaves a file open that it opened itself and found damaged.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            size = sum(info.file_size for info in archive.zip.infolist())
            if size > _MAX_BYTES:
                raise ValueError(f"{size} bytes of arrays, at most {_MAX_BYTES} are taken")
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever NumPy and the standard library make of it
        raise WeightsError(
            f"'{file}' is no readable .npz of plain arrays ({error}); pickled content is never loaded"
        ) from error
    return {name: array for name, array in arrays.items() if _is_number(array)}


def _is_number(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "biuf"


def _taken(state: State, prefix: str, file: Path) -> State:
    taken = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not taken:
        shown = ", ".join(list(state)[:_NAMES_SHOWN]) or "no tensor"
        raise WeightsError(f"'{file}' has no tensor whose name starts with '{prefix}'; it holds {shown}, ...")
    return taken


def _reverse_channels(network: nn.Module) -> None:
    """Turn around the image channels of the first convolution: for the turned image, all results stay the same."""
    first = next(parameter for parameter in network.parameters() if parameter.dim() > 3)
    first.data = first.data.flip(1)


def _with_background(found: Converted) -> Converted:
    """Build the network with two channels of logits, the first of them zero."""
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
    """Describe the new bundle: the data as in the old one, and of the weights only what is known."""
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
                f"the weights are of a network with {argument}={network[argument]}, but '{like}' lists "
                f"{len(content[listed])} {listed}; name a bundle that fits, or make one: copy its bundle.json and "
                "change it"
            )
    dims = _compose(content)["spatial_dims"]
    if network["spatial_dims"] != dims:
        raise BundleError(
            f"the weights are of a {network['spatial_dims']}D network, but '{like}' is for {dims}D images; name a "
            "bundle that fits"
        )


def _check_same(network: nn.Module, target: Bundle) -> None:
    """Refuse a bundle whose network computes anything else with these weights."""
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
            f"network_def of '{target.root}' has room for the weights, but computes something else: "
            f"{'; '.join(unlike[:_DIFFERENCES_SHOWN])}{rest}. Change network_def, or give --set name=value for "
            "arguments that the tensors cannot tell"
        )


def _traits(network: nn.Module) -> dict[str, str]:
    """Return what decides how the network computes, besides its tensors: kinds and plain attributes of modules."""
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
