"""DICOM terms of labels: a name, and codes for its category and type.

Codes come from the dictionary of the standard in pydicom (context groups 7159, 7166 and 7192), not from a private
table. A name is looked up by its words: "liver", "adrenal_gland_right", "lung nodule". An unknown name gets a private
code with no other meaning than the name, instead of a guess.
"""

from __future__ import annotations

import colorsys
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from medseg.errors import RequestError

__all__ = ["OWN_SCHEME", "Coded", "SegmentTerm", "TermLike", "default_color", "lab_color", "segment_term"]

OWN_SCHEME = "99MEDSEG"
_MAX_TEXT = 64
_MAX_CODE = 16
# Synonyms of terms in the dictionary.
_OTHER_WORDS = {
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "cancer": "neoplasm",
    "metastasis": "neoplasm secondary",
    "urinary bladder": "bladder",
    "oesophagus": "esophagus",
    "small bowel": "small intestine",
    "large bowel": "large intestine",
    "gall bladder": "gallbladder",
    "vessel": "blood vessel",
    "vessels": "blood vessel",
    "fat": "adipose tissue",
    "muscle": "muscle tissue",
    "thyroid gland": "thyroid",
    "vertebrae": "vertebra",
    "clavicula": "clavicle",
    "lungs": "lung",
    "kidneys": "kidney",
}
_SIDES = ("left", "right")


