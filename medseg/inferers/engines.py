"""Load the packages that export networks and run them, and keep them quiet."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from medseg.extras import require

__all__ = ["environment", "load_openvino", "openvino_core", "quiet", "without_reports"]


def load_openvino() -> Any:
    """Import OpenVINO, without its report (see `without_reports`).

    Raises:
        RequestError: It is not installed; the message names the extra that brings it.
    """
    with without_reports():
        return require("openvino", "OpenVINO as back end or format")


@cache
def openvino_core() -> Any:
    """Return the only `openvino.Core` of this process.

    The CPU plugin of each Core gives its thread a stack for signals, and takes it away with the Core. Version 2026.4
    does that rightly for one; after two, the next signal (that a worker of a data loader ended, say) comes to a stack
    that is gone, and the process dies.
    """
    return load_openvino().Core()


@contextmanager
def without_reports() -> Iterator[None]:
    """Keep OpenVINO from reporting what is done in this block.

    It tells its makers over the network, from a forked process, when it is imported and when it converts a model,
    unless it believes that it runs in continuous integration. medseg opens no connection that nobody asked for.
    """
    with environment("CI", "true"):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of exporters and compilers: nothing in them is for a user."""
    noisy = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir", "openvino")]
    levels = [log.level for log in noisy]
    try:
        for log in noisy:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(noisy, levels, strict=True):
            log.setLevel(level)


@contextmanager
def environment(name: str, value: Path | str | None) -> Iterator[None]:
    """Set an environment variable for a while; None leaves it as it is."""
    before = os.environ.get(name)
    try:
        if value is not None:
            os.environ[name] = str(value)
        yield
    finally:
        if value is not None:
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before
