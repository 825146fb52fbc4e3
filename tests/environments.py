"""Environments of their own: the lists that pin them, and the scripts that need one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pinned(path: Path) -> dict[str, str]:
    """Return the version of each package in a list for this Python; every line has to be one exact version."""
    texts = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    lines = [Requirement(text) for text in texts]
    chosen = [line for line in lines if line.marker is None or line.marker.evaluate()]
    assert [str(line) for line in lines if not re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(line.specifier))] == []
    found = {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in chosen}
    assert len(found) == len(chosen)
    return found


def run_script(environment: str, python: Path | str, script: Path, *, command: str) -> str:
    """Run a script and return what it printed; skip the test where the environment that it needs is not set up."""
    if not (ROOT / environment / "installed").is_file():
        pytest.skip(f"{environment} is not set up here: run `{command}`")
    done = subprocess.run([python, script], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout
