"""What mkdocs makes from the code: pages of commands, the Python API and model cards, and tables of settings.

It is never committed, so it cannot be out of date. Importing medseg here needs neither torch nor MONAI.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from medseg.bundle.catalog import Bundle
from medseg.cli import app
from medseg.errors import CODES as ERROR_CODES
from medseg.lazy import listed
from medseg.networks.registry import NETWORKS
from medseg.notices import CODES as WARNING_CODES

ROOT = Path(__file__).parents[1]
CODE = "https://github.com/medseg/medseg/blob/main"
FORMAT = ROOT / "medseg" / "bundle"
CREDITS = json.loads((ROOT / "docs" / "assets" / "models" / "credits.json").read_text(encoding="utf-8"))
PACKAGES = {
    "medseg": "The functions behind the commands.",
    "medseg.networks": "Networks in 2D and 3D.",
    "medseg.losses": "Losses for training.",
    "medseg.inferers": "Sliding windows, tiles, test-time augmentation and ensembles.",
    "medseg.transforms": "Dictionary transforms for MONAI pipelines.",
    "medseg.training": "Handlers and data loading for MONAI's engines.",
    "medseg.metrics.features": "Measures of what a network has learned.",
    "medseg.io": "Images and labels in files.",
    "medseg.types": "Types that packages share.",
    "medseg.errors": "Exceptions.",
    "medseg.manifest": "The record of a run.",
}
TEMPLATES = {
    "base": "All bundles",
    "volume": "Volumes (3D)",
    "image": "Images (2D)",
    "ct_volume": "CT volumes",
    "mr_volume": "MR volumes",
    "rgb_image": "Color images",
    "grey_image": "Gray images",
}


# Hooks of mkdocs


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation, each below the index of its folder."""
    for path in _pages():
        _section(config.nav, f"{path.rpartition('/')[0]}/index.md").append(path)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, content in _pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the generated tables where a page has a mark for them."""
    return re.sub(r"<!-- made by docs/hooks\.py: (.+?) -->", lambda mark: "\n".join(TABLES[mark[1]]()), markdown)


@cache
def _pages() -> dict[str, str]:
    return {**command_pages(), **python_pages(), **model_pages()}


def _section(nav: Any, index: str) -> list[Any]:
    """Return the list of the navigation that begins with an index page; empty if there is none."""
    if index in nav:
        return nav if isinstance(nav, list) else []
    inner = [part for item in nav if isinstance(item, dict) for part in item.values() if isinstance(part, list)]
    return next((found for part in inner if (found := _section(part, index))), [])


# Commands


def command_pages() -> dict[str, str]:
    """Return a page for each command."""
    return {f"reference/commands/{_file(name)}": _command_page(name, command) for name, command in _commands()}


def _command_table() -> list[str]:
    rows = [f"| [`{name}`]({_file(name)}) | {_first_line(command)} |" for name, command in _commands()]
    return ["| command | purpose |", "|---|---|", *rows]


def _commands(group: Any = None, name: str = "medseg") -> Iterator[tuple[str, Any]]:
    for part, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {part}")
        elif not command.hidden:
            yield f"{name} {part}", command


def _file(name: str) -> str:
    return "-".join(name.split()[1:]) + ".md"


def _first_line(command: Any) -> str:
    return _cell(_prose(command.help).split("\n\n")[0])


def _prose(text: str | None) -> str:
    """Return a help text without the markup that only a terminal understands."""
    return re.sub(r"\[/?(?:bold|dim|italic|green|red)[a-z ]*\]|\[/\]", "", (text or "").replace("\b\n", "")).strip()


def _command_page(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"# {name}", "", _prose(command.help), "", "```text", f"{name} {usage}", "```", ""]
    if examples := [line for line in _prose(command.epilog).splitlines() if line.startswith("medseg ")]:
        lines += ["```text", *examples, "```", ""]
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        chosen = [one for one in command.params if one.param_type_name == kind and not getattr(one, "hidden", False)]
        if chosen:
            lines += [f"## {title}", "", "| name | value | default | meaning |", "|---|---|---|---|"]
            lines += [*(_parameter(one, context) for one in chosen), ""]
    return "\n".join(lines)


def _parameter(parameter: Any, context: Any) -> str:
    argument = parameter.param_type_name == "argument"
    names = [parameter.metavar or parameter.name.upper()] if argument else parameter.opts + parameter.secondary_opts
    kind = re.sub(r"[<>]", "", str(parameter.display_type(context))) if hasattr(parameter, "display_type") else ""
    value = "" if getattr(parameter, "is_flag", False) or argument else parameter.metavar or kind
    default = f"`{parameter.default}`" if parameter.default not in (None, False, "", (), []) else ""
    described = getattr(parameter, "show_default", None)
    shown = "required" if parameter.required else described if isinstance(described, str) else default
    text = _cell(_prose(getattr(parameter, "help", ""))).replace("_", "\\_").replace("*", "\\*")
    return f"| {', '.join(f'`{one}`' for one in names)} | {_cell(value)} | {_cell(shown)} | {text} |"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


# Settings


def _settings_tables() -> list[str]:
    """Return a table of settings for each template, with its defaults; the more general ones first."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (FORMAT / "templates").glob("*.json")}
    lines = []
    for name in [*TEMPLATES, *sorted(set(found) - set(TEMPLATES))]:
        knobs = found[name].get("knobs", {})
        rows = [f"| `{one}` | `{_cell(json.dumps(knob['value']))}` | {knob['help']} |" for one, knob in knobs.items()]
        title = f"## {TEMPLATES.get(name, name)}"
        lines += [title, "", "| setting | default | meaning |", "|---|---|---|", *rows, ""] if rows else []
    return lines


