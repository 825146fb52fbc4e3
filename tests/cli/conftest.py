"""Running the command line within a test."""

from __future__ import annotations

import re
import sys
import warnings

import pytest

from medseg.cli import main


@pytest.fixture
def medseg(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs one command line and gives exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medseg", *map(str, arguments)])
        with warnings.catch_warnings():
            try:
                main()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        return code, printed.out, re.sub(r"\s+", " ", printed.err)

    return run
