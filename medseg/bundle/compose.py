"""From a short `bundle.json` and a template to complete MONAI configs.

A template (`templates/*.json`) holds *settings* under `knobs` (the values a user may change, each with a line of help),
*blocks* (named parts) and *configs* (the files to write). `{"block": "name"}` stands for a block; where a block is a
list and stands in a list, its items take its place. A template may extend another one: settings and blocks of the same
name replace the inherited ones, and the entries of its configs join theirs. A recipe (`medseg.bundle.recipes`)
replaces settings and blocks in turn, and `bundle.json` once more; both may only use names that the template knows.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle.recipes import read_recipe
from medseg.bundle.source_schema import check_source, nearest, place
from medseg.errors import BundleError
from medseg.files import load_json

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CONFIG_NAMES",
    "Config",
    "checked_value",
    "compose",
    "nearest",
    "spatial_dims",
    "template_knobs",
    "template_names",
]

Config = dict[str, Any]

CONFIG_NAMES = ("train", "evaluate", "inference", "multi_gpu_train")
# These are merged over train.json and leave its settings alone.
_OVERLAYS = ("evaluate", "multi_gpu_train")

_TEMPLATES = Path(__file__).parent / "templates"
_REFERENCE = re.compile(r"^@(\w+)")
# Our templates put less than a hundred into a config.
_MAX_BLOCKS = 1000


def template_names() -> tuple[str, ...]:
    """Return the templates that a `bundle.json` may name, sorted."""
    return tuple(sorted(name for name in (p.stem for p in _TEMPLATES.glob("*.json")) if "modality" in _template(name)))


def template_knobs(name: str) -> Config:
    """Return the settings of a template with their default values."""
    return {knob: entry["value"] for knob, entry in _template(name)["knobs"].items()}


def spatial_dims(bundle: Config) -> int:
    """Return 2 or 3, for the content of a `bundle.json`.

    Raises:
        BundleError: It does not fit its schema.
    """
    check_source(bundle)
    dims: int = _template(bundle["template"])["spatial_dims"]
    return dims


def compose(bundle: Config) -> dict[str, Config]:
    """Return the complete configs of a bundle, by name (`CONFIG_NAMES`).

    Args:
        bundle: content of a `bundle.json`.

    Raises:
        BundleError: It does not fit its schema (see `medseg.bundle.source_schema`), names a setting or block that its
            template lacks, or a network that does not fit the listed channels and labels.
    """
    try:
        return _composed(bundle)
    except RecursionError as error:
        raise BundleError("bundle.json: circular or too deeply nested blocks") from error


def _composed(bundle: Config) -> dict[str, Config]:
    check_source(bundle)
    _check_network(bundle)
    template = _template(bundle["template"])
    recipe = read_recipe(bundle["recipe"], template["spatial_dims"]) if bundle.get("recipe") else {}
    knobs = _merged_knobs(recipe, bundle)
    blocks = _merged_blocks(template, recipe, bundle)
    constants = _constants(template, bundle)
    values = {name: {} if name in _OVERLAYS else knobs | constants for name in CONFIG_NAMES}
    return {name: _config(template["configs"][name], blocks, values[name]) for name in CONFIG_NAMES}


def _template(name: str) -> Config:
    path = _TEMPLATES / f"{name}.json"
    if not path.is_file():
        raise BundleError(f"no template '{name}'{nearest(name, (p.stem for p in _TEMPLATES.glob('*.json')))}")
    own: Config = load_json(path)
    if "extends" not in own:
        return own
    base = _template(own.pop("extends"))
    for part in ("knobs", "blocks"):
        base[part].update(own.pop(part, {}))
    for config, entries in own.pop("configs", {}).items():
        base["configs"][config].update(entries)
    return {**base, **own}


def _check_network(bundle: Config) -> None:
    network = bundle["network_def"]
    for argument, listed in (("in_channels", "channels"), ("out_channels", "labels")):
        if network.get(argument) != len(bundle[listed]):
            raise BundleError(
                f"{place(['network_def', argument])}: found {network.get(argument)}, expected {len(bundle[listed])} "
                f"as {listed} lists; make them agree"
            )
    for listed in ("channels", "labels"):
        if list(bundle[listed]) != [str(i) for i in range(len(bundle[listed]))]:
            raise BundleError(
                f"{place([listed])}: found the indices {list(bundle[listed])}, expected '0', '1', ... in order"
            )
    names = list(map(str, bundle["labels"].values()))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BundleError(f"{place(['labels'])}: found {twice!r} twice, expected a name of its own for each label")


def _merged_knobs(recipe: Config, bundle: Config) -> Config:
    knobs = template_knobs(bundle["template"])
    for layer in (recipe, bundle):
        for name, value in layer.get("knobs", {}).items():
            if name not in knobs:
                raise BundleError(
                    f"{place(['knobs'])}: unknown setting '{name}' of this template{nearest(name, knobs)}"
                )
            knobs[name] = checked_value(place(["knobs", name]), value, knobs[name])
    return knobs


def checked_value(name: str, value: Any, default: Any) -> Any:
    """Return a value that is finite and of the type of `default`; an integer is accepted for a float.

    Raises:
        BundleError: Any other value; the message begins with `name`.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleError(f"{name}: found {value!r}, expected a finite number")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is None or value is None or type(value) is type(default):
        if isinstance(default, list) and default:
            return [checked_value(f"{name}[{i}]", item, default[0]) for i, item in enumerate(value or [])]
        return value
    kinds = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list"}
    wanted = kinds.get(type(default), type(default).__name__)
    raise BundleError(f"{name}: found {value!r}, expected {wanted} (for example {default!r})")


