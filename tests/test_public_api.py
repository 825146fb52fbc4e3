"""The public names: one list, light to import, never hidden by a room, with typed results."""

from __future__ import annotations

import inspect
import json
import pkgutil
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import medseg
from medseg.bundle.catalog import Bundle
from medseg.lazy import listed
from medseg.manifest import BundleRecord, Manifest

STUB = Path(medseg.__file__).with_suffix(".pyi")
FUNCTIONS = (*("compare", "convert", "doctor", "evaluate", "export", "load", "plan", "predict", "prune", "train"),)
RESULTS = {
    "compare": "Comparison",
    "convert": "Conversion",
    "doctor": "Findings",
    "evaluate": "Manifest",
    "export": "ExportResult",
    "load": "MetaTensor",
    "plan": "Plan",
    "predict": "Manifest",
    "prune": "PruneTable",
    "train": "Manifest",
}


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dir_shows_exactly_the_public_names() -> None:
    assert dir(medseg) == sorted([*FUNCTIONS, "Predictor", "__version__"])
    assert set(medseg.__all__) == set(dir(medseg))
    assert set(listed(STUB)) == set(dir(medseg))


def test_importing_and_listing_load_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, medseg; dir(medseg); print(*sorted({'torch', 'monai', 'numpy', 'typer'} & set(sys.modules)))"
    assert run(code, tmp_path).strip() == ""


def test_no_module_hides_a_public_name(tmp_path: Path) -> None:
    code = """
import importlib, json, pkgutil, warnings
import medseg
warnings.simplefilter("ignore")
for _, name, _ in pkgutil.walk_packages(medseg.__path__, "medseg."):
    if not name.endswith("__main__"):
        importlib.import_module(name)
kinds = {name: type(getattr(medseg, name)).__name__ for name in dir(medseg)}
print("KINDS" + json.dumps(kinds))
"""
    kinds = json.loads(run(code, tmp_path).partition("KINDS")[2])
    expected: dict[str, str] = dict.fromkeys(FUNCTIONS, "function")
    assert kinds == {**expected, "Predictor": "type", "__version__": "str"}


def test_no_room_bears_the_name_of_a_public_function() -> None:
    rooms = {name for _, name, _ in pkgutil.iter_modules(medseg.__path__)}
    assert not rooms & {*FUNCTIONS, "Predictor", "score", "report"}


def test_help_shows_every_function_with_its_arguments() -> None:
    text = pydoc.plain(pydoc.render_doc(medseg))
    for name in FUNCTIONS:
        first = str(inspect.getdoc(getattr(medseg, name))).splitlines()[0]
        assert f"    {name}(" in text
        assert first in text
    assert "class Predictor" in text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_typed(name: str) -> None:
    assert inspect.signature(getattr(medseg, name)).return_annotation == RESULTS[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented(name: str) -> None:
    function = getattr(medseg, name)
    documented = str(inspect.getdoc(function)).partition("Args:")[2].partition("Raises:")[0]
    for argument in inspect.signature(function).parameters:
        assert f"    {argument}: " in documented


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'medseg' has no attribute 'predcit'"):
        medseg.predcit  # type: ignore[attr-defined]  # noqa: B018


INVALID = {
    "compare": "medseg.compare(['missing', 'missing_too'])",
    "convert": "medseg.convert('missing.npz', 'unet-port', 'x_y_z')",
    "doctor": "medseg.doctor('missing')",
    "evaluate": "medseg.evaluate('phantom_ct_unet', 'missing')",
    "export": "medseg.export('phantom_ct_unet', 'onxx', 'a.onnx')",
    "load": "medseg.load('missing.nii.gz')",
    "plan": "medseg.plan('missing', 'out')",
    "predict": "medseg.predict('hippocampus_mri_unet', 'missing.nii.gz', 'out')",
    "prune": "medseg.prune('hippocampus_mri_unet', 'missing')",
    "train": "medseg.train('phantom_ct_unet', 'missing')",
    "Predictor": "medseg.Predictor('hippocampus_mri_unet', overlop=0.5)",
}


@pytest.mark.parametrize("name", [*FUNCTIONS, "Predictor"])
def test_arguments_are_checked_before_anything_heavy_is_imported(name: str, tmp_path: Path) -> None:
    code = f"""
import sys, medseg
try:
    {INVALID[name]}
except medseg.errors.MedsegError as error:
    print("CODE", error.code, *sorted({{'torch', 'monai', 'numpy'}} & set(sys.modules)))
"""
    out = run(code, tmp_path).split()
    assert out[0] == "CODE"
    assert out[2:] == []


def test_a_manifest_prints_what_a_reader_asks_first(tmp_path: Path) -> None:
    manifest = Manifest("predict", bundle=BundleRecord("liver_ct_unet", "0.1.0"), path=tmp_path / "manifest.json")
    manifest.notes.append("started from old.pt")
    with manifest:
        for name in ("a.nii.gz", "b.nii.gz"):
            with manifest.case(name) as record:
                record.output = name
        with manifest.case("c.nii.gz"):
            raise medseg.errors.CaseError("c.nii.gz is empty")
    assert str(manifest).splitlines() == [
        "predict with liver_ct_unet 0.1.0: partial, 2 done, 1 failed",
        "note: started from old.pt",
        "failed: c.nii.gz: c.nii.gz is empty",
        f"manifest: {tmp_path / 'manifest.json'}",
    ]


def test_the_functions_work_without_the_command_line(trained: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    found = medseg.doctor(tiny_data, bundle=trained.root)
    assert len(found.cases) == 4
    assert found.exit_code == 0
    assert "4 cases, 0 errors" in str(found)
    made = medseg.plan(tiny_data, tmp_path / "balls_mri_unet", measure=False, settings={"max_epochs": 1})
    assert made.root == tmp_path / "balls_mri_unet"
    assert made.bundle["knobs"]["max_epochs"] == 1
    assert "max_epochs = 1: set by the user" in str(made)
    exported = medseg.export(trained.root, "ts", tmp_path / "model.ts")
    assert exported.bytes == (tmp_path / "model.ts").stat().st_size
    scores = medseg.evaluate(trained.root, tiny_data, output=tmp_path / "scores")
    assert scores.counts["done"] == 1
