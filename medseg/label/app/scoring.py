"""Scores of saved labels and of images, as MONAI Label asks for them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from monailabel.interfaces.tasks.scoring import ScoringMethod

from medseg.errors import MedsegError
from medseg.label.annotations import dice, read_annotation
from medseg.label.app.strategies import chosen_predictor, measured
from medseg.label.records import annotations_of
from medseg.scoring.scores import nanmean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from medseg.label.predictor import Predictor

__all__ = ["DiceScoring", "UncertaintyScoring"]

logger = logging.getLogger("medseg.label")


class DiceScoring(ScoringMethod):  # type: ignore[misc]  # MONAI Label publishes no types
    """Dice of the saved labels against what a bundle predicts now.

    Args:
        predictors: by the name of the bundle.
    """

    def __init__(self, predictors: Mapping[str, Predictor]) -> None:
        super().__init__("Dice of each saved label against the bundle's present prediction")
        self.predictors = predictors

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        """Return the Dice of each label for each image with a saved label, and their means; kept in the records."""
        predictor = chosen_predictor(self.predictors, request.get("model"))
        labels = predictor.offer.labels
        scores: dict[str, dict[str, float | None]] = {}
        for annotation in annotations_of(datastore):
            try:
                mask = predictor.predict(annotation.image)
                predicted = read_annotation(replace(annotation, label=mask, info=()), labels)
                mask.unlink()
                score = dice(read_annotation(annotation, labels), predicted, labels)
                scores[annotation.name] = score
                datastore.update_label_info(annotation.name, "final", {"medseg_dice": {predictor.offer.name: score}})
            except MedsegError as error:
                logger.warning("a label could not be scored: %s", error)
        found = {name: [each for image in scores.values() if (each := image[name]) is not None] for name in labels}
        means = {name: nanmean(values) if values else None for name, values in found.items()}
        return {"model": predictor.offer.name, "images": scores, "mean": means}


class UncertaintyScoring(ScoringMethod):  # type: ignore[misc]
    """How unsure a bundle is of each image without a label, kept for the strategy of that name.

    Args:
        predictors: by the name of the bundle.
    """

    def __init__(self, predictors: Mapping[str, Predictor]) -> None:
        super().__init__("How unsure the network is of each image without a label")
        self.predictors = predictors

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        """Return the uncertainty of each image that could be read."""
        predictor = chosen_predictor(self.predictors, request.get("model"))
        values = {image: measured(predictor, datastore, image) for image in datastore.get_unlabeled_images()}
        return {"model": predictor.offer.name, "images": values}
