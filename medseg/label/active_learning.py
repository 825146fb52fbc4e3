"""Which image to label next."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["INFO_KEY", "choose_randomly", "choose_unsure", "known_values"]

# Under this name the uncertainty of an image is kept in MONAI Label's record of it.
INFO_KEY = "medseg_uncertainty"


def choose_randomly(images: Sequence[str], seed: int | None = None) -> str:
    """Return one of the image ids; an empty text where there are none."""
    chooser = random.Random(seed)  # noqa: S311  (no secret)
    return chooser.choice(sorted(images)) if images else ""


def known_values(infos: Mapping[str, Mapping[str, Any]], model: str, weights: str) -> dict[str, float]:
    """Return the uncertainties that were found with these very weights of a model, by image id.

    Args:
        infos: MONAI Label's record of each image.
        model: name of the bundle.
        weights: SHA-256 of its weights.
    """
    found: dict[str, float] = {}
    for image, info in infos.items():
        record = info.get(INFO_KEY, {})
        value = record.get(model, {}) if isinstance(record, dict) else {}
        if isinstance(value, dict) and value.get("weights") == weights and isinstance(value.get("value"), float):
            found[image] = value["value"]
    return found


def choose_unsure(
    images: Sequence[str],
    known: Mapping[str, float],
    measure: Callable[[str], float | None],
    *,
    candidates: int = 10,
    seconds: float = 30.0,
    seed: int | None = None,
) -> str:
    """Return the image that the network is least sure of, among those measured before and some more.

    An empty text where there are no images, or none could be measured.

    Args:
        images: ids of the images without a label.
        known: uncertainties that were measured before.
        measure: measures an image, which takes longer than predicting it; None for one that cannot be used.
        candidates: how many images to measure now, at most, chosen at random.
        seconds: after which no further image is measured, since somebody waits.
        seed: of that choice.
    """
    chooser = random.Random(seed)  # noqa: S311  (no secret)
    unknown = sorted(set(images) - set(known))
    values = {image: known[image] for image in images if image in known}
    start, measured = time.monotonic(), 0
    for image in chooser.sample(unknown, len(unknown)):
        value = measure(image)
        if value is not None:
            values[image] = value
            measured += 1
        if measured == candidates or time.monotonic() - start > seconds:
            break
    # Of equal ones the first by name, so that the answer does not depend on the order of the list.
    return min(values, key=lambda image: (-values[image], image)) if values else ""
