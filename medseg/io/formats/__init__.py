"""The file formats: one entry each in `FORMATS`, read and written by the modules of this package.

This module imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from medseg.types import CaseKind

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True)
class Format:
    """Description of a file format that needs no imports.

    Attributes:
        name: Name of the format in reports.
        module: Module with `read` and `read_grid` (`medseg.io.readers.Reader`) if the format has `images`, and with
            `write` (`medseg.io.writers.Writer`) if it has `written` suffixes. Imported with its first file; empty for
            slides, which are never read as a whole.
        images: Suffixes of images, in lower case; of two that match one name, the longer first.
        written: Suffixes of the masks that `write` supports, in lower case.
        masks: Suffixes for the masks of such images, if they differ from `written`. A mask keeps the suffix of its
            image if it is listed, and otherwise has the first one.
        outputs: Output format for all masks, as chosen by the user -> suffix.
        channels: Whether `write` also supports multi-channel maps.
        kind: "image" for 2D images without geometry, "slide" for whole-slide images, otherwise "volume".
        object_writer: Function of `module` that writes a mask and the names of its labels to one DICOM object; empty
            for label maps.
    """

    name: str
    module: str
    images: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    channels: bool = False
    kind: CaseKind = "volume"
    object_writer: str = ""

    @property
    def mask_endings(self) -> tuple[str, ...]:
        """Suffixes for the masks of such images, the default first."""
        return self.masks or self.written


_ENTRIES: Final = (
    Format(
        "nifti",
        "medseg.io.formats.nifti",
        images=(".nii.gz", ".nii"),
        written=(".nii.gz", ".nii"),
        outputs={"nifti": ".nii.gz"},
        channels=True,
    ),
    Format(
        "nrrd",
        "medseg.io.formats.nrrd",
        images=(".nrrd", ".nhdr"),
        written=(".nrrd",),
        outputs={"nrrd": ".nrrd"},
        channels=True,
    ),
    Format(
        "meta",
        "medseg.io.formats.metaimage",
        images=(".mha", ".mhd"),
        written=(".mha",),
        outputs={"mha": ".mha"},
        channels=True,
    ),
    Format(
        "mgh",
        "medseg.io.formats.mgh",
        images=(".mgz", ".mgh"),
        written=(".mgz", ".mgh"),
        outputs={"mgz": ".mgz"},
    ),
    Format("dicom", "medseg.io.dicom.reader", images=(".dcm",), masks=(".nii.gz", ".nii")),
    Format(
        "picture",
        "medseg.io.formats.raster",
        images=(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"),
        written=(".png", ".tif", ".tiff"),
        masks=(".png",),
        outputs={"png": ".png", "tiff": ".tif"},
        kind="image",
    ),
    # Read region by region by medseg.io.slides.slide.
    Format("slide", "", images=(".svs", ".ndpi", ".scn", ".mrxs", ".bif", ".vms"), masks=(".geojson",), kind="slide"),
    Format("dicom-seg", "medseg.io.dicom.seg", outputs={"dicom-seg": ".seg.dcm"}, object_writer="write_seg"),
    Format(
        "rtstruct", "medseg.io.dicom.rtstruct", outputs={"rtstruct": ".rtstruct.dcm"}, object_writer="write_rtstruct"
    ),
)
FORMATS: Final[Mapping[str, Format]] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
