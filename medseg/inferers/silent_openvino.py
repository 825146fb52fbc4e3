"""OpenVINO without its reports.

The package tells its makers over the network, from a forked process, when it is imported and when it converts a model,
unless it believes that it runs in continuous integration. medseg opens no connection that nobody asked for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from medseg.errors import RequestError

__all__ = ["load_openvino", "without_reports"]


def load_openvino() -> Any:
    """Import OpenVINO.

    Raises:
        RequestError: it is not installed; the message names the extra that brings it.
    """
    with without_reports():
        try:
            return importlib.import_module("openvino")
        except ImportError as error:
            raise RequestError('This back end needs openvino: pip install "medseg[openvino]".') from error


@contextmanager
def without_reports() -> Iterator[None]:
    """Keep OpenVINO from reporting what is done in this block."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        os.environ.pop("CI") if before is None else os.environ.update(CI=before)
