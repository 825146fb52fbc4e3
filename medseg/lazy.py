"""Lists of public names that are kept once, in a stub: type checkers, editors and the modules themselves read it."""

from __future__ import annotations

import ast
from pathlib import Path

__all__ = ["listed"]


def listed(stub: Path) -> dict[str, str]:
    """Return the module of each name that a stub takes from medseg: `from medseg.io import load as load`."""
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module is not None]
    return {
        alias.name: str(node.module)
        for node in imports
        for alias in node.names
        if str(node.module).partition(".")[0] == "medseg"
    }
