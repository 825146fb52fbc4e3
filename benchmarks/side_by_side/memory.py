"""Memory of medseg by number of slices and classes, and a run under a hard limit, each in a new process.

Of every run: what was added to the imported libraries, and that less the image (int16) and the mask (uint8) themselves,
which have to be somewhere. The network is the light one with its first weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from side_by_side.contest import sample
from side_by_side.machine import describe
from side_by_side.settings import EXACT
from side_by_side.work import Setup, prepare, say

SLICES = (100, 200, 400, 800)
CLASSES = (2, 5, 14, 56)
FIXED_CLASSES, FIXED_SLICES = 5, 200
LIMITED_CLASSES, LIMIT_MIB = 14, 2048
SIDE = 512


def measure(setup: Setup) -> dict[str, Any]:
    """Return both tables and the result under the limit."""
    about = describe()
    limit = LIMIT_MIB + both_mib(SLICES[-1])
    return {
        "case": "memory",
        "threads": setup.threads,
        "tuned_memory": setup.tuned_memory,
        "knobs": {"medseg": EXACT},
        **about,
        "limited": _limited(setup, limit),
        "slices": [_row(setup, slices, FIXED_CLASSES) for slices in SLICES],
        "classes": [_row(setup, FIXED_SLICES, classes) for classes in CLASSES],
    }


def both_mib(slices: int) -> float:
    """Return the size of image and mask in memory, in MiB."""
    return SIDE * SIDE * slices * (2 + 1) / 2**20


def _limited(setup: Setup, limit: float) -> dict[str, Any]:
    """Run the largest case with a limit of the address space, in addition to that of the imported libraries."""
    row = {"slices": SLICES[-1], "classes": LIMITED_CLASSES, "limit_beyond_image_and_mask_mib": LIMIT_MIB}
    try:
        return {**row, "passed": True, **_row(setup, SLICES[-1], LIMITED_CLASSES, limit_mib=limit)}
    except SystemExit as error:
        say(str(error))
        said = str(error).splitlines()[-1].replace(str(setup.work), "WORK")
        return {**row, "passed": False, "error": said}


def _row(setup: Setup, slices: int, classes: int, **more: Any) -> dict[str, Any]:
    own = replace(setup, case=f"slices{slices}", network="light", classes=classes)
    prepare(own, [])
    found = sample(own, "medseg", own.runs / "medseg", **more)
    return {"slices": slices, "classes": classes, "beyond_mib": found["added_mib"] - both_mib(slices), **found}
