"""Active learning: selecting the next image to label."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["INFO_KEY", "choose_randomly", "choose_unsure", "known_values"]

# Key of an image's uncertainty in MONAI Label's record of the image.
INFO_KEY = "medseg_uncertainty"


def choose_randomly(images: Sequence[str], seed: int | None = None) -> str:
    """Return a random one of the image ids, or an empty string if there are none.

    Args:
        images: Ids of the images without a label.
        seed: Seed of the random choice.
    """
    chooser = random.Random(seed)  # noqa: S311  (not a secret)
    return chooser.choice(sorted(images)) if images else ""


def known_values(infos: Mapping[str, Mapping[str, Any]], model: str, weights: str) -> dict[str, float]:
    """Return the recorded uncertainties that were computed with the given weights, by image id.

    Args:
        infos: MONAI Label's record of each image, by id.
        model: Name of the bundle.
        weights: SHA-256 hash of its weights.
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
    """Return the image with the highest uncertainty, or an empty string if no image could be evaluated.

    Images with a known uncertainty are compared without evaluating them again.

    Args:
        images: Ids of the images without a label.
        known: Uncertainties that were computed before, by image id.
        measure: Function that returns the uncertainty of an image, or None if the image cannot be used. It takes longer
            than a prediction.
        candidates: Largest number of images to evaluate now, drawn at random.
        seconds: Time in seconds after which no further image is evaluated, since a user is waiting.
        seed: Seed of that draw.
    """
    chooser = random.Random(seed)  # noqa: S311  (not a secret)
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
    # Ties are broken by name, so that the result does not depend on the order of the list.
    return min(values, key=lambda image: (-values[image], image)) if values else ""
