"""What pyproject.toml requires against what the package imports."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import medseg
from medseg import extras
from medseg.errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = Path(medseg.__file__).parent
# The label app runs in an environment of its own, which this file lists.
LABEL_APP = "label/app/"
LABEL_PINS = ROOT / "constraints-label.txt"
# Base requirements that another one imports for us -> what of it we use.
IMPORTED_BY_OTHERS = {"tensorboard": "torch.utils.tensorboard", "fire": "monai.bundle"}
# Requirements that are found by their own means: plug-ins of pydicom, a shared library, the readers of ITK.
PLUG_INS = {"pylibjpeg", "pylibjpeg-rle", "openslide-bin", "itk-io"}
FOR_DEVELOPERS = {"dev", "docs"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distributions() -> dict[str, set[str]]:
    """Top-level import name -> the distributions that install it."""
    found = defaultdict(set)
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            found[file.parts[0].partition(".")[0]].add(normalized(distribution.metadata["Name"]))
    return found


class Imports(ast.NodeVisitor):
    """The modules that a file imports, and those that it names in a call of `require` or `import_module`."""

    def __init__(self) -> None:
        self.plain: set[str] = set()
        self.checked: set[str] = set()
        self.texts: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.plain |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.plain.add(node.module or "")

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in ("require", "import_module") and node.args and isinstance(node.args[0], ast.Constant):
            self.checked.add(node.args[0].value)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.texts.add(node.value)


def imports(label_app: bool) -> Imports:
    found = Imports()
    for path in PACKAGE.rglob("*.py"):
        if path == Path(extras.__file__):
            continue
        if path.relative_to(PACKAGE).as_posix().startswith(LABEL_APP) is label_app:
            found.visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def foreign(modules: set[str]) -> set[str]:
    roots = {module.partition(".")[0] for module in modules}
    return roots - set(sys.stdlib_module_names) - {"medseg", "__future__", ""}


BASE = {normalized(line) for line in project()["dependencies"]}
OPTIONAL = project()["optional-dependencies"]
INSTALLED = distributions()
OURS = imports(label_app=False)


@pytest.mark.parametrize("module", sorted(foreign(OURS.plain)))
def test_each_import_is_a_base_requirement(module: str) -> None:
    assert INSTALLED[module] & BASE, f"`import {module}` needs a base requirement, or `medseg.extras.require`"


@pytest.mark.parametrize("requirement", sorted(BASE))
def test_each_base_requirement_is_imported(requirement: str) -> None:
    if requirement in IMPORTED_BY_OTHERS:
        assert IMPORTED_BY_OTHERS[requirement] in OURS.plain | OURS.texts
        return
    assert any(requirement in INSTALLED[module] for module in foreign(OURS.plain))


@pytest.mark.parametrize("module", sorted(foreign(OURS.checked)))
def test_each_checked_import_is_of_an_extra_or_the_base(module: str) -> None:
    in_extras = any(module in modules for modules in extras.EXTRAS.values())
    assert in_extras or INSTALLED[module] & BASE


def test_the_extras_are_those_of_the_project() -> None:
    assert set(extras.EXTRAS) == set(OPTIONAL) - FOR_DEVELOPERS


def test_the_readme_lists_the_extras() -> None:
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert set(OPTIONAL) <= listed


@pytest.mark.parametrize("extra", sorted(extras.EXTRAS))
def test_an_extra_lists_what_its_modules_are_installed_by(extra: str) -> None:
    required = {normalized(line) for line in OPTIONAL[extra]}
    found = {module: INSTALLED.get(module, {module}) & required for module in extras.EXTRAS[extra]}
    assert all(found.values()), found
    assert required - PLUG_INS <= set().union(*found.values())
    assert not required & BASE


@pytest.mark.parametrize("extra", sorted(extras.EXTRAS))
def test_the_package_uses_each_module_of_an_extra(extra: str) -> None:
    assert set(extras.EXTRAS[extra]) <= OURS.texts


def test_the_label_app_imports_what_its_environment_lists() -> None:
    pins = {normalized(line) for line in LABEL_PINS.read_text(encoding="utf-8").splitlines() if "==" in line}
    # Read off the names alone: this environment is another one.
    names = {"jwt": "pyjwt", "ignite": "pytorch-ignite", "PIL": "pillow", "SimpleITK": "simpleitk"}
    assert {normalized(names.get(module, module)) for module in foreign(imports(label_app=True).plain)} <= pins


def test_every_constraint_is_of_one_version_per_python() -> None:
    seen = defaultdict(list)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            seen[normalized(line)].append(line.partition(";")[2].strip())
    assert set(seen) >= BASE
    repeated = {name: markers for name, markers in seen.items() if len(markers) > 1}
    assert repeated
    assert all("" not in markers and len(set(markers)) == len(markers) for markers in repeated.values())


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        RequestError, match=r'^Logging needs mlflow, which is not installed: .*"medseg\[mlflow\]"$'
    ) as error:
        extras.require("mlflow.tracking", "Logging")
    assert (error.value.code, error.value.data["package"]) == ("missing-package", "mlflow")
    assert not extras.installed("mlflow")


def test_a_package_that_does_not_load_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openslide.py").write_text("raise OSError('libopenslide.so.1: cannot open')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openslide", raising=False)
    with pytest.raises(RequestError, match=r"needs openslide, which cannot be imported \(OSError: libopenslide"):
        extras.require("openslide", "Reading slides")
