"""Environments of their own: the lists that pin them, and the scripts that need one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pinned(path: Path) -> dict[str, str]:
    """Return the version of each package in a list, in which every line has to be one exact version."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)] == []
    found = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower(): line.partition("==")[2] for line in lines}
    assert len(found) == len(lines)
    return found


def run_script(environment: str, python: Path | str, script: Path, *, command: str) -> str:
    """Run a script and return what it printed; skip the test where the environment that it needs is not set up."""
    if not (ROOT / environment / "installed").is_file():
        pytest.skip(f"{environment} is not set up here: run `{command}`")
    done = subprocess.run([python, script], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout
