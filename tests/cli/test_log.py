"""What a command prints of logs: our warnings once at its end, nothing of other packages."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import pytest

from medseg.cli.log import warnings_at_the_end
from medseg.notices import collect, warn

OURS = logging.getLogger("medseg.test")
EARLIER = logging.getLogger("library.imported.earlier")


def _chatter() -> None:
    later = logging.getLogger("library.imported.later")
    for logger in (EARLIER, later):
        handler = logging.StreamHandler(sys.stdout)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.critical("chatter")
        logger.removeHandler(handler)
    logging.getLogger("another").error("chatter")
    logging.warning("chatter")  # to the root, which it would give a handler
    warnings.warn("chatter", stacklevel=1)


def test_our_warnings_are_printed_at_the_end_and_other_packages_never(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = list(logging.root.handlers)
    with warnings_at_the_end():
        for name in ("a", "b"):
            with collect(name):
                warn(OURS, "spacing-assumed", "1 mm is assumed", f"{name}.nii")
        OURS.warning("not coded")
        OURS.info("too quiet")
        _chatter()
        assert capsys.readouterr() == ("", "")
    assert capsys.readouterr() == (
        "",
        "warning: 1 mm is assumed (2 cases: a, b) [spacing-assumed]\nwarning: not coded [other]\n",
    )
    assert logging.root.handlers == handlers


def test_they_are_printed_however_the_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        with warnings_at_the_end():
            warn(OURS, "gpu-fallback", "less memory", run=True)
            raise SystemExit(1)

    with pytest.raises(SystemExit):
        command()
    assert capsys.readouterr().err == "warning: less memory [gpu-fallback]\n"


def test_other_packages_log_as_usual_afterward(caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    with warnings_at_the_end():
        made_meanwhile = logging.getLogger("library.made.meanwhile")
    made_meanwhile.warning("said")
    EARLIER.warning("said")
    assert [record.getMessage() for record in caplog.records] == ["said", "said"]
    assert logging.getLoggerClass() is logging.Logger
    assert capsys.readouterr().err == ""