def _recipe_table() -> list[str]:
    rows = []
    for path in sorted((FORMAT / "recipes").glob("*.json")):
        recipe = json.loads(path.read_text(encoding="utf-8"))
        link = f"[`{path.stem}`]({CODE}/medseg/bundle/recipes/{path.name})"
        rows.append(f"| {link} | {_cell(recipe['source'])} | {_cell(recipe['choices'])} |")
    return ["| recipe | source | where the paper gives no value |", "|---|---|---|", *rows]


def _code_table(codes: Mapping[str, str]) -> list[str]:
    return [
        "| code | meaning |",
        "|---|---|",
        *(f"| `{code}` | {meaning} |" for code, meaning in sorted(codes.items())),
    ]


# Python


def python_pages() -> dict[str, str]:
    """Return a page for each public package, which mkdocstrings fills from the docstrings."""
    return {f"reference/python/{_module_file(package)}": _package_page(package) for package in PACKAGES}


def _package_page(package: str) -> str:
    members = [f"::: {home}.{name}\n" for name, home in public_names(package).items()]
    return "\n".join([f"# {package}", "", PACKAGES[package], "", *members])


def _module_file(package: str) -> str:
    return f"{package.rpartition('.')[2]}.md"


def _package_table() -> list[str]:
    rows = [f"| [`{package}`]({_module_file(package)}) | {purpose} |" for package, purpose in PACKAGES.items()]
    return ["| package | purpose |", "|---|---|", *rows]


def public_names(package: str) -> dict[str, str]:
    """Return the module that defines each public name of a package, without importing torch or MONAI.

    Raises:
        LookupError: A public name that neither the package nor an import in it defines.
    """
    module = importlib.import_module(package)
    source = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    stub = Path(str(module.__file__)).with_suffix(".pyi")
    homes = {**listed(ROOT / "medseg" / "components.pyi"), **{one: NETWORKS[one].module for one in NETWORKS}}
    homes |= listed(stub) if stub.is_file() else {}
    homes |= _imported(source) | dict.fromkeys(_defined(source), package)
    names = [name for name in module.__all__ if not name.startswith("__")]
    if missing := [name for name in names if name not in homes]:
        raise LookupError(f"no import in {package} says where {', '.join(missing)} is defined")
    return {name: homes[name] for name in names}


def _imported(source: ast.Module) -> dict[str, str]:
    found = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    pairs = [(alias.asname or alias.name, str(node.module)) for node in found for alias in node.names]
    return {name: module for name, module in pairs if module.startswith("medseg")}


def _defined(source: ast.Module) -> Iterator[str]:
    for node in source.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


# Model cards


