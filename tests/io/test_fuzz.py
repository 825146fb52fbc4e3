"""A few hundred damaged files against every reader; `fuzz.py` runs as many as one likes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.skipif(importlib.util.find_spec("highdicom") is None, reason="writes DICOM SEG with highdicom")
def test_damaged_files_end_in_errors_of_medseg_only() -> None:
    ran = subprocess.run(
        [sys.executable, str(FUZZ), "--count", "300", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counts = json.loads(ran.stdout)
    assert counts["read"] + counts["refused"] == 300
    assert counts["refused"] > 100


def test_a_mutant_is_the_same_whenever_it_is_made() -> None:
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    assert spec is not None
    assert spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = fuzz
    spec.loader.exec_module(fuzz)
    content = bytes(range(256)) * 8
    made = [fuzz.mutated(content, np.random.default_rng([3, number])) for number in range(20)]
    assert made == [fuzz.mutated(content, np.random.default_rng([3, number])) for number in range(20)]
    assert len({bytes(each) for each in made}) == 20
