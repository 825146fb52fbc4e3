"""Optional packages: the extras of medseg, and imports whose errors name the extra to install."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Final

from medseg.errors import RequestError, in_a_line

__all__ = ["EXTRAS", "advice", "installed", "require"]

# Extra -> import names of the packages that pyproject.toml lists for it.
EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "dicom": ("highdicom", "libjpeg", "openjpeg"),
    "itk": ("itk",),
    "mlflow": ("mlflow",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "slides": ("openslide", "tifffile", "tiffslide"),
}


def require(module: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Module to import, such as "highdicom.seg".
        purpose: Feature that needs it, which begins the message: "Writing DICOM SEG".

    Raises:
        RequestError: The package is not installed or cannot be imported; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: the Python part without its shared library
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name in (module, package)
        fault = "which is not installed" if missing else f"which cannot be imported ({in_a_line(error)})"
        raise RequestError(
            f"{purpose} needs {package}, {fault}: {advice(package)}", code="missing-package", package=package
        ) from error


def installed(package: str) -> bool:
    """Return whether an optional package is installed, without importing it."""
    return importlib.util.find_spec(package) is not None


def advice(package: str) -> str:
    """Return the command that installs an optional package."""
    extra = next(name for name, packages in EXTRAS.items() if package in packages)
    return f'pip install "medseg[{extra}]"'
