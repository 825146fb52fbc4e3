"""How the command line ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from medseg.jobs import api
from medseg.studies import phantoms


def test_ctrl_c_says_that_what_was_finished_is_kept(
    medseg: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "train", interrupted)
    code, _, err = medseg("train", "hippocampus_mri_unet", "--data", tmp_path)
    assert code == 130
    assert "Stopped. Finished results are kept" in err


def test_the_demo_stops_at_a_step_that_fails(medseg: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise typer.Exit(1)

    monkeypatch.setattr(phantoms, "write_phantoms", failing)
    code, out, _ = medseg("demo", "-o", tmp_path / "demo")
    assert code == 1
    assert "$ medseg phantoms" in out
    assert "$ medseg train" not in out
