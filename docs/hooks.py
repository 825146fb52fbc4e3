"""Pages that mkdocs makes from the code: commands, settings, the Python API and the model cards.

They are never committed, so they cannot be out of date. Importing medseg here needs neither torch nor MONAI.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from medseg import components
from medseg.bundle.catalog import Bundle
from medseg.cli import app
from medseg.networks.registry import NETWORKS

ROOT = Path(__file__).parents[1]
CODE = "https://github.com/medseg/medseg/blob/main"
TEMPLATES = ROOT / "medseg" / "bundle" / "templates"
CREDITS = json.loads((ROOT / "docs" / "assets" / "models" / "credits.json").read_text(encoding="utf-8"))
# Packages of the public Python interface, in the order of the page, each with what it is for.
PACKAGES = {
    "medseg": "The functions behind the commands.",
    "medseg.networks": "Networks in 2D and 3D.",
    "medseg.losses": "Losses for training.",
    "medseg.inferers": "Sliding windows, tiles, test-time augmentation and ensembles.",
    "medseg.transforms": "Dictionary transforms for MONAI pipelines.",
    "medseg.training": "Handlers and data loading for MONAI's engines.",
    "medseg.metrics": "Measures of masks and features.",
    "medseg.io": "Images and labels in files.",
    "medseg.types": "Types that packages share.",
    "medseg.errors": "Exceptions.",
    "medseg.manifest": "The record of a run.",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation, each below the index of its folder."""
    for path in _pages():
        folder = f"{path.rpartition('/')[0]}/index.md"
        if path != folder:
            _section(config.nav, folder).append(path)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, content in _pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def _pages() -> dict[str, str]:
    """Return the generated pages by path, each folder's index first."""
    return {**command_pages(), "reference/settings.md": settings_page(), **python_pages(), **model_pages()}


def _section(nav: Any, index: str) -> list[Any]:
    """Return the list of the navigation that begins with an index page."""
    for item in nav if isinstance(nav, list) else [nav]:
        if item == index:
            return list(nav) if not isinstance(nav, list) else nav
        for inner in item.values() if isinstance(item, dict) else ():
            if isinstance(inner, list) and (found := _section(inner, index)):
                return found
    return []


# Commands


def command_pages() -> dict[str, str]:
    """Return a page for each command, and their index."""
    group = typer.main.get_command(app)
    commands = list(_commands(group, "medseg"))
    rows = [f"| [`{name}`]({_file(name)}) | {_first_line(command)} |" for name, command in commands]
    index = ["# Commands", "", _prose(group.help), "", "| command | purpose |", "|---|---|", *rows, "", *_EXIT_CODES]
    pages = {f"reference/commands/{_file(name)}": _command_page(name, command) for name, command in commands}
    return {"reference/commands/index.md": "\n".join(index) + "\n", **pages}


_EXIT_CODES = (
    "## Exit codes",
    "",
    "| code | meaning |",
    "|--:|---|",
    "| 0 | everything done |",
    "| 1 | some cases failed, or a check found an error; the output names them |",
    "| 2 | invalid request: nothing was started |",
    "| 130 | interrupted by Ctrl-C; the same command with `--resume` continues |",
)


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for part, command in group.commands.items():
        if getattr(command, "hidden", False):
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


def _file(name: str) -> str:
    return "-".join(name.split()[1:]) + ".md"


def _first_line(command: Any) -> str:
    return _prose(command.help).split("\n\n")[0].replace("\n", " ")


def _prose(text: str | None) -> str:
    """Return a help text without the marks that only a terminal understands."""
    return re.sub(r"\[/?[a-z ]*\]", "", (text or "").replace("\b\n", "")).strip()


def _command_page(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"# {name}", "", _prose(command.help), "", "```text", f"{name} {usage}", "```", ""]
    epilog = _prose(getattr(command, "epilog", None))
    if epilog:
        lines += ["## Examples", "", "```text", *(line.strip() for line in epilog.splitlines() if line.strip()), "```", ""]
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
    shown = "required" if parameter.required else default
    text = _cell(_prose(getattr(parameter, "help", ""))).replace("_", "\\_").replace("*", "\\*")
    return f"| {', '.join(f'`{one}`' for one in names)} | {_cell(value)} | {_cell(shown)} | {text} |"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


# Settings


