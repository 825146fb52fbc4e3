"""Child processes that must succeed."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from side_by_side.settings import ROOT

__all__ = ["call"]


def call(command: Sequence[Any], own: Mapping[str, str]) -> None:
    """Run a command in a complete environment, as of `side_by_side.settings.environment`.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, env=dict(own), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:5])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
