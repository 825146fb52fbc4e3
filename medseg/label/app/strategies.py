"""Which image to label next, as MONAI Label asks for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monailabel.interfaces.tasks.strategy import Strategy

from medseg.errors import MedsegError, RequestError
from medseg.label.active_learning import INFO_KEY, choose_randomly, choose_unsure, known_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from medseg.label.predictor import Predictor

__all__ = ["RandomStrategy", "UncertaintyStrategy", "chosen_predictor", "measured"]

logger = logging.getLogger("medseg.label")

_CANDIDATES = 10


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

    def info(self) -> dict[str, Any]:
        """Return what viewers show, with what a user may change: the first of several is the default."""
        ready = [name for name, predictor in self.predictors.items() if predictor.offer.ready]
        return {**super().info(), "config": {"model": ready, "candidates": _CANDIDATES} if ready else {}}

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, str]:
        """Return the id of an image; nothing where all have labels."""
        predictor = chosen_predictor(self.predictors, request.get("model"))
        images = list(datastore.get_unlabeled_images())
        known = known_values(
            {image: datastore.get_image_info(image) for image in images},
            predictor.offer.name,
            predictor.weights_sha256(),
        )
        candidates = request.get("candidates", _CANDIDATES)
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise RequestError(f"candidates is {candidates!r}: use a whole number of 1 or more")
        reasons: list[str] = []
        chosen = choose_unsure(
            images,
            known,
            lambda image: measured(predictor, datastore, image, reasons),
            candidates=candidates,
            seed=request.get("seed"),
        )
        if images and not chosen:
            raise RequestError(
                f"bundle '{predictor.offer.name}' could measure none of {len(reasons)} images: {reasons[-1]} Choose "
                "another one as 'model' of this strategy, or choose at random"
            )
        return _found(chosen)


def _found(image: str) -> dict[str, str]:
    return {"id": image} if image else {}


def chosen_predictor(predictors: Mapping[str, Predictor], name: Any) -> Predictor:
    """Return the predictor of a bundle by name, or the first name of a list; without one, the first with weights.

    Raises:
        RequestError: there is none.
    """
    name = name[0] if isinstance(name, list) and name else name
    ready = {own: predictor for own, predictor in predictors.items() if predictor.offer.ready}
    if name and name not in ready:
        raise RequestError(f"no bundle '{name}' with weights: use one of {', '.join(ready) or '(none has any)'}")
    if not ready:
        raise RequestError("no bundle has weights: train one first")
    return ready[name or next(iter(ready))]


def measured(predictor: Predictor, datastore: Any, image: str, reasons: list[str] | None = None) -> float | None:
    """Return how unsure a network is of an image, and keep it in the record of the image.

    None if the image cannot be used; why is added to the reasons.
    """
    try:
        value = predictor.uncertainty(Path(datastore.get_image_uri(image)))
    except MedsegError as error:
        logger.warning("an image could not be measured: %s", error)
        if reasons is not None:
            reasons.append(str(error))
        return None
    record = datastore.get_image_info(image).get(INFO_KEY, {})
    entry = {predictor.offer.name: {"weights": predictor.weights_sha256(), "value": value}}
    datastore.update_image_info(image, {INFO_KEY: {**record, **entry}})
    return value
