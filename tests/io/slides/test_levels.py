"""The stored levels of a slide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medseg.io.slides.levels import _checked_sizes


def test_levels_from_one_that_is_larger_on_are_skipped_with_a_warning(assert_warns: Any) -> None:
    sizes = [(400, 300), (100, 75), (200, 150), (50, 38)]
    assert _checked_sizes(sizes[:2], Path("a.svs")) == ((400, 300), (100, 75))
    assert _checked_sizes(sizes, Path("a.svs")) == ((400, 300), (100, 75))
    assert_warns(lambda: _checked_sizes(sizes, Path("a.svs")), "levels-skipped")
