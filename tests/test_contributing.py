"""The recipes of CONTRIBUTING.md work to the letter in a copy of the package, and touch no more than they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.build import build
from medseg.networks import UNet
from medseg.training.checkpoint import save_tensors

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = ("network", "format", "transform", "metric")
_BLOCK = re.compile(r'^( *)```(\w+) title="([^"]+)"\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of a recipe: a whole file, or lines to add to one."""

    kind: str
    path: str
    lines: list[str]

    def apply(self, folder: Path) -> None:
        """Do what the block says."""
        file = folder / self.path
        if self.kind == "diff":
            before = "\n".join(line[1:] for line in self.lines if line[:1] == " ")
            after = "\n".join(line[1:] for line in self.lines)
            assert {line[:1] for line in self.lines} == {" ", "+"}, f"{self.path}: a recipe only adds lines"
            text = file.read_text(encoding="utf-8")
            assert text.count(f"{before}\n") == 1, f"{self.path} has these lines not once:\n{before}"
            file.write_text(text.replace(f"{before}\n", f"{after}\n"), encoding="utf-8")
        else:
            assert not file.exists(), f"{self.path} is there already"
            file.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def blocks(recipe: str) -> list[Block]:
    """Return the blocks of the section that shows how to add a part."""
    (section,) = re.findall(rf"^## A {recipe}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return [
        Block(kind, path, [line[len(indent) :] for line in code.rstrip("\n").split("\n")])
        for indent, kind, path, code in _BLOCK.findall(section)
    ]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, of the tests' settings, and of the shared test of the networks."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / "medseg", folder / "medseg", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/networks/forms.py", "tests/networks/test_contract.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for room in ("io/formats", "transforms", "metrics"):
        (folder / "tests" / room).mkdir(parents=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def follow(recipe: str, folder: Path) -> None:
    for block in blocks(recipe):
        block.apply(folder)


def run(folder: Path, *command: str) -> str:
    """Run Python in the copy and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def run_tests(folder: Path, *arguments: str) -> int:
    """Run tests in the copy and return how many passed."""
    said = run(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments)
    return int(re.findall(r"(\d+) passed", said)[-1])


def run_code(folder: Path, code: str) -> None:
    header = f"import medseg\nassert medseg.__file__.startswith({str(folder)!r})\n"
    run(folder, "-W", "ignore", "-c", header + code)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_part_takes_a_module_one_line_in_one_list_and_a_test(recipe: str, copy: Path) -> None:
    before = contents(copy)
    follow(recipe, copy)
    after = contents(copy)
    written = sorted(after.keys() - before.keys())
    lists = [name for name in before if before[name] != after[name]]
    assert [name.split("/")[0] for name in written] == ["medseg", "tests"]
    assert len(lists) == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_keep_the_style_of_the_house(recipe: str, copy: Path) -> None:
    follow(recipe, copy)
    files = [block.path for block in blocks(recipe)]
    run(copy, "-m", "ruff", "check", "--no-cache", *files)
    run(copy, "-m", "ruff", "format", "--no-cache", "--check", *files)


@pytest.mark.slow
def test_the_network_passes_the_shared_tests_and_can_be_planned(copy: Path) -> None:
    follow("network", copy)
    tests = len(re.findall(r"^def test_", (copy / "tests/networks/test_contract.py").read_text(), re.MULTILINE))
    assert run_tests(copy, "tests/networks/test_contract.py", "-k", "ToyNet") >= 2 * tests
    assert run_tests(copy, "tests/networks/test_toynet.py") == 1
    run_code(copy, _PLANNED)


_PLANNED = """
from monai.bundle import ConfigParser
from medseg.bundle.allowed import ALLOWED
from medseg.networks import ToyNet, small
from medseg.planning.geometry import Layout
from medseg.planning.network_sizing import max_poolings, network_def
from medseg.planning.request import parse_network

assert parse_network("toynet") == ("ToyNet", False)
assert max_poolings("ToyNet", 3) == 1
definition = network_def("ToyNet", 3, 1, 2, 16, Layout((32, 32, 16), ((2, 2, 1),), True), "instance")
network = ConfigParser({"network_def": definition}).get_parsed_content("network_def")
assert type(network) is ToyNet and network.step == (2, 2, 1)
ToyNet(2, 1, 2, **small("ToyNet", 2))
assert "ToyNet" in ALLOWED["medseg"]["medseg.components"].split()
"""


@pytest.mark.slow
def test_predict_reads_and_writes_the_format(copy: Path, make_bundle: Any, tiny_source: dict[str, Any]) -> None:
    bundle = make_bundle({**tiny_source, "name": "toy_mri_unet"})
    arguments = {name: value for name, value in tiny_source["network_def"].items() if name != "_target_"}
    bundle.weights.parent.mkdir()
    save_tensors(UNet(**arguments).state_dict(), bundle.weights)
    build(bundle)
    follow("format", copy)
    assert run_tests(copy, "tests/io/formats/test_toy.py") == 3
    run_code(copy, f"root = {json.dumps(str(bundle.root))}\n{_PREDICTED}")


_PREDICTED = """
import sys
from pathlib import Path
import numpy as np
from medseg.cli import main
from medseg.io import Grid, load, read_grid, write_mask
from medseg.io.formats import toy

affine = np.array([[0, -2.0, 0, 7], [2, 0, 0, -3], [0, 0, 3, 1 / 3], [0, 0, 0, 1]])
array = np.random.default_rng(0).random((20, 24, 12), dtype=np.float32)
with open("a.toy", "wb") as stream:
    toy.write(stream, array, Path("a.toy"), grid=Grid(array.shape, affine), like=None)
write_mask(np.zeros(array.shape), "b.nii.gz", like="a.toy")
for image, more in (("a.toy", []), ("b.nii.gz", ["--set", "output_format=toy"])):
    sys.argv = ["medseg", "predict", root, image, "-o", "masks", "--device", "cpu", *more]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    mask = load(f"masks/{image.split('.')[0]}.toy", label=True)
    assert mask.shape == (1, *array.shape) and np.array_equal(mask.affine.numpy(), read_grid(image).affine)
"""


@pytest.mark.slow
def test_configs_and_slides_know_the_transform(copy: Path) -> None:
    follow("transform", copy)
    assert run_tests(copy, "tests/transforms/test_invert.py") == 1
    run_code(copy, _TRANSFORMED)


_TRANSFORMED = """
from monai.bundle import ConfigParser
from medseg.bundle.allowed import ALLOWED
from medseg.transforms.traits import refuse_unmapped, traits_of

config = {"_target_": "medseg.components.InvertIntensityd", "keys": "image", "maximum": 255}
step = ConfigParser({"step": config}).get_parsed_content("step")
refuse_unmapped(step)
assert traits_of(step).is_per_pixel(step)
assert "InvertIntensityd" in ALLOWED["medseg"]["medseg.components"].split()
"""


@pytest.mark.slow
def test_configs_know_the_metric(copy: Path) -> None:
    follow("metric", copy)
    assert run_tests(copy, "tests/metrics/test_sensitivity.py") == 1
    run_code(copy, _MEASURED)


_MEASURED = """
from monai.bundle import ConfigParser
from monai.handlers import IgniteMetricHandler
from medseg.bundle.allowed import ALLOWED

config = {
    "_target_": "medseg.components.Sensitivity",
    "output_transform": {"_target_": "monai.handlers.from_engine", "keys": ["pred", "label"]},
}
assert isinstance(ConfigParser({"metric": config}).get_parsed_content("metric"), IgniteMetricHandler)
assert "Sensitivity" in ALLOWED["medseg"]["medseg.components"].split()
"""
