"""The shipped bundles as cases of a test."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from medseg.bundle.catalog import shipped_bundles


def shipped(every_run: Collection[str]) -> list[object]:
    """Return all shipped bundles; those that are not for every run wait for `-m full_check`."""
    return [
        pytest.param(one, id=one.name, marks=() if one.name in every_run else pytest.mark.full_check)
        for one in shipped_bundles()
    ]
