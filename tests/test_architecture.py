"""The house rules that a reader relies on: who imports whom, what is public, what is light."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import medseg

PACKAGE = Path(medseg.__file__).parent
# A room imports from lower floors only; rooms of one floor do not know each other.
FLOORS = {
    0: ("errors", "types", "version", "extras", "files", "lazy", "machine", "notices", "manifest", "components"),
    1: ("networks", "losses", "metrics", "io"),
    2: ("transforms",),
    3: ("inferers",),
    4: ("bundle", "training", "checks", "scoring", "reporting"),
    5: ("jobs",),
    6: ("planning", "diagnosis", "tools"),
    7: ("cluster",),
    8: ("label", "service", "studies"),
    9: ("cli",),
    10: ("__main__",),
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
MODULES = sorted(name for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "medseg.") if name != "medseg.__main__")


def _edges() -> list[tuple[str, str]]:
    edges = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
            for name in names:
                target = name.split(".")
                if target[0] == "medseg" and len(target) > 1 and target[1] != parts[0]:
                    edges.append((parts[0], target[1]))
    return sorted(set(edges))


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} <= set(FLOOR)


@pytest.mark.parametrize(("room", "imported"), _edges())
def test_imports_lead_down(room: str, imported: str) -> None:
    same_ground = FLOOR[room] == FLOOR[imported] == 0
    assert FLOOR[imported] < FLOOR[room] or same_ground, f"medseg.{room} must not import medseg.{imported}"


def test_the_ground_floor_has_no_circle() -> None:
    ground = {edge for edge in _edges() if FLOOR[edge[0]] == 0}
    assert not {(b, a) for a, b in ground} & ground


@pytest.mark.parametrize("name", MODULES)
def test_all_lists_exactly_the_public_names_defined_here(name: str) -> None:
    module = importlib.import_module(name)
    listed = module.__all__
    assert len(listed) == len(set(listed))
    assert all(hasattr(module, item) for item in listed)
    defined = {
        item
        for item, value in vars(module).items()
        if not item.startswith("_") and getattr(value, "__module__", None) == name and callable(value)
    }
    assert defined <= set(listed)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["predict", "--help"],
        ["bundle", "list"],
        ["bundle", "list", "--json"],
        ["bundle", "inspect", "phantom_ct_unet"],
        ["bundle", "check", "no_such_bundle"],
        ["export", "no_such_bundle", "--format", "onnx", "-o", "x.onnx"],
        ["prune", "no_such_bundle", "--data", "."],
        ["label", "serve", "--studies", "missing"],
        ["label", "add-account", "--help"],
        ["predict", "no_such_bundle", "x.nii.gz", "-o", "out"],
        ["predict", "hippocampus_mri_unet", "missing.nii.gz", "-o", "out"],
        ["train", "phantom_ct_unet", "--data", "missing"],
        ["train", "phantom_ct_unet", "--data", ".", "--set", "max_epoch=3"],
        ["evaluate", "phantom_ct_unet", "--data", "missing"],
        ["doctor", "missing"],
        ["plan", "missing", "-o", "out"],
        ["compare", "missing", "missing_too"],
        ["train", "phantom_ct_unet", "--data", "missing", "--folds", "3", "-o", "out"],
        ["convert", "missing.npz", "--from", "unet-port", "--to", "x_y_z", "--like", "phantom_ct_unet"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_nothing_heavy_is_imported_before_the_arguments_are_checked(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'monai', 'numpy', 'nibabel', 'SimpleITK', 'PIL'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['medseg', *{arguments!r}]\n"
        "from medseg.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert "HEAVY []" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (
        2 if "missing" in str(arguments) or "no_such" in str(arguments) or "--set" in arguments else 0
    )
