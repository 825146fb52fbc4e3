"""`medseg compare`, and the options of `medseg train` and `predict` for several processes and folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medseg.bundle.catalog import Bundle
from medseg.scoring.scores import Scores, write_scores


def _run(folder: Path, shift: float) -> Path:
    folder.mkdir()
    rows = tuple(
        {"case": f"case_{n}", "patient": f"case_{n}", "fold": n % 2, "metrics": {"tumor": value, "mean": value}}
        for n in range(12)
        for value in [0.5 + 0.02 * n + shift + 0.001 * (n % 3)]
    )
    write_scores(Scores(folder.name, 2, rows), folder / "cross_validation.json")
    return folder


def test_compare_prints_the_table_and_names_the_best(medseg: Any, tmp_path: Path) -> None:
    one, two = _run(tmp_path / "one", 0.0), _run(tmp_path / "two", 0.1)
    code, out, err = medseg("compare", one, two, "--json", tmp_path / "table.json")
    assert (code, err) == (0, "")
    assert "best: two (mean Dice 0.7110)" in out
    assert "12 cases of 12 patients" in out
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["best"] == "two"
    assert table["differences"][0]["mean"] == pytest.approx(0.1)


def test_requests_that_cannot_be_are_refused(medseg: Any, trained: Bundle, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train = ["train", trained.root, "--data", tiny_data]
    cases: list[tuple[list[object], str]] = [
        (["compare", tmp_path], "two or more runs"),
        (["compare", tmp_path, trained.root / "docs"], "No scores in"),
        ([*train, "--folds", "3"], "--folds requires --output"),
        ([*train, "--fold", "1"], "--folds requires --output"),
        ([*train, "--folds", "3", "-o", out, "--trust", "0" * 64], "does not support --trust"),
        ([*train, "--folds", "2", "--fold", "2", "-o", out], "invalid fold number, expected 0 to 1"),
        ([*train, "--folds", "30", "-o", out], "use at most 3 folds"),
        ([*train, "--devices", "0", "-o", out], "1 or more"),
        ([*train, "--devices", "3", "-o", out], "--set batch_size=3"),
        (["predict", trained.root, tiny_data, "-o", out, "--with", "hipocampus_mri_unet"], "did you mean"),
    ]
    for arguments, message in cases:
        code, _, err = medseg(*arguments)
        assert code == 2, (arguments, err)
        assert message in err, (arguments, err)
        assert not out.exists(), arguments
