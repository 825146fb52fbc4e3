"""Grouping of the cases of a data set by patient.

The patient of a case is identified, in this order, by

1. the data set: an entry `"patient"` of a case in `dataset.json`, or `"patients": {case: patient}` in `split.json`;
2. the PatientID of a DICOM image;
3. patterns in the case's name:

   * `sub-XX` of BIDS, `TCGA-XX-XXXX`, `LIDC-IDRI-XXXX`;
   * `patient` or `subject` followed by a number;
   * the part before `_slice`, `_frame`, `_visit`, `_scan`, `_crop`, `_patch`, `_tile`, `_part` and a final number;
   * the part before `L`, `R`, `_left` or `_right` after a number (two eyes, two knees).

Otherwise the case is assumed to be the only one of its patient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from medseg.errors import RequestError
from medseg.io.datasets import DATASET_FILE, SPLIT_FILE, Dataset, read_dataset, read_json
from medseg.io.dicom.detect import image_kind
from medseg.io.names import StrPath, absolute

__all__ = ["find_patients", "patient_of"]

_PATTERNS: Final = (
    r"(?i)(?:^|/)(sub-[a-z0-9]+)(?=[_/.]|$)",
    r"(?i)(tcga-[a-z0-9]{2}-[a-z0-9]{4})",
    r"(?i)(lidc-idri-\d{4})",
    r"(?i)((?:patient|subject)[_-]?\d+)",
    r"(?i)^(.*[a-z0-9])[_-](?:slice|frame|visit|scan|crop|patch|tile|part)[_-]?\d+$",
    r"(?i)^(.*\d)[_-]?(?:left|right)$",
    r"^(.*\d)[LR]$",
)


def patient_of(name: str) -> str:
    """Return the patient in a case's name, in lower case; empty if the name matches no pattern."""
    for pattern in _PATTERNS:
        match = re.search(pattern, name)
        if match:
            return match[1].lower()
    return ""


def find_patients(path: StrPath) -> dict[str, str]:
    """Return the patient of each labeled case of a data set, identified by the name of the patient's first case.

    Case names identify patients so that no DICOM header value is disclosed.

    Args:
        path: Data set, as for `medseg.components.find_dataset`.

    Raises:
        RequestError: There is no data set, or an entry about patients is malformed.
        CaseError: A DICOM image cannot be read.
    """
    dataset = read_dataset(path)
    listed = dict(_listed(absolute(path), dataset))
    groups: dict[tuple[str, str], list[str]] = {}
    for stem in sorted(dataset.images):
        groups.setdefault(_key(stem, dataset.images[stem], listed), []).append(stem)
    return {stem: stems[0] for stems in groups.values() for stem in stems}


def _key(stem: str, image: Path, listed: Mapping[str, str]) -> tuple[str, str]:
    if stem in listed:
        return "listed", listed[stem]
    number = _patient_id(image)
    if number:
        return "dicom", number
    named = patient_of(stem)
    return ("name", named) if named else ("case", stem)


def _listed(given: Path, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Yield case and patient from the files of the data set."""
    stems = {image: stem for stem, image in dataset.images.items()}
    listing = given if given.is_file() else dataset.root / DATASET_FILE
    content = read_json(listing) if listing.is_file() else {}
    for section in ("training", "validation"):
        for entry in content.get(section) or []:
            if isinstance(entry, Mapping) and "patient" in entry:
                image = absolute(dataset.root / str(entry.get("image")))
                if image in stems:
                    yield stems[image], _text(entry["patient"], listing)
    split = dataset.root / SPLIT_FILE
    named = read_json(split).get("patients", {}) if split.is_file() else {}
    if not isinstance(named, Mapping):
        raise RequestError(f"{split}: 'patients' is {named!r}: expected an object that maps case names to patients.")
    for stem, patient in named.items():
        if stem not in dataset.images:
            raise RequestError(f"{split}: 'patients' lists the case {stem!r}, which has no image in {dataset.base}.")
        yield stem, _text(patient, split)


def _text(patient: Any, source: Path) -> str:
    if isinstance(patient, bool) or not isinstance(patient, str | int) or patient == "":
        raise RequestError(f"{source}: invalid patient {patient!r}: expected a string or an integer.")
    return str(patient)


def _patient_id(image: Path) -> str:
    if image_kind(image) != "dicom":
        return ""
    from medseg.io.dicom import open_series
    from medseg.io.dicom.objects import reading

    series = open_series(image)
    with reading(image):
        header = next(series.headers())
        return str(header.get("PatientID") or "").strip()
