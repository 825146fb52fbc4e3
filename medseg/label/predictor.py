"""A bundle that stays loaded between requests: the masks of `medseg predict`, and the uncertainty of images."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING, Any

from medseg.errors import CaseError, RequestError, in_a_line, own_error
from medseg.files import sha256_file
from medseg.io import find_cases
from medseg.io.formats import FORMATS
from medseg.io.names import mask_name, split_suffix
from medseg.jobs.job import prepare
from medseg.jobs.loaded import LoadedBundle
from medseg.label.uncertainty import uncertainty

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from medseg.bundle.catalog import Bundle
    from medseg.label.served_bundles import ServedBundle

__all__ = ["Predictor"]

# Suffixes that viewers request and that differ from the suffixes of medseg's formats.
_ENDINGS = {".nii": "nifti", ".seg.nrrd": "nrrd"}


class Predictor:
    """Predicts with one bundle, one image at a time.

    The config is checked and the network built for the first image, and again when the weights change, as they do at
    the end of a training on the server.

    Args:
        served: Bundle to predict with.
        results: Folder of the masks, created if missing.
    """

    def __init__(self, served: ServedBundle, results: Path) -> None:
        self.served = served
        self.results = results
        self._lock = threading.Lock()
        self._key: tuple[object, ...] = ()
        self._loaded: LoadedBundle | None = None
        self._hashed: tuple[tuple[object, ...], str] | None = None

    def predict(self, image: Path, *, ending: str = "", settings: Mapping[str, Any] | None = None) -> Path:
        """Return a new file with the mask of an image, in the image's geometry.

        Args:
            image: File or DICOM folder of the image.
            ending: Suffix of the result, such as ".nrrd"; by default that of the image's format.
            settings: Settings of the bundle to override.

        Raises:
            RequestError: Unsupported suffix, unknown setting, or no weights.
            CaseError: The image cannot be used.
        """
        case = self._case(image, ending)
        with self._lock:
            self._ready(case["image"], settings or {}).write(case)
        return self.results / case["name"]

    def uncertainty(self, image: Path, *, settings: Mapping[str, Any] | None = None) -> float:
        """Return the network's uncertainty about an image, 0 to 1 (see `medseg.label.uncertainty`).

        Args:
            image: File or DICOM folder of the image.
            settings: Settings of the bundle to override.

        Raises:
            RequestError: Unknown setting, or no weights.
            CaseError: The image cannot be used.
        """
        case = self._case(image, "")
        with self._lock:
            loaded = self._ready(case["image"], settings or {})
            try:
                return uncertainty(loaded.workflow, case)
            except Exception as error:
                raise own_error(error) or CaseError(f"{case['image']}: {in_a_line(error)}") from error

    def weights_sha256(self) -> str:
        """Return the hash of the current weights, or an empty string if there are none."""
        state = _state(self.served.current.weights)
        if self._hashed is None or self._hashed[0] != state:
            weights = self.served.current.weights
            self._hashed = (state, sha256_file(weights) if weights.is_file() else "")
        return self._hashed[1]

    def _case(self, image: Path, ending: str) -> dict[str, str]:
        cases = find_cases(image)
        if len(cases) != 1:
            raise RequestError(f"expected one image in '{image}', found {len(cases)}")
        # The image's name may contain the patient's name, so the result has another one.
        known = mask_name(cases[0]["name"])
        name = uuid.uuid4().hex + split_suffix(known)[1]
        return {"image": cases[0]["image"], "name": mask_name(name, _format(ending)) if ending else name}

    def _ready(self, image: str, settings: Mapping[str, Any]) -> LoadedBundle:
        """Return the bundle with its current weights and these settings, loaded again if any of them changed."""
        bundle = self.served.current
        key = (*_state(bundle.weights), *_state(bundle.config_path("inference")), repr(sorted(settings.items())))
        if self._loaded is None or self._key != key:
            self._loaded = None
            self.results.mkdir(parents=True, exist_ok=True)
            paths = {"dataset_dir": image, "output_dir": str(self.results)}
            job = prepare("predict", bundle, {**_classes_only(bundle), **settings}, paths=paths)
            self._loaded, self._key = LoadedBundle(job), key
        return self._loaded


def _classes_only(bundle: Bundle) -> dict[str, Any]:
    """Return the setting that makes an instance-segmentation bundle write classes, for which viewers have names."""
    (config,) = bundle.load_configs("inference").values()
    return {"number_objects": False} if "number_objects" in config else {}


def _state(path: Path) -> tuple[object, ...]:
    if not path.is_file():
        return (str(path), None)
    status = path.stat()
    return (str(path), status.st_ino, status.st_mtime_ns, status.st_size)


def _format(ending: str) -> str:
    wanted = ending.lower() if ending.startswith(".") else f".{ending.lower()}"
    label_maps = [entry for entry in FORMATS.values() if not entry.object_writer]
    formats = {suffix: name for entry in label_maps for name, suffix in entry.outputs.items()}
    formats |= _ENDINGS
    if wanted not in formats:
        raise RequestError(f"unsupported suffix '{ending}' of a result: use one of {', '.join(formats)}")
    return formats[wanted]
