"""The file formats, one entry each in `FORMATS`; the modules beside read and write them. Standard library only."""

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
    """What medseg knows about a file format before NumPy is imported.

    Attributes:
        name: Name of the format in reports.
        module: Module with `read` and `read_grid` (`medseg.io.readers.Reader`) if there are `images`, and with `write`
            (`medseg.io.writers.Writer`) if there are `written` endings. Imported with the first file; empty for slides,
            which are never read as a whole.
        images: Endings of images, in lower case; of two that fit one name, the longer first.
        written: Endings of the masks that `write` takes, in lower case.
        masks: Endings that the mask of such an image may have, where these are not `written`. A mask keeps the ending
            of its image if that is among them, and otherwise gets the first.
        outputs: What users may choose as the format of all masks, with the ending of their names.
        channels: Whether `write` also takes maps of several channels.
        kind: "image" for 2D images without geometry, "slide" for whole-slide images, otherwise "volume".
        object_writer: Function of `module` that writes a mask together with the names of its labels into one DICOM
            object; empty for label maps.
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
        """Endings that the mask of such an image may have, the default first."""
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
    # Read in pieces by medseg.io.slides.slide.
    Format("slide", "", images=(".svs", ".ndpi", ".scn", ".mrxs", ".bif", ".vms"), masks=(".geojson",), kind="slide"),
    Format("dicom-seg", "medseg.io.dicom.seg", outputs={"dicom-seg": ".seg.dcm"}, object_writer="write_seg"),
    Format(
        "rtstruct", "medseg.io.dicom.rtstruct", outputs={"rtstruct": ".rtstruct.dcm"}, object_writer="write_rtstruct"
    ),
)
FORMATS: Final[Mapping[str, Format]] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
