"""MONAI Label tasks for the inference and training of a bundle."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.train import TrainTask

from medseg.bundle.knobs import knobs
from medseg.errors import RequestError
from medseg.files import replace_text
from medseg.label.fine_tuning import Tuned, TuningRequest, tune
from medseg.label.plain_nrrd import to_viewer_nrrd
from medseg.label.records import annotations_of

if TYPE_CHECKING:
    from medseg.label.predictor import Predictor
    from medseg.label.privacy import Pseudonyms
    from medseg.label.served_bundles import ServedBundle

__all__ = ["BundleInfer", "BundleTrain", "device_setting"]

logger = logging.getLogger("medseg.label")

_SECONDS_BETWEEN_LINES = 5.0
_STATS = "tuning.json"
_SET_HERE = ("device_name", "max_epochs", "pretrained", "val_interval", "label_mapping")


class BundleInfer(InferTask):  # type: ignore[misc]  # MONAI Label publishes no types
    """Inference task of one bundle.

    Args:
        predictor: Predictor of the bundle, which is loaded on first use.
        from_store: Whether the images are cached copies of series in a DICOMweb store.
    """

    def __init__(self, predictor: Predictor, *, from_store: bool = False) -> None:
        served = predictor.served
        super().__init__(
            type=InferType.SEGMENTATION,
            labels=served.labels,
            dimension=served.spatial_dims,
            description=served.description,
            config={"device": _devices()},
        )
        self.predictor = predictor
        self.from_store = from_store

    def is_valid(self) -> bool:
        """Return whether the bundle has weights."""
        return self.predictor.served.ready

    def info(self) -> dict[str, Any]:
        """Return the description of the bundle for viewers."""
        metadata = self.predictor.served.current.metadata
        return {
            **super().info(),
            "version": metadata.get("version"),
            "weights": self.predictor.weights_sha256(),
            "trained_here": self.predictor.served.current is self.predictor.served.tuned,
        }

    def __call__(self, request: dict[str, Any], callbacks: Any = None) -> tuple[str, dict[str, Any]]:
        """Return the file of the mask, and its label names and latencies."""
        start = time.perf_counter()
        image = request.get("image")
        if image == "":
            raise RequestError("no image with this id among the studies")
        if not isinstance(image, str):
            raise RequestError("regions of whole-slide images are not supported: the bundle reads image files")
        source = _dicom_folder(Path(image)) if self.from_store else Path(image)
        mask = self.predictor.predict(
            source, ending=request.get("result_extension") or "", settings=device_setting(request)
        )
        to_viewer_nrrd(mask, dtype=request.get("result_dtype"), compress=request.get("result_compress"))
        seconds = round(time.perf_counter() - start, 2)
        logger.info("%s predicted an image in %.2f s", self.predictor.served.name, seconds)
        return str(mask), {"label_names": self.labels, "latencies": {"total": seconds}, "centroids": {}}


class BundleTrain(TrainTask):  # type: ignore[misc]
    """Training task of one bundle on the saved labels.

    Args:
        served: Bundle to train.
        work: Folder of running trainings.
        pseudonyms: Pseudonyms of the cases in records.
    """

    def __init__(self, served: ServedBundle, work: Path, pseudonyms: Pseudonyms) -> None:
        super().__init__(f"Train {served.name} on the saved labels: {served.description}")
        self.served = served
        self.work = work
        self.pseudonyms = pseudonyms

    def config(self) -> dict[str, Any]:
        """Return the settings that a user may change, with their defaults."""
        known = knobs(self.served.source.load_configs("train")["train.json"])
        chosen: dict[str, Any] = {name: known[name] for name in ("learning_rate", "batch_size") if name in known}
        fields = TuningRequest()
        return {
            "device": _devices(),
            "max_epochs": fields.max_epochs,
            "val_split": fields.val_split,
            "pretrained": fields.pretrained,
            "publish": ["better", "always"],
            **chosen,
        }

    def info(self) -> dict[str, Any]:
        """Return the description of the training for viewers."""
        return {**super().info(), "version": self.served.source.metadata.get("version")}

    def stats(self) -> dict[str, Any]:
        """Return the result of the last training; empty before the first."""
        path = self.served.tuned.root.parent / f"{self.served.name}.{_STATS}"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        """Train, publish the weights as requested, and return the result."""
        tuned = tune(
            self.served,
            annotations_of(datastore),
            self._request(request),
            work=self.work,
            pseudonym=self.pseudonyms.of,
            report=_Lines(self.served.name),
        )
        stats = _plain(tuned)
        replace_text(self.served.tuned.root.parent / f"{self.served.name}.{_STATS}", json.dumps(stats, indent=2) + "\n")
        _line(f"{self.served.name}: {json.dumps(stats)}")
        return stats

    def _request(self, request: dict[str, Any]) -> TuningRequest:
        publish = request.get("publish", "better")
        known = knobs(self.served.source.load_configs("train")["train.json"])
        own = (*_SET_HERE, "bundle_root", "dataset_dir", "resume", "split", "split_file")
        settings = {name: value for name, value in request.items() if name in known and name not in own}
        return TuningRequest(
            max_epochs=request.get("max_epochs", TuningRequest.max_epochs),
            val_split=request.get("val_split", TuningRequest.val_split),
            pretrained=bool(request.get("pretrained", True)),
            publish=publish[0] if isinstance(publish, list) and publish else publish,
            settings=settings | device_setting(request),
        )


def device_setting(request: dict[str, Any]) -> dict[str, str]:
    """Return the device setting of a request; empty (automatic) if the requested device does not exist."""
    device = request.get("device")
    first = device[0] if isinstance(device, list) and device else device
    return {"device_name": first} if isinstance(first, str) and first in _devices() else {}


def _devices() -> list[str]:
    import torch

    return [*(f"cuda:{number}" for number in range(torch.cuda.device_count())), "cpu"]


def _dicom_folder(image: Path) -> Path:
    """Return the DICOM series from which the cached copy was converted, if it is in the cache as well."""
    folder = image.with_name(image.name.removesuffix(".gz").removesuffix(".nii"))
    return folder if image.name.endswith(".nii.gz") and folder.is_dir() and any(folder.iterdir()) else image


def _plain(tuned: Tuned) -> dict[str, Any]:
    stats = asdict(tuned)
    # JSON has no NaN.
    return {name: None if value != value else value for name, value in stats.items()}


class _Lines:
    """Progress callback that prints a line every few seconds for the server's log."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.last = 0.0

    def __call__(self, done: float, total: int, words: str) -> None:
        if time.monotonic() - self.last > _SECONDS_BETWEEN_LINES or done == total:
            self.last = time.monotonic()
            _line(f"{self.name}: epoch {done:.2f} of {total}, {words}")


def _line(text: str) -> None:
    sys.stdout.write(f"medseg: {text}\n")
    sys.stdout.flush()
