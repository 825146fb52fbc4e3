"""Which image to label next, as MONAI Label asks for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monailabel.interfaces.tasks.strategy import Strategy

from medseg.errors import MedsegError, RequestError
from medseg.label.choice import INFO_KEY, choose_randomly, choose_unsure, known_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from medseg.label.predictor import Predictor

__all__ = ["RandomStrategy", "UncertaintyStrategy", "chosen_predictor", "measured"]

logger = logging.getLogger("medseg.label")


class RandomStrategy(Strategy):  # type: ignore[misc]  # MONAI Label publishes no types
    """Any image without a label."""

    def __init__(self) -> None:
        super().__init__("An image without a label, at random")

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, str]:
        """Return the id of an image; nothing where all have labels."""
        return _found(choose_randomly(datastore.get_unlabeled_images(), request.get("seed")))


class UncertaintyStrategy(Strategy):  # type: ignore[misc]
    """The image without a label that a network is least sure of.

    Args:
        predictors: by the name of the bundle.
    """

    def __init__(self, predictors: Mapping[str, Predictor]) -> None:
        super().__init__(
            "The image that the network is least sure of: the mean entropy over the image and its mirror image"
        )
        self.predictors = predictors

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, str]:
        """Return the id of an image; nothing where all have labels."""
        predictor = chosen_predictor(self.predictors, request.get("model"))
        images = list(datastore.get_unlabeled_images())
        known = known_values(
            {image: datastore.get_image_info(image) for image in images},
            predictor.offer.name,
            predictor.weights_sha256(),
        )
        candidates = request.get("candidates", 10)
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise RequestError(f"candidates is {candidates!r}: use a whole number of 1 or more")
        chosen = choose_unsure(
            images,
            known,
            lambda image: measured(predictor, datastore, image),
            candidates=candidates,
            seed=request.get("seed"),
        )
        return _found(chosen)


def _found(image: str) -> dict[str, str]:
    return {"id": image} if image else {}


def chosen_predictor(predictors: Mapping[str, Predictor], name: str | None) -> Predictor:
    """Return the predictor of a bundle by name; without one, the first that has weights.

    Raises:
        RequestError: there is none.
    """
    ready = {own: predictor for own, predictor in predictors.items() if predictor.offer.ready}
    if name and name not in ready:
        raise RequestError(f"no bundle '{name}' with weights: use one of {', '.join(ready) or '(none has any)'}")
    if not ready:
        raise RequestError("no bundle has weights: train one first")
    return ready[name or next(iter(ready))]


def measured(predictor: Predictor, datastore: Any, image: str) -> float | None:
    """Return how unsure a network is of an image, and keep it in the record of the image; None if it cannot be read."""
    try:
        value = predictor.uncertainty(Path(datastore.get_image_uri(image)))
    except MedsegError as error:
        logger.warning("an image could not be measured: %s", error)
        return None
    record = datastore.get_image_info(image).get(INFO_KEY, {})
    entry = {predictor.offer.name: {"weights": predictor.weights_sha256(), "value": value}}
    datastore.update_image_info(image, {INFO_KEY: {**record, **entry}})
    return value
