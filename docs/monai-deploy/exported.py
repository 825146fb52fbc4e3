"""What the application has to know before it starts: of the exported network, and of the series.

The notes in a `.ts` file are a MONAI config, so a program. They are held against medseg's list of allowed parts, and
the series is looked through by medseg's reader, before the SDK loads either. Nothing here needs the SDK.
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.bundle.trust import check
from medseg.errors import CaseError, GeometryError, RequestError
from medseg.io import find_cases
from medseg.io.dicom import Series, open_series

__all__ = ["Exported", "find_series", "read_exported"]

NOTES = ("medseg.json", "metadata.json", "inference.json")
INSTEAD = "use `medseg predict --format dicom-seg`"


@dataclass(frozen=True)
class Exported:
    """A network that `medseg export --format ts` wrote.

    Attributes:
        name: of the bundle.
        version: of the bundle.
        labels: names of the classes 1, 2, ... in this order.
    """

    name: str
    version: str
    labels: tuple[str, ...]


def read_exported(path: Path) -> Exported:
    """Read the notes of a `.ts` file, after checking that they run nothing but parts of bundles.

    Raises:
        RequestError: there is no such file, it is not of `medseg export`, it was renamed, or its network takes what the
            SDK does not hand over.
        UntrustedBundleError: its config holds anything that a declarative bundle may not hold.
    """
    medseg, metadata, config = _notes(path)
    check({"metadata.json": metadata, "inference.json": config}, str(path))
    image = metadata["network_data_format"]["inputs"]["image"]
    if len(image["spatial_shape"]) != 3 or image["num_channels"] != 1:
        raise RequestError(
            f"{path} takes images with {len(image['spatial_shape'])} axes and {image['num_channels']} channels: MONAI "
            f"Deploy's operators hand over one volume with one channel; {INSTEAD}"
        )
    labels = {int(value): name for value, name in medseg["labels"].items() if int(value) > 0}
    if sorted(labels) != list(range(1, len(labels) + 1)):
        raise RequestError(f"{path} has the labels {sorted(labels)}: MONAI Deploy numbers them 1, 2, ...; {INSTEAD}")
    return Exported(medseg["name"], str(medseg["version"]), tuple(labels[value] for value in sorted(labels)))


def find_series(folder: Path) -> Series:
    """Return the one series in a folder, after checking that the SDK places it rightly.

    Raises:
        RequestError: there is no image.
        CaseError: there are several series, or the one is damaged.
        GeometryError: slices are missing, uneven or sheared, or the SDK would place it elsewhere.
    """
    cases = find_cases(folder)
    if len(cases) != 1:
        raise CaseError(f"{folder} holds {len(cases)} images: give a folder that holds one series")
    series = open_series(cases[0]["image"])
    if not series.uid or not series.has_geometry or len(series.files) < len(series.slices):
        raise CaseError(
            f"{folder} holds a series without UID or place in space, or with several slices in a file: MONAI Deploy "
            f"does not read these; {INSTEAD}"
        )
    across, down = series.grid.spacing[:2]
    if not math.isclose(across, down, rel_tol=1e-6):
        raise GeometryError(
            f"{folder} has pixels of {across:g} x {down:g} mm: version 4.0.0 of MONAI Deploy takes one side for the "
            f"other, so the mask would be wrong; {INSTEAD}"
        )
    return series


def _notes(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        with zipfile.ZipFile(path) as archive:
            folders = {name.partition("/")[0] for name in archive.namelist()}
            if len(folders) == 1 and path.stem not in folders:
                raise RequestError(
                    f"{path} was renamed, and MONAI Deploy finds the notes in it by its name: call it "
                    f"{folders.pop()}{path.suffix} again, or export anew"
                )
            return tuple(json.loads(archive.read(f"{path.stem}/extra/{name}")) for name in NOTES)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise RequestError(
            f"cannot read {path} as a file of `medseg export BUNDLE --format ts`: {type(error).__name__}: {error}"
        ) from error