def _merged_blocks(template: Config, recipe: Config, bundle: Config) -> Config:
    blocks = dict(template["blocks"])
    for layer in (recipe, bundle):
        for name, block in layer.get("blocks", {}).items():
            if name not in blocks:
                raise BundleError(f"{place(['blocks'])}: this template has no block '{name}'{nearest(name, blocks)}")
            blocks[name] = block
    return {**blocks, "network_def": bundle["network_def"]}


def _constants(template: Config, bundle: Config) -> Config:
    mapping = bundle.get("label_mapping", {key: int(key) for key in bundle["labels"]})
    return {
        "spatial_dims": template["spatial_dims"],
        "in_channels": len(bundle["channels"]),
        "out_channels": len(bundle["labels"]),
        "label_mapping": mapping,
        "label_names": _label_names(bundle["labels"], mapping),
        "mask_labels": {key: name for key, name in bundle["labels"].items() if key != "0"},
    }


def _label_names(labels: Config, mapping: Config) -> dict[str, int]:
    """Return a label value for each class name: the first that is mapped to it, or a free one for "other"."""
    free = next(value for value in range(1, len(mapping) + 2) if str(value) not in mapping)
    values = {index: free if value == "other" else int(value) for value, index in reversed(mapping.items())}
    return {name: values[int(key)] for key, name in labels.items() if key != "0" and int(key) in values}


def _config(skeleton: Config, blocks: Config, values: Config) -> Config:
    body: Config = _expand(copy.deepcopy(skeleton), blocks, iter(range(_MAX_BLOCKS)))
    used = {name for name in _references(body) if name in values}
    return {name: value for name, value in values.items() if name in used} | body


def _expand(node: Any, blocks: Config, left: Iterator[int]) -> Any:
    """Replace references by their blocks, up to a maximum number that stops circular references."""
    if isinstance(node, dict):
        if set(node) == {"block"}:
            name = node["block"]
            if not isinstance(name, str) or name not in blocks:
                raise BundleError(f"bundle.json: unknown block {name!r}{nearest(str(name), blocks)}")
            if next(left, None) is None:
                raise RecursionError
            return _expand(copy.deepcopy(blocks[name]), blocks, left)
        return {key: _expand(value, blocks, left) for key, value in node.items()}
    if isinstance(node, list):
        expanded: list[Any] = []
        for item in node:
            value = _expand(item, blocks, left)
            is_block = isinstance(item, dict) and set(item) == {"block"}
            expanded.extend(value) if is_block and isinstance(value, list) else expanded.append(value)
        return expanded
    return node


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for item in node:
            yield from _references(item)
    elif isinstance(node, str) and (match := _REFERENCE.match(node)):
        yield match.group(1)
