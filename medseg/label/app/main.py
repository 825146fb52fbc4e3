"""MONAI Label's app made of medseg's bundles.

Imported by MONAI Label in the server, and again in each process that it starts for a training or a scoring.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monailabel.datastore import dicom
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from medseg.errors import MedsegError, RequestError
from medseg.label.app.scoring import DiceScoring, UncertaintyScoring
from medseg.label.app.strategies import RandomStrategy, UncertaintyStrategy
from medseg.label.app.tasks import BundleInfer, BundleTrain
from medseg.label.options import LabelOptions, is_remote_store
from medseg.label.predictor import Predictor
from medseg.label.privacy import Pseudonyms, read_key
from medseg.label.records import on_the_series
from medseg.label.request_checks import check_query, check_tag, image_inside
from medseg.label.served_bundles import find_offers

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MedsegApp"]

logger = logging.getLogger("medseg.label")

_DCMQI = "itkimage2segimage"


class MedsegApp(MONAILabelApp):  # type: ignore[misc]  # MONAI Label publishes no types
    """Offers every bundle that is plain data.

    Args:
        app_dir: MONAI Label's folder for logs.
        studies: folder of images, or address of a DICOMweb store.
        conf: taken; options come from `LabelOptions`.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.options = LabelOptions.from_environment(studies)
        self.pseudonyms = Pseudonyms(read_key(self.options.key))
        self.offers = find_offers(self.options.tuned, folders=self.options.bundles, names=self.options.models)
        for name, reason in self.offers.refused.items():
            logger.warning("bundle %s was refused: %s", name, reason)
        self.predictors = {name: Predictor(offer, self.options.results) for name, offer in self.offers.offered.items()}
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="medseg",
            description="Segmentation with medseg's bundles",
            version="1",
        )
        self.learn_names()

    def init_infers(self) -> dict[str, Any]:
        """Return a task of inference for each bundle."""
        from_store = is_remote_store(self.options.studies)
        return {name: BundleInfer(predictor, from_store=from_store) for name, predictor in self.predictors.items()}

    def init_trainers(self) -> dict[str, Any]:
        """Return a task of training for each bundle that has a config for it."""
        return {
            name: BundleTrain(offer, self.options.work, self.pseudonyms)
            for name, offer in self.offers.offered.items()
            if offer.trainable
        }

    def init_strategies(self) -> dict[str, Any]:
        """Return the ways to choose the next image."""
        return {"random": RandomStrategy(), "uncertainty": UncertaintyStrategy(self.predictors)}

    def init_scoring_methods(self) -> dict[str, Any]:
        """Return the ways to score labels and images."""
        return {"dice": DiceScoring(self.predictors), "uncertainty": UncertaintyScoring(self.predictors)}

    def init_batch_infer(self) -> Callable[..., Any]:
        """Return what runs a bundle over many images."""
        return QuietBatch()

    def init_remote_datastore(self) -> Any:
        """Return the store of DICOM, whose segmentations we read; trainings read them in processes of their own."""
        dicom.dicom_to_nifti = on_the_series(dicom.dicom_to_nifti)
        return super().init_remote_datastore()

    def info(self) -> dict[str, Any]:
        """Return what viewers show, with the bundles that were refused and why."""
        meta: dict[str, Any] = super().info()
        return {**meta, "refused": self.offers.refused}

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Predict one image, which is named by its id or was sent along; a saved result's tag is a plain word."""
        model = request.get("model", "")
        if model in self.offers.refused:
            raise RequestError(f"bundle '{model}' was refused: {self.offers.refused[model]}")
        check_tag(request.get("label_tag", "original"))
        image = request.get("image")
        if isinstance(image, str):
            self.learn_names([image])
            if Path(image).exists():
                image_inside(Path(image), self.may_read())
            else:
                # A store joins ids to its cache's path; this one may come in the request's body.
                check_query([("image", image)])
                self._fetch(image)
        result: dict[str, Any] = super().infer(request, datastore)
        return result

    def _fetch(self, image: str) -> None:
        """Bring a series of a store into the cache, and say so if there is none."""
        if image and is_remote_store(self.options.studies):
            try:
                self.datastore().get_image_uri(image)
            except IndexError as error:
                raise RequestError("there is no series of that id in the store") from error

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Choose the next image."""
        self.learn_names()
        chosen: dict[str, Any] = super().next_sample(request)
        return chosen

    def on_save_label(self, image_id: str, label_id: str) -> None:
        """Note that a label came, without naming the image, and forget the list of labels that a store gave before."""
        forget = getattr(type(self.datastore()).get_labeled_images, "cache_clear", None)
        if forget is not None:
            forget()
        self.learn_names([image_id])
        logger.info("a label was saved for %s", self.pseudonyms.of(image_id))

    def may_read(self) -> list[Path]:
        """Return where the images lie that viewers send along, for one request or for a session."""
        return [self.options.sessions, Path(tempfile.gettempdir())]

    def learn_names(self, more: list[str] | None = None) -> None:
        """Take up names that logs must not show."""
        try:
            known = list(self.datastore().list_images())
        except Exception:
            # A store that does not answer is for the request at hand to report.
            known = []
        self.pseudonyms.learn([*known, *(more or [])])

    def _download_dcmqi_tools(self) -> None:
        """Download nothing: the tool comes with the environment."""
        if shutil.which(_DCMQI) is None:
            raise RequestError(f"{_DCMQI} is missing, which writes DICOM SEG: `make label-server` installs it (dcmqi)")


class QuietBatch(BatchInferTask):  # type: ignore[misc]
    """MONAI Label's run over many images, which divides by the number of GPUs, also where there are none."""

    def __call__(self, request: dict[str, Any], datastore: Any, infer: Callable[..., Any]) -> dict[str, Any]:
        """Predict each image and save its mask; one that cannot be used does not stop the others."""

        def predicted(one: dict[str, Any], store: Any) -> dict[str, Any]:
            try:
                result: dict[str, Any] = infer(one, store)
            except MedsegError as error:
                logger.warning("an image of a batch was left out: %s", error)
                return {"error": str(error)}
            return result

        results: dict[str, Any] = super().__call__({**request, "multi_gpu": False}, datastore, predicted)
        return results
