"""Pruning a trained UNet++ bundle: honest numbers for each level, and a bundle that is exactly the level it claims."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from medseg.bundle.build import build
from medseg.bundle.catalog import Bundle
from medseg.cli import main
from medseg.errors import BundleError, CaseError, MedsegError, RequestError, WeightsError
from medseg.files import sha256_file
from medseg.jobs import api, runner
from medseg.jobs.job import prepare
from medseg.tools import prune as module
from medseg.tools.check import check_bundle
from medseg.tools.prune import LevelResult, PruneTable, prune

LEVELS = ("L1", "L2", "L3", "mean")
SPLIT = "train"  # three cases; the validation part has one
NAME = "balls_mri_unetplusplus"


def _change(bundle: Bundle, **network: Any) -> Bundle:
    source = json.loads((bundle.root / "bundle.json").read_text())
    source["network_def"] |= network
    (bundle.root / "bundle.json").write_text(json.dumps(source))
    build(bundle)
    return bundle


def _copy(bundle: Bundle, folder: Path) -> Bundle:
    return Bundle(Path(shutil.copytree(bundle.root, folder / bundle.name, ignore=shutil.ignore_patterns("runs"))))


@pytest.fixture(scope="module")
def full(make_bundle: Any, trained: Bundle, tiny_data: Path) -> Bundle:
    """The tiny bundle with a UNet++ of three levels, trained. Not to be changed: copy it first."""
    source = json.loads((trained.root / "bundle.json").read_text())
    source["network_def"] |= {"_target_": "medseg.components.UNetPlusPlus", "features": [4, 6, 8, 8]}
    loss = {"_target_": "medseg.components.DeepSupervision", "loss": {"block": "loss"}, "weights": [1.0, 1.0, 2.0]}
    bundle: Bundle = make_bundle({**source, "name": NAME, "blocks": {"training_loss": loss}})
    (bundle.root / "docs").mkdir()
    (bundle.root / "docs" / "README.md").write_text("About balls.\n")
    (bundle.root / "LICENSE").write_text("Free.\n")
    runner.train(prepare("train", bundle, {}, paths={"dataset_dir": str(tiny_data), "resume": False}))
    (bundle.root / "models" / "LICENSE.txt").write_text("Free weights.\n")
    return bundle


@pytest.fixture(scope="module")
def pruned(full: Bundle, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PruneTable, Bundle, Any]:
    """The table, the bundle of the level selected by it, and the reports of progress."""
    target = tmp_path_factory.mktemp("pruned") / "balls_mri_small"
    told: list[tuple[float, int, str]] = []
    table = prune(full.root, tiny_data, split=SPLIT, select=0.05, output=target, report=lambda *it: told.append(it))
    return table, Bundle(target), told


def _with_output(full: Bundle, level: str, folder: Path) -> Bundle:
    """The full network, all weights, told to give the output of that level."""
    output = {"output_mode": "mean", "head_activation": "softmax"} if level == "mean" else {"head": int(level[1:])}
    return _change(_copy(full, folder), **output)


def _selecting(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the measured scores be such that this level is the smallest of the good ones."""
    answers = iter(
        {"device": "cpu", "peak_memory_mib": 1.0, "milliseconds": 1.0, "dice": float(name == level), "iou": 0.5}
        for name in LEVELS
    )
    monkeypatch.setattr(module, "_in_own_process", lambda request, tell: next(answers))


def _masks(bundle: Bundle, data: Path, output: Path) -> dict[str, Any]:
    api.predict(bundle.root, data / "imagesTr", output)
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(output.glob("*.nii.gz"))}


@pytest.mark.slow
def test_the_table_holds_every_level_and_sizes_grow_with_it(pruned: Any) -> None:
    table = pruned[0]
    assert tuple(row.level for row in table.levels) == LEVELS
    counts = [row.parameters for row in table.levels]
    assert counts == sorted(set(counts))
    for row in table.levels:
        assert row.megabytes == pytest.approx(row.parameters * 4e-6)
        # A process with torch in it, measured in MiB, not in KiB or bytes.
        assert 100 < row.peak_memory_mib < 20_000
        assert 0 < row.milliseconds < 60_000
        assert 0 < row.iou < row.dice < 1
    assert (table.bundle, table.split, table.cases, table.device) == (NAME, SPLIT, 3, "cpu")
    assert table.to_dict()["levels"][1]["dice"] == table.levels[1].dice


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_scores_in_the_table_are_those_of_the_full_network_with_that_output(
    level: str, pruned: Any, full: Bundle, tiny_data: Path, tmp_path: Path
) -> None:
    manifest = api.evaluate(_with_output(full, level, tmp_path).root, tiny_data, split=SPLIT, output=tmp_path / "out")
    row = pruned[0].levels[LEVELS.index(level)]
    metrics = [record.metrics for record in manifest.cases.values()]
    assert row.dice == pytest.approx(fmean(m["mean"] for m in metrics), abs=1e-9)
    iou = [fmean(m[label] / (2 - m[label]) for label in ("small", "large")) for m in metrics]
    assert row.iou == pytest.approx(fmean(iou), abs=1e-9)