def settings_page() -> str:
    """Return the page of all settings: name, default in each template, meaning."""
    lines = [
        "# Settings",
        "",
        "Every setting of a bundle (`knobs` in `bundle.json`) stands at the top of its configs. Change one for a run with",
        "`--set name=value` (JSON or text), or with `--name value` in `python -m monai.bundle run`. A misspelled name is",
        "refused and the nearest name suggested. The defaults below are those of the templates; a bundle may have others:",
        "its `configs/train.json` and `configs/inference.json` list them.",
        "",
        "`--set recipe=NAME` applies the training recipe of a paper before other settings, see",
        "[recipes](#recipes).",
        "",
    ]
    groups: dict[str, list[str]] = {}
    for template, content in _templates().items():
        for name, knob in content.get("knobs", {}).items():
            row = f"| `{name}` | `{_cell(json.dumps(knob['value']))}` | {_cell(knob['help'])} |"
            groups.setdefault(template, []).append(row)
    for template, rows in groups.items():
        title = _TEMPLATE_TITLES.get(template, f"Template `{template}`")
        lines += [f"## {title}", "", "| setting | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join([*lines, *_recipes()]) + "\n"


_TEMPLATE_TITLES = {
    "base": "All bundles",
    "volume": "Volumes (3D)",
    "image": "Images (2D)",
    "ct_volume": "CT volumes",
    "mr_volume": "MR volumes",
    "rgb_image": "Color images",
    "grey_image": "Gray images",
}


def _templates() -> dict[str, dict[str, Any]]:
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in TEMPLATES.glob("*.json")}
    order = [*_TEMPLATE_TITLES, *sorted(set(found) - set(_TEMPLATE_TITLES))]
    return {name: found[name] for name in order if name in found}


def _recipes() -> list[str]:
    rows = []
    for path in sorted((ROOT / "medseg" / "bundle" / "recipes").glob("*.json")):
        recipe = json.loads(path.read_text(encoding="utf-8"))
        link = f"[`{path.stem}`]({CODE}/medseg/bundle/recipes/{path.name})"
        rows.append(f"| {link} | {_cell(recipe['source'])} | {_cell(recipe['choices'])} |")
    return ["## Recipes", "", "| recipe | source | where the paper gives no value |", "|---|---|---|", *rows]


# Python


def python_pages() -> dict[str, str]:
    """Return a page for each public package, from its docstrings, and their index."""
    pages, rows = {}, []
    for package, purpose in PACKAGES.items():
        page = f"{package.removeprefix('medseg.')}.md" if package != "medseg" else "medseg.md"
        lines = [f"# {package}", "", purpose, "", *_usage(package)]
        for name, home in public_names(package).items():
            lines += [f"::: {home}.{name}", ""]
        pages[f"reference/python/{page}"] = "\n".join(lines)
        rows.append(f"| [`{package}`]({page}) | {purpose} |")
    index = ["# Python", "", "| package | purpose |", "|---|---|", *rows, ""]
    return {"reference/python/index.md": "\n".join(index), **pages}


def _usage(package: str) -> list[str]:
    known = set(components.__all__)
    parts = [name for name in public_names(package) if name in known]
    return ["Configs name these classes as `medseg.components.NAME`.", ""] if len(parts) > 2 else []


def public_names(package: str) -> dict[str, str]:
    """Return the module that defines each public name of a package, found without importing torch or MONAI.

    Raises:
        LookupError: A public name whose module is unknown.
    """
    source = Path(str(importlib.import_module(package).__file__)).read_text(encoding="utf-8")
    homes = {
        alias.asname or alias.name: str(node.module)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("medseg")
        for alias in node.names
    }
    stub = ast.parse((ROOT / "medseg" / "components.pyi").read_text(encoding="utf-8"))
    listed = {a.name: str(n.module) for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names}
    listed |= {name: entry.module for name, entry in NETWORKS.items()}
    defined = {
        target.id if isinstance(target, ast.Name) else getattr(node, "name", "")
        for node in ast.parse(source).body
        for target in (getattr(node, "targets", None) or [getattr(node, "target", node)])
    }
    found = {}
    for name in importlib.import_module(package).__all__:
        home = homes.get(name) or (package if name in defined else listed.get(name))
        if home is None:
            raise LookupError(f"{package}.{name}: no import in its __init__.py says which module defines it")
        if not name.startswith("__"):
            found[name] = home
    return found


# Model cards


