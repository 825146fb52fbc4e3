"""Training a bundle on saved labels, and deciding whether its new weights replace the old ones."""

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
    from medseg.label.served_bundles import Offer

__all__ = ["Tuned", "TuningRequest", "tune"]

logger = logging.getLogger(__name__)

# In a trained copy.
_TRAINED_ON: Final = "trained_on.json"


@dataclass(frozen=True)
class TuningRequest:
    """What somebody asked for.

    Attributes:
        max_epochs: epochs to train.
        val_split: share of the labels that are for validation.
        pretrained: start from the weights that the bundle has, if it has any.
        publish: "better" takes the new weights into use if they are not worse than the old ones on the validation
            cases, "always" in any case.
        settings: other knobs of the bundle to change.
    """

    max_epochs: int = 10
    val_split: float = 0.2
    pretrained: bool = True
    publish: str = "better"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            RequestError: says which value, and what was expected.
        """
        if isinstance(self.max_epochs, bool) or not isinstance(self.max_epochs, int) or self.max_epochs < 1:
            raise RequestError(f"max_epochs is {self.max_epochs!r}: use a whole number of 1 or more")
        if self.publish not in ("better", "always"):
            raise RequestError(f"publish is {self.publish!r}: use 'better' or 'always'")


@dataclass(frozen=True)
class Tuned:
    """What came of a training.

    Attributes:
        published: whether the new weights are in use.
        before: mean Dice of the old weights on the validation cases; NaN without old weights.
        after: mean Dice of the new ones.
        train: number of cases that were trained on.
        val: number of cases that were validated on.
        left_out: pseudonym of each saved label that could not be used, to the reason.
        weights_sha256: hash of the weights that are in use now.
    """

    published: bool
    before: float
    after: float
    train: int
    val: int
    left_out: Mapping[str, str]
    weights_sha256: str


def tune(
    offer: Offer,
    annotations: Sequence[Annotation],
    request: TuningRequest,
    *,
    work: Path,
    pseudonym: Callable[[str], str],
    report: Callable[[float, int, str], None] | None = None,
) -> Tuned:
    """Train a copy of a bundle by its own config, and put the copy into use.

    The bundle itself is never changed. Both weights are scored on the same validation cases, by the sliding window that
    predicts; the copy appears under its final name only when it is complete.

    Args:
        offer: the bundle.
        annotations: saved labels.
        request: what is asked for.
        work: folder for what the training needs; it is empty again afterwards.
        pseudonym: gives the name of a case in records.
        report: told about each step, as in `medseg.jobs.api.train`.

    Raises:
        RequestError: the request cannot be, or there are too few labels.
        CaseError: an image cannot be trained on.
    """
    request.check()
    if not offer.trainable:
        raise RequestError(f"bundle '{offer.name}' has no configs/train.json: it cannot be trained")
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as place:
        folder = Path(place)
        seen = _trained_on(offer)
        data = collect(
            annotations,
            offer.labels,
            folder / "data",
            val_split=request.val_split,
            pseudonym=pseudonym,
            trained_on=seen,
        )
        for name, reason in data.left_out.items():
            logger.warning("the label of %s was left out: %s", name, reason)
        before = _score(offer.current, data.root, folder / "before", offer, request) if offer.ready else math.nan
        copy = folder / "bundle" / offer.name
        api.train(offer.source.root, data.root, output=copy, settings=_settings(offer, request), report=report)
        after = _score(Bundle(copy), data.root, folder / "after", offer, request)
        published = request.publish == "always" or math.isnan(before) or after >= before
        if published:
            known = {*data.train, *(seen if request.pretrained else ())}
            replace_text(copy / _TRAINED_ON, json.dumps(sorted(known), indent=2) + "\n")
            _publish(copy, offer.tuned.root)
        return Tuned(
            published, before, after, len(data.train), len(data.val), data.left_out, sha256_file(offer.current.weights)
        )


def _trained_on(offer: Offer) -> set[str]:
    """Return the pseudonyms of the saved labels that the present weights were trained on."""
    path = offer.current.root / _TRAINED_ON
    return set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()


def _settings(offer: Offer, request: TuningRequest) -> dict[str, Any]:
    """Return the knobs of a training: few epochs, each label as the bundle predicts it."""
    known = knobs(offer.source.load_configs("train")["train.json"])
    settings: dict[str, Any] = {"max_epochs": request.max_epochs}
    if "val_interval" in known:
        settings["val_interval"] = min(int(known["val_interval"]), request.max_epochs)
    if "warmup_epochs" in known:
        settings["warmup_epochs"] = min(int(known["warmup_epochs"]), max(request.max_epochs - 1, 0))
    if "label_mapping" in known:
        settings["label_mapping"] = {str(value): value for value in (0, *sorted(offer.labels.values()))}
    if request.pretrained and offer.ready:
        settings["pretrained"] = str(offer.current.weights)
    return settings | dict(request.settings)


def _score(bundle: Bundle, data: Path, output: Path, offer: Offer, request: TuningRequest) -> float:
    """Return the mean Dice of the weights of a bundle on the validation cases."""
    mapping = _settings(offer, request).get("label_mapping")
    settings: dict[str, Any] = {"label_mapping": mapping} if mapping else {}
    settings |= {name: value for name, value in request.settings.items() if name == "device_name"}
    manifest = api.evaluate(bundle.root, data, output=output, settings=settings)
    means = [case.metrics.get("mean") for case in manifest.cases.values()]
    return nanmean([mean for mean in means if mean is not None])


def _publish(copy: Path, target: Path) -> None:
    """Move a trained copy to its final place; an older one there is replaced."""
    shutil.rmtree(copy / "runs", ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    copy.rename(target)
    shutil.rmtree(old, ignore_errors=True)