class Coded(NamedTuple):
    """A coded concept: code value (at most 16 characters), coding scheme ("SCT", "DCM"), and code meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class SegmentTerm:
    """The DICOM term of a label.

    Attributes:
        name: Displayed name, at most 64 characters.
        category: Property category, such as `("91723000", "SCT", "Anatomical Structure")`.
        type: Property type, such as `("10200004", "SCT", "Liver")`.
        color: Display color (red, green, blue), 0 to 255; by default derived from the label value.
        side: Type modifier, such as `("7771000", "SCT", "Left")`.
        region: Anatomic region of a lesion.
    """

    name: str
    category: Coded
    type: Coded
    color: tuple[int, int, int] | None = None
    side: Coded | None = None
    region: Coded | None = None

    def __post_init__(self) -> None:
        _check_text(self.name, "the name of a label")
        for field in ("category", "type", "side", "region"):
            given = getattr(self, field)
            if given is not None or field in ("category", "type"):
                object.__setattr__(self, field, _checked_code(given, f"the {field} of label '{self.name}'"))
        if self.color is not None:
            object.__setattr__(self, "color", _checked_color(self.color, self.name))


TermLike: TypeAlias = SegmentTerm | str | Mapping[str, Any]


def segment_term(given: TermLike) -> SegmentTerm:
    """Return the term of a label.

    Args:
        given: A term; a mapping with `name` and other fields of `SegmentTerm` (codes as lists of three strings), with
            both `category` and `type` or neither; or a name, which is looked up.

    Raises:
        RequestError: A field is unknown or malformed.
    """
    if isinstance(given, SegmentTerm):
        return given
    if isinstance(given, str):
        return _by_name(given)
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise RequestError(f"Invalid term of a label {given!r}: expected its name, or a mapping with 'name'.")
    fields = {str(key): value for key, value in given.items()}
    unknown = set(fields) - set(SegmentTerm.__dataclass_fields__)
    if unknown or ("category" in fields) != ("type" in fields):
        raise RequestError(
            f"The term of label '{fields['name']}' has the fields {', '.join(sorted(fields))}: expected "
            f"{', '.join(SegmentTerm.__dataclass_fields__)}, with both 'category' and 'type' or neither."
        )
    return SegmentTerm(**fields) if "type" in fields else replace(_by_name(fields["name"]), **fields)


def default_color(value: int) -> tuple[int, int, int]:
    """Return a saturated color for a label value; consecutive values have distant hues."""
    golden = 0.618033988749895
    red, green, blue = colorsys.hsv_to_rgb((value * golden) % 1.0, 0.75, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def lab_color(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    """Convert an sRGB color (0 to 255) to CIE L*a*b* under D50, in which DICOM stores display colors."""
    linear = [(c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in rgb]
    # sRGB to XYZ, adapted to D50 (Bradford), divided by the white point 0.9642, 1, 0.8249: white becomes (1, 1, 1).
    rows = ((0.43607, 0.38515, 0.14308), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))
    bent = []
    for row in rows:
        part = sum(factor * value for factor, value in zip(row, linear, strict=True)) / sum(row)
        bent.append(part ** (1 / 3) if part > (6 / 29) ** 3 else part / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = bent
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def _by_name(name: str) -> SegmentTerm:
    _check_text(name, "the name of a label")
    words = re.sub(r"[\W_]+", " ", name).lower().split()
    sides = [word for word in words if word in _SIDES]
    rest = " ".join(word for word in words if word not in _SIDES)
    found = _found(rest) if len(sides) <= 1 else None
    if found is None:
        return SegmentTerm(name, _category("Tissue"), _own_code(name))
    category, kind, region = found
    side = _look_up("SCT", sides[0]) if sides else None
    return SegmentTerm(name, category, kind, side=side, region=region)


def _found(words: str) -> tuple[Coded, Coded, Coded | None] | None:
    """Return category, type and region for the name of a structure, tissue, lesion, or lesion of a structure."""
    for group, category in (("cid7192", "AnatomicalStructure"), ("cid7166", "Tissue")):
        if (kind := _look_up(group, words)) is not None:
            return _category(category), kind, None
    where, _, what = words.rpartition(" ")
    for lesion, place in ((words, ""), (what, where)):
        kind, region = _look_up("cid7159", lesion), _look_up("cid7192", place)
        if kind is not None and lesion not in ("background", "normal") and (region is not None or not place):
            return _category("MorphologicallyAbnormalStructure"), kind, region
    return None


def _look_up(group: str, words: str) -> Coded | None:
    from pydicom.sr.codedict import codes

    words = _OTHER_WORDS.get(words, words)
    keyword = "".join(word.capitalize() for word in words.split())
    try:
        code = getattr(getattr(codes, group), keyword) if keyword else None
    except AttributeError:
        return None
    return None if code is None else Coded(str(code.value), str(code.scheme_designator), str(code.meaning))


def _category(keyword: str) -> Coded:
    from pydicom.sr.codedict import codes

    # In lower case, and by context group, for older versions of pydicom.
    code = getattr(codes.cid7150, keyword)
    return Coded(str(code.value), str(code.scheme_designator), str(code.meaning))


def _own_code(name: str) -> Coded:
    value = re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")
    if not value or len(value) > _MAX_CODE or not name.isascii():
        value = hashlib.sha256(name.encode()).hexdigest()[:_MAX_CODE].upper()
    return Coded(value, OWN_SCHEME, name)


def _check_text(text: Any, what: str) -> None:
    wrong = not isinstance(text, str) or not text.strip() or len(text) > _MAX_TEXT
    if wrong or "\\" in text or not text.isprintable():
        raise RequestError(
            f"Invalid DICOM text {text!r} for {what}: expected 1 to {_MAX_TEXT} characters without '\\'."
        )


def _checked_code(given: Any, what: str) -> Coded:
    parts: Sequence[Any] = given if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(parts) != 3 or not all(isinstance(part, str) and part for part in parts):
        raise RequestError(
            f"{what[0].upper()}{what[1:]} is {given!r}: expected code value, coding scheme and code meaning."
        )
    code = Coded(*parts)
    for part in code:
        _check_text(part, what)
    if len(code.value) > _MAX_CODE or len(code.scheme) > _MAX_CODE:
        raise RequestError(
            f"{what[0].upper()}{what[1:]} is {given!r}: expected at most {_MAX_CODE} characters for value and scheme."
        )
    return code


def _checked_color(given: Any, name: str) -> tuple[int, int, int]:
    parts = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(parts) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in parts):
        raise RequestError(f"Invalid color {given!r} of label '{name}': expected red, green and blue, 0 to 255.")
    return parts
