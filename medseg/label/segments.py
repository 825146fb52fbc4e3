"""What DICOM SEG says of each segment, in the form in which MONAI Label hands it to dcmqi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medseg.io.dicom.terms import Coded, default_color, segment_term

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["with_terms"]

_ALGORITHM = "medseg"


def with_terms(info: Mapping[str, Any], value: int, *, corrected: bool) -> dict[str, Any]:
    """Return what a viewer said of a segment, with the codes of what its name means.

    MONAI Label's own default is the code of the spleen, whatever the segment is.

    Args:
        info: with "name", and perhaps "color" (red, green, blue, 0 to 255) or a "segmentAttribute" of the viewer's,
            which stays.
        value: of the segment in the mask.
        corrected: whether a person has saved it; otherwise it is the network's alone.

    Raises:
        RequestError: a name that is too long for DICOM.
    """
    term = segment_term(str(info.get("name", "")))
    attribute = {
        "labelID": value,
        "SegmentLabel": term.name,
        "SegmentDescription": str(info.get("description") or term.name),
        "SegmentAlgorithmType": "SEMIAUTOMATIC" if corrected else "AUTOMATIC",
        "SegmentAlgorithmName": _ALGORITHM,
        "SegmentedPropertyCategoryCodeSequence": _code(term.category),
        "SegmentedPropertyTypeCodeSequence": _code(term.type),
        "recommendedDisplayRGBValue": [int(part) for part in list(info.get("color") or default_color(value))[:3]],
    }
    if term.side is not None:
        attribute["SegmentedPropertyTypeModifierCodeSequence"] = _code(term.side)
    if term.region is not None:
        attribute["AnatomicRegionSequence"] = _code(term.region)
    return {"model_name": "Segmentation", "segmentAttribute": attribute, **info}


def _code(code: Coded) -> dict[str, str]:
    return {"CodeValue": code.value, "CodingSchemeDesignator": code.scheme, "CodeMeaning": code.meaning}
