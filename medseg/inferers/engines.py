"""Load and silence the packages that export and run networks."""

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
    """Import OpenVINO without its telemetry (see `without_reports`).

    Raises:
        RequestError: OpenVINO is not installed; the message names the extra to install.
    """
    with without_reports():
        return require("openvino", "OpenVINO as backend or format")


@cache
def openvino_core() -> Any:
    """Return the single `openvino.Core` of this process.

    The CPU plugin of a Core installs an alternate signal stack and frees it with the Core. In version 2026.4 this works
    for one Core; after two, the next signal (for example when a data loader worker exits) uses a freed stack, and the
    process crashes.
    """
    return load_openvino().Core()


@contextmanager
def without_reports() -> Iterator[None]:
    """Disable the telemetry of OpenVINO inside the context.

    OpenVINO sends telemetry from a forked process on import and on model conversion, unless it detects continuous
    integration. medseg opens no network connection without a request of the user.
    """
    with environment("CI", "true"):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and log messages of exporters and compilers, which do not concern the user."""
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
    """Set an environment variable inside the context; None leaves it unchanged."""
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