@cache
def _bundles() -> list[Bundle]:
    return [Bundle(path.parent) for path in sorted((ROOT / "bundles").glob("*/bundle.json"))]


def model_pages() -> dict[str, str]:
    """Return a page for each shipped bundle, from its model card and metadata."""
    return {f"models/{bundle.name}.md": _model_page(bundle) for bundle in _bundles()}


def _gallery(*, weights: bool) -> list[str]:
    tiles = [line for bundle in _bundles() if bundle.weights.is_file() == weights for line in _tile(bundle)]
    return ['<div class="grid cards" markdown>', "", *tiles, "</div>"]


def _tile(bundle: Bundle) -> list[str]:
    name, picture = bundle.name, _picture(bundle)
    text = str(bundle.metadata.get("description", "")).split(". ")[0].rstrip(".")
    shown = [f"    [![Mask of {name}]({picture})]({name}.md)", ""] if picture else []
    source = str(bundle.metadata.get("data_source", "")).rstrip(".")
    return [f"-   **[{name}]({name}.md)**", "", *shown, f"    {text}.", "", f"    <small>Data: {source}</small>", ""]


def _picture(bundle: Bundle) -> str:
    """Return the path of a bundle's picture, from a page of the models; empty if it has none."""
    if bundle.name == "phantom_ct_unet":
        return "../assets/demo.png"
    return f"../assets/models/{bundle.name}.png" if bundle.name in CREDITS else ""


def _model_page(bundle: Bundle) -> str:
    title, _, body = (bundle.root / "docs" / "README.md").read_text(encoding="utf-8").partition("\n")
    body = re.sub(r"\]\(\.\./\.\./(\w+)/docs/README\.md\)", r"](\1.md)", body)
    body = re.sub(r"\]\((\w+\.txt)\)", rf"]({CODE}/bundles/{bundle.name}/docs/\1)", body)
    picture = _picture(bundle)
    shown = (
        [f"![Mask of {bundle.name}]({picture})", "", f"<small>{_credit(bundle.name)}</small>", ""] if picture else []
    )
    return "\n".join([title, "", *shown, body.strip(), "", *_facts(bundle), *_references(bundle)])


def _credit(name: str) -> str:
    if name not in CREDITS:
        return "A generated phantom: mask of the network, reference label dashed."
    one = CREDITS[name]
    image = f"Image: {one['source']}, {one['license']}; this picture is under the same license."
    reference = "" if one.get("reference") is False else ", reference label dashed"
    return f"Validation case {one['case']}: mask of the network{reference}. {image}"


def _facts(bundle: Bundle) -> list[str]:
    metadata, source = bundle.metadata, f"{CODE}/bundles/{bundle.name}"
    licenses = ", ".join(str(one.get("license", "")) for one in metadata.get("weights", {}).values())
    network = json.loads((bundle.root / "bundle.json").read_text(encoding="utf-8"))["network_def"]
    facts = {
        "Version": metadata.get("version"),
        "Network": f"`{network['_target_'].rpartition('.')[2]}`, {network['spatial_dims']}D",
        "Input": metadata.get("image_classes"),
        "Labels": metadata.get("label_classes"),
        "Data": metadata.get("data_source"),
        "Weights": licenses or "none shipped",
        "Intended use": metadata.get("intended_use"),
        "Files": f"[bundle.json]({source}/bundle.json), [configs]({source}/configs)",
    }
    return [
        "## Facts",
        "",
        "| | |",
        "|---|---|",
        *(f"| {one} | {_cell(facts[one])} |" for one in facts if facts[one]),
        "",
    ]


def _references(bundle: Bundle) -> list[str]:
    found = bundle.metadata.get("references", [])
    return ["## References", "", *(f"- {one}" for one in found), ""] if found else []


TABLES: dict[str, Callable[[], list[str]]] = {
    "commands": _command_table,
    "settings": _settings_tables,
    "training recipes": _recipe_table,
    "packages": _package_table,
    "models with weights": lambda: _gallery(weights=True),
    "recipes": lambda: _gallery(weights=False),
    "warning codes": lambda: _code_table(WARNING_CODES),
    "error codes": lambda: _code_table(ERROR_CODES),
}
