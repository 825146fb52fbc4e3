"""Public names, listed once in a stub and loaded on first use.

Type checkers and editors read the same stub. Listing the names imports neither torch nor MONAI.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

__all__ = ["exports", "listed", "room"]

# What a module assigns to `__getattr__`, `__dir__` and `__all__`.
Exports: TypeAlias = tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]

_COMPONENTS: Final = Path(__file__).with_name("components.pyi")


def listed(stub: Path) -> dict[str, str]:
    """Return the defining module of each name that a stub imports from medseg: `from medseg.io import load as load`."""
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module is not None]
    return {
        alias.name: str(node.module)
        for node in imports
        for alias in node.names
        if str(node.module).partition(".")[0] == "medseg"
    }


def exports(package: str, modules: Mapping[str, str]) -> Exports:
    """Return `__getattr__`, `__dir__` and `__all__` of a module whose public names are loaded on first use.

    Args:
        package: Name of the module.
        modules: Module that defines each public name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    names = sorted(modules)
    return get, lambda: names, names


def room(package: str) -> Exports:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose components `components.pyi` lists."""
    parts = listed(_COMPONENTS)
    return exports(package, {name: module for name, module in parts.items() if module.startswith(f"{package}.")})