@pytest.mark.slow
def test_iou_is_intersection_over_union_of_the_written_masks(pruned: Any, tiny_data: Path, tmp_path: Path) -> None:
    table, bundle, _ = pruned
    cases = json.loads((tiny_data / "dataset.json").read_text())["training"]
    masks = _masks(bundle, tiny_data, tmp_path)
    found = []
    for case in cases:
        label = np.asarray(nibabel.load(tiny_data / case["label"]).dataobj)
        mask = masks[Path(case["image"]).name]
        pairs = [(mask == value, label == value) for value in (1, 2)]
        found.append(fmean((a & b).sum() / (a | b).sum() for a, b in pairs))
    row = next(row for row in table.levels if row.level == table.selected)
    assert row.iou == pytest.approx(fmean(found), abs=1e-6)


@pytest.mark.slow
def test_the_written_bundle_scores_as_the_table_says(pruned: Any, tiny_data: Path, tmp_path: Path) -> None:
    table, bundle, _ = pruned
    manifest = api.evaluate(bundle.root, tiny_data, split=SPLIT, output=tmp_path)
    row = next(row for row in table.levels if row.level == table.selected)
    assert row.dice == pytest.approx(fmean(r.metrics["mean"] for r in manifest.cases.values()), abs=1e-9)
    best = max(row.dice for row in table.levels)
    smaller = table.levels[: table.levels.index(row)]
    assert row.dice >= best - 0.05
    assert all(other.dice < best - 0.05 for other in smaller)


@pytest.mark.slow
def test_the_written_bundle_is_complete(pruned: Any, full: Bundle) -> None:
    bundle = pruned[1]
    assert not {name: text for name, text in check_bundle(bundle).items() if text}
    for name in ("docs/README.md", "LICENSE", "models/LICENSE.txt"):
        assert (bundle.root / name).read_bytes() == (full.root / name).read_bytes()
    assert [path.name for path in bundle.root.parent.iterdir()] == [bundle.name]