def model_pages() -> dict[str, str]:
    """Return the page of each shipped bundle, from its model card and metadata, and the gallery."""
    bundles = [Bundle(path.parent) for path in sorted((ROOT / "bundles").glob("*/bundle.json"))]
    pages = {f"models/{bundle.name}.md": _model_page(bundle) for bundle in bundles}
    return {"models/index.md": _gallery(bundles), **pages}


def _gallery(bundles: list[Bundle]) -> str:
    rows = {True: [], False: []}
    for bundle in bundles:
        rows[bundle.weights.is_file()].append(_tile(bundle))
    return "\n".join([
        *_GALLERY_HEAD,
        "## With weights",
        "",
        "These predict at once.",
        "",
        *_grid(rows[True]),
        "## Recipes",
        "",
        "These are trained first, on data that the model card names, with its source, license and layout. There is no",
        "picture of a network without weights.",
        "",
        *_grid(rows[False]),
    ])


_GALLERY_HEAD = (
    "# Models",
    "",
    "Bundles that come with medseg, each with its model card: what it segments, what it was trained on, what it measured,",
    "what it cannot do. `medseg bundle list` shows them in the terminal;",
    "[check a data set](../how-to/check-data.md#against-a-bundle) before you train or predict with one.",
    "",
)


def _grid(tiles: list[str]) -> list[str]:
    return ['<div class="grid cards" markdown>', "", *tiles, "</div>", ""]


def _tile(bundle: Bundle) -> str:
    text = str(bundle.metadata.get("description", "")).split(". ")[0].rstrip(".")
    lines = [f"-   **[{bundle.name}]({bundle.name}.md)**", "", *_picture(bundle, link=True), f"    {text}.", ""]
    terms = str(bundle.metadata.get("data_source", "")).rstrip(".")
    return "\n".join([*lines, f"    <small>Data: {terms}</small>", ""])


def _picture(bundle: Bundle, *, link: bool = False) -> list[str]:
    name = f"models/{bundle.name}.png" if bundle.name in CREDITS else "demo.png" if "phantom" in bundle.name else ""
    if not name:
        return []
    image = f"![Mask of {bundle.name}](../assets/{name})"
    return [f"    [{image}]({bundle.name}.md)", ""] if link else [image, "", f"<small>{_credit(bundle.name)}</small>", ""]


def _credit(name: str) -> str:
    if name not in CREDITS:
        return "A generated phantom: mask of the network, reference label dashed."
    credit = CREDITS[name]
    return (
        f"Validation case {credit['case']}: mask of the network, reference label dashed. Image: {credit['source']}, "
        f"{credit['license']}; the picture is under the same license."
    )


def _model_page(bundle: Bundle) -> str:
    title, _, body = (bundle.root / "docs" / "README.md").read_text(encoding="utf-8").partition("\n")
    body = re.sub(r"\]\(\.\./\.\./(\w+)/docs/README\.md\)", r"](\1.md)", body)
    body = re.sub(r"\]\((\w+\.txt)\)", rf"]({CODE}/bundles/{bundle.name}/docs/\1)", body)
    return "\n".join([title, "", *_picture(bundle), body.strip(), "", *_facts(bundle), *_references(bundle)])


def _facts(bundle: Bundle) -> list[str]:
    metadata, source = bundle.metadata, f"{CODE}/bundles/{bundle.name}"
    shape = metadata["network_data_format"]["inputs"]["image"]
    weights = ", ".join(str(one.get("license", "")) for one in metadata.get("weights", {}).values())
    network = json.loads((bundle.root / "bundle.json").read_text(encoding="utf-8"))["network_def"]["_target_"]
    facts = {
        "Version": metadata.get("version"),
        "Network": f"`{network.rpartition('.')[2]}`, {len(shape['spatial_shape'])}D",
        "Input": metadata.get("image_classes"),
        "Labels": metadata.get("label_classes"),
        "Data": metadata.get("data_source"),
        "Weights": weights or "none shipped",
        "Intended use": metadata.get("intended_use"),
        "Files": f"[bundle.json]({source}/bundle.json), [configs]({source}/configs)",
    }
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value]
    return ["## Facts", "", "| | |", "|---|---|", *rows, ""]


def _references(bundle: Bundle) -> list[str]:
    found = bundle.metadata.get("references", [])
    return ["## References", "", *(f"- {one}" for one in found), ""] if found else []
