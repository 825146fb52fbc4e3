"""The whole server, over HTTP, in its own environment; and that the environment's files agree with each other."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-label" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.full_check
def test_a_viewer_predicts_corrects_fine_tunes_and_predicts_again() -> None:
    if not (ROOT / ".venv-label" / "installed").is_file():
        pytest.skip("the label server's environment is not set up here: run `make label-environment`")
    script = ROOT / "tests" / "label" / "server_check.py"
    done = subprocess.run([PYTHON, script], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "facts held" in done.stdout


def test_every_line_of_the_environment_is_one_exact_version() -> None:
    lines = [line for line in (ROOT / "constraints-label.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)] == []
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines]
    assert len(names) == len(set(names))
    assert {"monailabel", "monai", "torch", "numpy", "pydicom", "dcmqi"} <= set(names)


def test_the_image_installs_as_the_make_target_does() -> None:
    recipe = (ROOT / "Makefile").read_text().partition(".venv-label/installed: ")[2]
    image = (ROOT / "docker" / "Dockerfile.label").read_text()
    for arguments in ("--constraint constraints-label.txt", "--no-deps --requirement constraints-label.txt"):
        assert arguments in recipe
        assert arguments in image
    assert "USER 10001" in image
    assert "HEALTHCHECK" in image
