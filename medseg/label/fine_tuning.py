"""Fine-tuning of a bundle on saved labels, and the decision whether its new weights replace the old ones."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.bundle.catalog import Bundle
from medseg.bundle.knobs import knobs
from medseg.errors import RequestError
from medseg.files import replace_text, sha256_file
from medseg.jobs import api
from medseg.label.annotations import collect
from medseg.scoring.scores import nanmean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from medseg.label.annotations import Annotation
    from medseg.label.served_bundles import ServedBundle

__all__ = ["Tuned", "TuningRequest", "tune"]

logger = logging.getLogger(__name__)

# File in a trained copy.
_TRAINED_ON: Final = "trained_on.json"


@dataclass(frozen=True)
class TuningRequest:
    """Request for a training.

    Attributes:
        max_epochs: Number of epochs.
        val_split: Fraction of the labels for validation, above 0 and below 1.
        pretrained: Whether to start from the bundle's weights, if it has any.
        publish: When the new weights replace the old ones: "better" if they are not worse on the validation cases,
            "always" in any case.
        settings: Other settings of the bundle to override.
    """

    max_epochs: int = 10
    val_split: float = 0.2
    pretrained: bool = True
    publish: str = "better"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Check the values.

        Raises:
            RequestError: Invalid value.
        """
        if isinstance(self.max_epochs, bool) or not isinstance(self.max_epochs, int) or self.max_epochs < 1:
            raise RequestError(f"invalid max_epochs {self.max_epochs!r}: use an integer of 1 or more")
        if self.publish not in ("better", "always"):
            raise RequestError(f"invalid publish {self.publish!r}: use 'better' or 'always'")


@dataclass(frozen=True)
class Tuned:
    """Result of a training.

    Attributes:
        published: Whether the new weights are in use.
        before: Mean Dice of the old weights on the validation cases; NaN without old weights.
        after: Mean Dice of the new weights on the validation cases.
        train: Number of training cases.
        val: Number of validation cases.
        left_out: Reason for each skipped label, by pseudonym.
        weights_sha256: SHA-256 hash of the weights in use after the training.
    """

    published: bool
    before: float
    after: float
    train: int
    val: int
    left_out: Mapping[str, str]
    weights_sha256: str


def tune(
    served: ServedBundle,
    annotations: Sequence[Annotation],
    request: TuningRequest,
    *,
    work: Path,
    pseudonym: Callable[[str], str],
    report: Callable[[float, int, str], None] | None = None,
) -> Tuned:
    """Train a copy of a bundle with its `train.json`, and publish the copy.

    The bundle itself is never changed. Old and new weights are scored on the same validation cases, with the sliding
    window of inference. The copy appears under its final name only when it is complete.

    Args:
        served: Bundle to train.
        annotations: Saved labels.
        request: Values of the training.
        work: Folder of temporary files, created if missing; they are removed afterwards.
        pseudonym: Function that returns the pseudonym of an image id.
        report: Callback of each training step, as in `medseg.jobs.api.train`.

    Raises:
        RequestError: Invalid request, or too few labels.
        CaseError: An image cannot be used for training.
    """
    request.check()
    if not served.trainable:
        raise RequestError(f"bundle '{served.name}' has no configs/train.json: it cannot be trained")
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as place:
        folder = Path(place)
        seen = _trained_on(served)
        data = collect(
            annotations,
            served.labels,
            folder / "data",
            val_split=request.val_split,
            pseudonym=pseudonym,
            trained_on=seen,
        )
        for name, reason in data.left_out.items():
            logger.warning("skipped the label of %s: %s", name, reason)
        before = _score(served.current, data.root, folder / "before", served, request) if served.ready else math.nan
        copy = folder / "bundle" / served.name
        api.train(served.source.root, data.root, output=copy, settings=_settings(served, request), report=report)
        after = _score(Bundle(copy), data.root, folder / "after", served, request)
        published = request.publish == "always" or math.isnan(before) or after >= before
        if published:
            known = {*data.train, *(seen if request.pretrained else ())}
            replace_text(copy / _TRAINED_ON, json.dumps(sorted(known), indent=2) + "\n")
            _publish(copy, served.tuned.root)
        return Tuned(
            published, before, after, len(data.train), len(data.val), data.left_out, sha256_file(served.current.weights)
        )


def _trained_on(served: ServedBundle) -> set[str]:
    """Return the pseudonyms of the cases that the current weights were trained on."""
    path = served.current.root / _TRAINED_ON
    return set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()


def _settings(served: ServedBundle, request: TuningRequest) -> dict[str, Any]:
    """Return the settings of a training: the requested epochs, and labels mapped to their own values."""
    known = knobs(served.source.load_configs("train")["train.json"])
    settings: dict[str, Any] = {"max_epochs": request.max_epochs}
    if "val_interval" in known:
        settings["val_interval"] = min(int(known["val_interval"]), request.max_epochs)
    if "warmup_epochs" in known:
        settings["warmup_epochs"] = min(int(known["warmup_epochs"]), max(request.max_epochs - 1, 0))
    if "label_mapping" in known:
        settings["label_mapping"] = {str(value): value for value in (0, *sorted(served.labels.values()))}
    if request.pretrained and served.ready:
        settings["pretrained"] = str(served.current.weights)
    return settings | dict(request.settings)


def _score(bundle: Bundle, data: Path, output: Path, served: ServedBundle, request: TuningRequest) -> float:
    """Return the mean Dice of a bundle's weights on the validation cases."""
    mapping = _settings(served, request).get("label_mapping")
    settings: dict[str, Any] = {"label_mapping": mapping} if mapping else {}
    settings |= {name: value for name, value in request.settings.items() if name == "device_name"}
    manifest = api.evaluate(bundle.root, data, output=output, settings=settings)
    means = [case.metrics.get("mean") for case in manifest.cases.values()]
    return nanmean([mean for mean in means if mean is not None])


def _publish(copy: Path, target: Path) -> None:
    """Move a trained copy to its final folder, replacing an older copy."""
    shutil.rmtree(copy / "runs", ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    copy.rename(target)
    shutil.rmtree(old, ignore_errors=True)
