"""The whole server, over HTTP, in its own environment; and that the environment's files agree with each other."""

from __future__ import annotations

import pytest

from tests.environments import ROOT, pinned, run_script

PYTHON = ROOT / ".venv-label" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.full_check
def test_a_viewer_predicts_corrects_fine_tunes_and_predicts_again() -> None:
    script = ROOT / "tests" / "label" / "server_check.py"
    assert "facts held" in run_script(".venv-label", PYTHON, script, command="make label-environment")


def test_every_line_of_the_environment_is_one_exact_version() -> None:
    names = pinned(ROOT / "constraints-label.txt")
    assert {"monailabel", "monai", "torch", "numpy", "pydicom", "dcmqi"} <= set(names)


def test_the_image_installs_as_the_make_target_does() -> None:
    recipe = (ROOT / "Makefile").read_text().partition(".venv-label/installed: ")[2]
    image = (ROOT / "docker" / "Dockerfile.label").read_text()
    for arguments in ("--constraint constraints-label.txt", "--no-deps --requirement constraints-label.txt"):
        assert arguments in recipe
        assert arguments in image
    assert "USER 10001" in image
    assert "HEALTHCHECK" in image
