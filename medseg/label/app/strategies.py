"""MONAI Label strategies of active learning."""

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
    """Selects a random image without a label."""

    def __init__(self) -> None:
        super().__init__("Random image without a label")

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, str]:
        """Return the id of an image, or an empty dict if all images have labels."""
        return _found(choose_randomly(datastore.get_unlabeled_images(), request.get("seed")))


class UncertaintyStrategy(Strategy):  # type: ignore[misc]
    """Selects the image without a label about which a network is most uncertain.

    Args:
        predictors: Predictor of each bundle, by name.
    """

    def __init__(self, predictors: Mapping[str, Predictor]) -> None:
        super().__init__(
            "Image with the highest uncertainty: mean entropy of the predictions of the image and its mirror image"
        )
        self.predictors = predictors

    def info(self) -> dict[str, Any]:
        """Return the description for viewers, with the user's settings; the first value of a list is the default."""
        ready = [name for name, predictor in self.predictors.items() if predictor.served.ready]
        return {**super().info(), "config": {"model": ready, "candidates": _CANDIDATES} if ready else {}}

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, str]:
        """Return the id of an image, or an empty dict if all images have labels."""
        predictor = chosen_predictor(self.predictors, request.get("model"))
        images = list(datastore.get_unlabeled_images())
        known = known_values(
            {image: datastore.get_image_info(image) for image in images},
            predictor.served.name,
            predictor.weights_sha256(),
        )
        candidates = request.get("candidates", _CANDIDATES)
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise RequestError(f"invalid candidates {candidates!r}: use an integer of 1 or more")
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
                f"bundle '{predictor.served.name}' cannot use any of {len(reasons)} images: {reasons[-1]} Choose "
                "another bundle as 'model' of this strategy, or use the strategy 'random'"
            )
        return _found(chosen)


def _found(image: str) -> dict[str, str]:
    return {"id": image} if image else {}


def chosen_predictor(predictors: Mapping[str, Predictor], name: Any) -> Predictor:
    """Return the predictor of a bundle, or the first with weights if no bundle is named.

    Args:
        predictors: Predictor of each bundle, by name.
        name: Name of the bundle, or a list whose first entry is used.

    Raises:
        RequestError: No such bundle with weights.
    """
    name = name[0] if isinstance(name, list) and name else name
    ready = {own: predictor for own, predictor in predictors.items() if predictor.served.ready}
    if name and name not in ready:
        raise RequestError(f"no bundle '{name}' with weights: use one of {', '.join(ready) or '(none has weights)'}")
    if not ready:
        raise RequestError("no bundle has weights: train one first")
    return ready[name or next(iter(ready))]


def measured(predictor: Predictor, datastore: Any, image: str, reasons: list[str] | None = None) -> float | None:
    """Return the uncertainty of a network about an image, and store it in the image's record.

    Args:
        predictor: Predictor of the bundle.
        datastore: MONAI Label's datastore.
        image: Id of the image.
        reasons: List to which the reason is appended if the image cannot be used.

    Returns:
        Uncertainty, 0 to 1, or None if the image cannot be used.
    """
    try:
        value = predictor.uncertainty(Path(datastore.get_image_uri(image)))
    except MedsegError as error:
        logger.warning("no uncertainty of an image: %s", error)
        if reasons is not None:
            reasons.append(str(error))
        return None
    record = datastore.get_image_info(image).get(INFO_KEY, {})
    entry = {predictor.served.name: {"weights": predictor.weights_sha256(), "value": value}}
    datastore.update_image_info(image, {INFO_KEY: {**record, **entry}})
    return value
