"""MONAI Label app that serves medseg's bundles.

MONAI Label imports it in the server, and again in each child process of a training or a scoring.
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
from medseg.label.served_bundles import find_served_bundles

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MedsegApp"]

logger = logging.getLogger("medseg.label")

_DCMQI = "itkimage2segimage"


class MedsegApp(MONAILabelApp):  # type: ignore[misc]  # MONAI Label publishes no types
    """MONAI Label app with tasks for every bundle that contains no code.

    Args:
        app_dir: MONAI Label's folder of logs.
        studies: Folder of images, or URL of a DICOMweb store.
        conf: MONAI Label's configuration, not used; the options come from `LabelOptions`.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.options = LabelOptions.from_environment(studies)
        self.pseudonyms = Pseudonyms(read_key(self.options.key))
        self.served_bundles = find_served_bundles(
            self.options.tuned, folders=self.options.bundles, names=self.options.models
        )
        for name, reason in self.served_bundles.refused.items():
            logger.warning("bundle %s was refused: %s", name, reason)
        self.predictors = {
            name: Predictor(served, self.options.results) for name, served in self.served_bundles.served.items()
        }
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
        """Return an inference task for each bundle."""
        from_store = is_remote_store(self.options.studies)
        return {name: BundleInfer(predictor, from_store=from_store) for name, predictor in self.predictors.items()}

    def init_trainers(self) -> dict[str, Any]:
        """Return a training task for each bundle that has a training config."""
        return {
            name: BundleTrain(served, self.options.work, self.pseudonyms)
            for name, served in self.served_bundles.served.items()
            if served.trainable
        }

    def init_strategies(self) -> dict[str, Any]:
        """Return the active-learning strategies."""
        return {"random": RandomStrategy(), "uncertainty": UncertaintyStrategy(self.predictors)}

    def init_scoring_methods(self) -> dict[str, Any]:
        """Return the scoring methods of labels and images."""
        return {"dice": DiceScoring(self.predictors), "uncertainty": UncertaintyScoring(self.predictors)}

    def init_batch_infer(self) -> Callable[..., Any]:
        """Return the task that runs a bundle on many images."""
        return QuietBatch()

    def init_remote_datastore(self) -> Any:
        """Return the DICOMweb datastore, with medseg's reader of DICOM SEG, in the server and in each training."""
        dicom.dicom_to_nifti = on_the_series(dicom.dicom_to_nifti)
        return super().init_remote_datastore()

    def info(self) -> dict[str, Any]:
        """Return the description for viewers, including the refused bundles with the reasons."""
        meta: dict[str, Any] = super().info()
        return {**meta, "refused": self.served_bundles.refused}

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Predict one image, given by its id or uploaded with the request, after checks of image and tag."""
        model = request.get("model", "")
        if model in self.served_bundles.refused:
            raise RequestError(f"bundle '{model}' was refused: {self.served_bundles.refused[model]}")
        check_tag(request.get("label_tag", "original"))
        image = request.get("image")
        if isinstance(image, str):
            self.learn_names([image])
            if Path(image).exists():
                image_inside(Path(image), self.may_read())
            else:
                # A datastore joins ids to its cache's path, and this id may come from the request's unchecked body.
                check_query([("image", image)])
                self._fetch(image)
        result: dict[str, Any] = super().infer(request, datastore)
        return result

    def _fetch(self, image: str) -> None:
        """Download a series of a DICOMweb store into the cache.

        Raises:
            RequestError: No such series.
        """
        if image and is_remote_store(self.options.studies):
            try:
                self.datastore().get_image_uri(image)
            except IndexError as error:
                raise RequestError("no series with this id in the DICOMweb store") from error

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Choose the next image."""
        self.learn_names()
        chosen: dict[str, Any] = super().next_sample(request)
        return chosen

    def on_save_label(self, image_id: str, label_id: str) -> None:
        """Clear the datastore's cached list of labels, and log that a label was saved, without the image's name."""
        forget = getattr(type(self.datastore()).get_labeled_images, "cache_clear", None)
        if forget is not None:
            forget()
        self.learn_names([image_id])
        logger.info("a label was saved for %s", self.pseudonyms.of(image_id))

    def may_read(self) -> list[Path]:
        """Return the folders of the images that viewers upload, for a session or a single request."""
        return [self.options.sessions, Path(tempfile.gettempdir())]

    def learn_names(self, more: list[str] | None = None) -> None:
        """Add the names of the current images, and more, to the pseudonyms of logs."""
        try:
            known = list(self.datastore().list_images())
        except Exception:
            # A store that does not answer is reported by the request that needs it.
            known = []
        self.pseudonyms.learn([*known, *(more or [])])

    def _download_dcmqi_tools(self) -> None:
        """Check that dcmqi is installed, instead of downloading it."""
        if shutil.which(_DCMQI) is None:
            raise RequestError(
                f"no program {_DCMQI} (dcmqi), which writes DICOM SEG: install it with `make label-server`"
            )


class QuietBatch(BatchInferTask):  # type: ignore[misc]
    """Batch inference on one device: MONAI Label's own divides by the number of GPUs, which may be zero."""

    def __call__(self, request: dict[str, Any], datastore: Any, infer: Callable[..., Any]) -> dict[str, Any]:
        """Predict each image and save its mask; images that cannot be used are skipped."""

        def predicted(one: dict[str, Any], store: Any) -> dict[str, Any]:
            try:
                result: dict[str, Any] = infer(one, store)
            except MedsegError as error:
                logger.warning("skipped an image of a batch: %s", error)
                return {"error": str(error)}
            return result

        results: dict[str, Any] = super().__call__({**request, "multi_gpu": False}, datastore, predicted)
        return results
