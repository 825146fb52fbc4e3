"""DICOM SEG attributes of each segment, in the form that MONAI Label passes to dcmqi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medseg.io.dicom.terms import Coded, default_color, segment_term

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["with_terms"]

_ALGORITHM = "medseg"


def with_terms(info: Mapping[str, Any], value: int, *, corrected: bool) -> dict[str, Any]:
    """Return the viewer's description of a segment, completed by the DICOM codes of its name.

    MONAI Label's own default for every segment is the code of the spleen.

    Args:
        info: Description of the segment: its "name", optionally a "color" (RGB, 0 to 255) or a "segmentAttribute",
            which is kept.
        value: Value of the segment in the mask.
        corrected: Whether a user has saved the segment (semi-automatic) or the network predicted it (automatic).

    Raises:
        RequestError: Name too long for DICOM.
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
