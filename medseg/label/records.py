"""What MONAI Label's store has of saved labels. No import of MONAI Label, whose objects come as arguments."""

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
    """Return the final labels of a store, each with what its viewer said of the values.

    Images are called by their ids: a file may be a link to one of another name.
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
        RequestError: the store changes all the time.
    """
    for _ in range(_TRIALS):
        records = datastore.datalist()
        images = [image for image, entry in datastore.json()["objects"].items() if _FINAL in entry["labels"]]
        # A store that watches its folder may change between the two answers.
        if len(images) == len(records):
            return list(zip(images, records, strict=True))
    raise RequestError("the saved labels change while they are being listed: try again when nobody saves any")


def on_the_series(convert: Callable[..., str | None]) -> Callable[..., str | None]:
    """Return MONAI Label's converter of DICOM, with our reading of the DICOM SEG that a store holds.

    Viewers leave out the frames without voxels, of which its own reading makes a smaller volume than the image, and it
    stops at the first object that it cannot read.

    Args:
        convert: takes a series' folder and `is_seg`, and returns a file.
    """

    def converted(folder: str, is_seg: bool = False) -> str | None:
        if not is_seg:
            return convert(folder, is_seg)
        try:
            return str(_on_image(Path(folder)))
        except Exception as error:  # one object of somebody else's must not hide all other labels
            logger.warning("a DICOM SEG of the store was left out: %s", own_error(error) or in_a_line(error))
            return None

    return converted


def _on_image(folder: Path) -> Path:
    """Write a segmentation, each segment with its number, on the grid of the series that lies in the same cache."""
    file = min(folder.iterdir())
    series = str(_header(file).ReferencedSeriesSequence[0].SeriesInstanceUID)
    if not _UID.fullmatch(series):
        raise CaseError(f"it refers to the series {visible(series)!r}, which is no UID")
    image = folder.parents[2] / series
    labels, _ = read_seg(file, like=image)
    # NRRD, since NIfTI would be taken for a label that a viewer sent, which no object of the store replaces.
    target = Path(tempfile.gettempdir()) / f"{folder.name}.nrrd"
    write_mask(labels, target, like=image)
    return target


def _names_in_store(label: Path, series: str) -> list[dict[str, Any]]:
    """Return names and values of a label that came from a DICOMweb store, which keeps the object beside the label."""
    folder = label.parent / series
    files = sorted(folder.iterdir()) if series and folder.is_dir() else []
    segments = _header(files[0]).get("SegmentSequence", []) if files else []
    return [{"name": str(each.SegmentLabel), "idx": int(each.SegmentNumber)} for each in segments]


def _header(file: Path) -> Dataset:
    import pydicom

    return pydicom.dcmread(file, stop_before_pixels=True)
