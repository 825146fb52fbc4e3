"""MONAI Label scoring methods: Dice of saved labels, and uncertainty of images."""

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
    """Dice of the saved labels against the current predictions of a bundle.

    Args:
        predictors: Predictor of each bundle, by name.
    """

    def __init__(self, predictors: Mapping[str, Predictor]) -> None:
        super().__init__("Dice of each saved label against the bundle's current prediction")
        self.predictors = predictors

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        """Return the Dice of each label for each image with a saved label, and the means; store them as records."""
        predictor = chosen_predictor(self.predictors, request.get("model"))
        labels = predictor.served.labels
        scores: dict[str, dict[str, float | None]] = {}
        for annotation in annotations_of(datastore):
            try:
                mask = predictor.predict(annotation.image)
                predicted = read_annotation(replace(annotation, label=mask, info=()), labels)
                mask.unlink()
                score = dice(read_annotation(annotation, labels), predicted, labels)
                scores[annotation.name] = score
                datastore.update_label_info(annotation.name, "final", {"medseg_dice": {predictor.served.name: score}})
            except MedsegError as error:
                logger.warning("skipped the scoring of a label: %s", error)
        found = {name: [each for image in scores.values() if (each := image[name]) is not None] for name in labels}
        means = {name: nanmean(values) if values else None for name, values in found.items()}
        return {"model": predictor.served.name, "images": scores, "mean": means}


class UncertaintyScoring(ScoringMethod):  # type: ignore[misc]
    """Uncertainty of a bundle about each image without a label, stored for the strategy of the same name.

    Args:
        predictors: Predictor of each bundle, by name.
    """

    def __init__(self, predictors: Mapping[str, Predictor]) -> None:
        super().__init__("Uncertainty of the network about each image without a label")
        self.predictors = predictors

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        """Return the uncertainty of each image without a label; None for images that cannot be used."""
        predictor = chosen_predictor(self.predictors, request.get("model"))
        values = {image: measured(predictor, datastore, image) for image in datastore.get_unlabeled_images()}
        return {"model": predictor.served.name, "images": values}
