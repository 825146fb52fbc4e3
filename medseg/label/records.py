"""Saved labels in MONAI Label's datastore. MONAI Label is not imported; its objects are arguments."""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from medseg.errors import CaseError, RequestError, in_a_line, own_error, visible
from medseg.io import write_mask
from medseg.io.dicom.seg import read_seg
from medseg.label.annotations import Annotation

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydicom.dataset import Dataset

__all__ = ["annotations_of", "on_the_series"]

logger = logging.getLogger("medseg.label")

_FINAL: Final = "final"
_TRIALS: Final = 5
_UID: Final = re.compile(r"[0-9.]*[0-9]")


def annotations_of(datastore: Any) -> list[Annotation]:
    """Return the final labels of a datastore, each with the names that its viewer gave to the label values.

    Images are named by their ids, since a file may be a link to a file of another name.

    Args:
        datastore: MONAI Label's datastore.
    """
    found = []
    for image, record in _labeled(datastore):
        info, label = datastore.get_label_info(image, _FINAL), Path(record["label"])
        given = info.get("label_info") or _names_in_store(label, info.get("SeriesInstanceUID", ""))
        entries = [entry for entry in given if isinstance(entry, dict)]
        found.append(Annotation(image, Path(record["image"]), label, entries))
    return found


def _labeled(datastore: Any) -> list[tuple[str, dict[str, str]]]:
    """Return the id and the paths of each image with a final label.

    Raises:
        RequestError: The datastore kept changing while it was read.
    """
    for _ in range(_TRIALS):
        records = datastore.datalist()
        images = [image for image, entry in datastore.json()["objects"].items() if _FINAL in entry["labels"]]
        # A datastore that watches its folder may change between the two calls.
        if len(images) == len(records):
            return list(zip(images, records, strict=True))
    raise RequestError("the saved labels changed while they were being listed: try again when no label is being saved")


def on_the_series(convert: Callable[..., str | None]) -> Callable[..., str | None]:
    """Wrap MONAI Label's DICOM converter so that medseg reads the DICOM SEG objects of a store.

    Viewers omit empty frames, so MONAI Label's own reader returns a volume smaller than the image, and it stops at the
    first object that it cannot read.

    Args:
        convert: MONAI Label's converter: it takes the folder of a series and `is_seg`, and returns a file.
    """

    def converted(folder: str, is_seg: bool = False) -> str | None:
        if not is_seg:
            return convert(folder, is_seg)
        try:
            return str(_on_image(Path(folder)))
        except Exception as error:  # one unreadable object must not hide all other labels
            logger.warning("skipped a DICOM SEG object of the store: %s", own_error(error) or in_a_line(error))
            return None

    return converted


def _on_image(folder: Path) -> Path:
    """Write a segmentation, each segment with its number, in the geometry of its series, which is in the same cache."""
    file = min(folder.iterdir())
    series = str(_header(file).ReferencedSeriesSequence[0].SeriesInstanceUID)
    if not _UID.fullmatch(series):
        raise CaseError(f"invalid UID of the referenced series: {visible(series)!r}")
    image = folder.parents[2] / series
    labels, _ = read_seg(file, like=image)
    # NRRD, since MONAI Label takes a NIfTI file for a label sent by a viewer, which objects of the store never replace.
    target = Path(tempfile.gettempdir()) / f"{folder.name}.nrrd"
    write_mask(labels, target, like=image)
    return target


def _names_in_store(label: Path, series: str) -> list[dict[str, Any]]:
    """Return names and values of a label from a DICOMweb store, whose DICOM SEG object is cached beside it."""
    folder = label.parent / series
    files = sorted(folder.iterdir()) if series and folder.is_dir() else []
    segments = _header(files[0]).get("SegmentSequence", []) if files else []
    return [{"name": str(each.SegmentLabel), "idx": int(each.SegmentNumber)} for each in segments]


def _header(file: Path) -> Dataset:
    import pydicom

    return pydicom.dcmread(file, stop_before_pixels=True)
