"""Versions of medseg and of installed packages."""

from __future__ import annotations

import platform
from collections.abc import Iterable

__all__ = ["__version__", "installed_versions"]

__version__ = "0.1.0"


def installed_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of medseg, Python and `packages` from their metadata; None if not installed."""
    from importlib import metadata

    versions: dict[str, str | None] = {"medseg": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