@pytest.mark.slow
def test_progress_only_grows_and_ends_at_the_total(pruned: Any) -> None:
    told = pruned[2]
    done = [step[0] for step in told]
    assert done == sorted(done)
    assert {step[1] for step in told} == {len(LEVELS) * (3 + 1)}
    assert done[-1] == told[-1][1]
    assert {step[2].split(":")[0] for step in told} == set(LEVELS)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_pruned_bundle_writes_the_masks_of_the_full_network_with_that_head(
    level: str, full: Bundle, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _selecting(level, monkeypatch)
    target = tmp_path / "balls_mri_pruned"
    assert prune(full.root, tiny_data, select=0.01, output=target).selected == level
    expected = _masks(_with_output(full, level, tmp_path), tiny_data, tmp_path / "expected")
    found = _masks(Bundle(target), tiny_data, tmp_path / "found")
    assert len(found) == 4
    assert all(np.array_equal(found[name], mask) for name, mask in expected.items())
    assert any(mask.any() for mask in found.values())
    state = torch.load(target / "models" / "model.pt", weights_only=True)
    whole = torch.load(full.weights, weights_only=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())
    assert len(state) < len(whole) or level == "mean"
    assert Bundle(target).metadata["weights"]["models/model.pt"]["sha256"] == sha256_file(Bundle(target).weights)


def test_a_pruned_bundle_can_be_trained_although_its_source_weighs_three_heads(
    full: Bundle, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _selecting("L2", monkeypatch)
    target = tmp_path / "balls_mri_pruned"
    prune(full.root, tiny_data, select=0.01, output=target)
    manifest = api.train(target, tiny_data, settings={"max_epochs": 2}, overwrite=True)
    assert [entry["epoch"] for entry in manifest.validations] == [2]


@pytest.mark.parametrize(
    ("scores", "loss", "selected"),
    [
        ((0.5, 0.8, 0.9, 0.9), 0.0, 2),
        ((0.5, 0.89, 0.9, 0.9), 0.02, 1),
        ((0.9, 0.8, 0.7, 0.8), 0.01, 0),
        ((0.5, 0.6, 0.7, 0.9), 0.1, 3),
        ((None, 0.6, 0.7, None), 0.2, 1),
    ],
)
def test_the_smallest_level_within_the_loss_is_selected(
    scores: tuple[float | None, ...], loss: float, selected: int
) -> None:
    rows = [LevelResult(f"L{n}", n, n, n, n, dice, dice) for n, dice in enumerate(scores)]
    assert module._smallest(rows, loss) == selected


def test_nothing_is_selected_where_nothing_could_be_scored() -> None:
    with pytest.raises(CaseError, match="cannot be compared"):
        module._smallest([LevelResult("L1", 1, 1, 1, 1, None, None)], 0.01)


@pytest.mark.slow
def test_a_case_that_cannot_be_read_ends_the_comparison_and_writes_nothing(
    full: Bundle, tiny_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    broken = data / json.loads((data / "dataset.json").read_text())["validation"][0]["image"]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(CaseError, match=broken.name):
        prune(full.root, data, select=0.01, output=tmp_path / "balls_mri_pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORKER", "import sys; sys.stdin.read(); sys.exit('no more memory')")
    with pytest.raises(MedsegError, match=r"code 1 \(no more memory\)"):
        module._in_own_process({}, lambda *_: None)


def test_a_process_that_does_not_listen_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORKER", "import os; os.close(0); raise SystemExit('not today')")
    with pytest.raises(MedsegError, match="not today"):
        module._in_own_process({"much": "x" * 10_000_000}, lambda *_: None)


def test_a_bundle_that_is_scored_by_something_else_is_refused(full: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    bundle = _copy(full, tmp_path)
    config = json.loads(bundle.config_path("train").read_text())
    config["validate"]["key_metric"]["val_mean_dice"]["_target_"] = "monai.handlers.MeanIoUHandler"
    bundle.config_path("train").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"MeanIoUHandler.* compared by Dice"):
        prune(bundle.root, tiny_data)


@pytest.mark.parametrize("changes", [{"validate": []}, {"validate": {"key_metric": {"a": 3}}}])
def test_configs_of_a_wrong_form_are_refused(
    changes: dict[str, Any], full: Bundle, tiny_data: Path, tmp_path: Path
) -> None:
    bundle = _copy(full, tmp_path)
    config = json.loads(bundle.config_path("train").read_text())
    bundle.config_path("train").write_text(json.dumps(config | changes))
    with pytest.raises(BundleError, match="wrong form"):
        prune(bundle.root, tiny_data)


def test_a_network_without_levels_is_refused(trained: Bundle, tiny_data: Path) -> None:
    with pytest.raises(RequestError, match=r"medseg\.components\.UNet of bundle .* cannot be pruned"):
        prune(trained.root, tiny_data)


@pytest.mark.parametrize("change", [{"deep_supervision": False}, {"features": [4, 8]}])
def test_a_network_with_one_head_is_refused(
    change: dict[str, Any], full: Bundle, tiny_data: Path, tmp_path: Path
) -> None:
    bundle = _change(_copy(full, tmp_path), **change)
    with pytest.raises(RequestError, match="one head only"):
        prune(bundle.root, tiny_data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": 0.01}, "require each other"),
        ({"output": "balls_mri_pruned"}, "require each other"),
        ({"select": 1.5, "output": "balls_mri_pruned"}, "accepted loss of Dice, 0 to 1"),
        ({"select": float("nan"), "output": "balls_mri_pruned"}, "accepted loss of Dice, 0 to 1"),
        ({"select": 0.01, "output": "taken"}, "'.*taken' exists"),
        ({"select": 0.01, "output": "small"}, "small': .*<target>_<modality>_<network>"),
        ({"split": "valid"}, "split 'valid'"),
        ({"settings": {"overlp": 0.5}}, "did you mean 'overlap'"),
    ],
)
def test_requests_that_cannot_be_are_refused_before_anything_runs(
    options: dict[str, Any],
    message: str,
    full: Bundle,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr(module, "_variants", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(RequestError, match=message):
        prune(full.root, tiny_data, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_bundle_without_weights_is_refused(full: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    bundle = _copy(full, tmp_path)
    bundle.weights.unlink()
    with pytest.raises(WeightsError, match=r"[Nn]o weights"):
        prune(bundle.root, tiny_data)


def test_configs_that_are_not_those_of_bundle_json_are_refused(full: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    bundle = _copy(full, tmp_path)
    source = json.loads((bundle.root / "bundle.json").read_text())
    source["network_def"]["features"] = [4, 6, 8, 10]
    (bundle.root / "bundle.json").write_text(json.dumps(source))
    with pytest.raises(BundleError, match="medseg bundle build"):
        prune(bundle.root, tiny_data, select=0.01, output=tmp_path / "balls_mri_pruned")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that runs one command line and gives exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medseg", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, re.sub(r"\s+", " ", printed.err)

    yield run
    logging.disable(logging.NOTSET)


def test_the_command_prints_the_table_and_writes_json(
    command: Any, full: Bundle, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _selecting("L2", monkeypatch)
    target, table = tmp_path / "balls_mri_pruned", tmp_path / "tables" / "levels.json"
    table.parent.mkdir()
    options = ("--data", tiny_data, "--select", "0.01", "-o", target, "--json", table)
    code, out, _ = command("prune", full.root, *options)
    assert code == 0
    assert all(level in out for level in LEVELS)
    assert "L2 written: " in out
    content = json.loads(table.read_text())
    assert content["selected"] == "L2"
    assert [row["dice"] for row in content["levels"]] == [0.0, 1.0, 0.0, 0.0]
    assert [path.name for path in table.parent.iterdir()] == ["levels.json"]
    assert Bundle(target).weights.is_file()


def test_the_command_refuses_a_network_without_levels_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'monai', 'numpy', 'nibabel'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "sys.argv = ['medseg', 'prune', 'phantom_ct_unet', '--data', 'missing']\n"
        "from medseg.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "cannot be pruned" in done.stderr
    assert "HEAVY []" in done.stderr
