from __future__ import annotations

import pytest

from medseg.errors import RequestError
from medseg.io.dicom.terms import OWN_SCHEME, SegmentTerm, default_color, lab_color, segment_term


@pytest.mark.parametrize(
    ("name", "category", "kind", "side", "region"),
    [
        ("liver", "Anatomical Structure", "10200004", None, None),
        ("Liver", "Anatomical Structure", "10200004", None, None),
        ("adrenal_gland_right", "Anatomical Structure", "23451007", "Right", None),
        ("left lung", "Anatomical Structure", "39607008", "Left", None),
        ("urinary_bladder", "Anatomical Structure", "89837001", None, None),
        ("adipose tissue", "Tissue", "55603005", None, None),
        ("tumour", "Morphologically Abnormal Structure", "108369006", None, None),
        ("lung nodule", "Morphologically Abnormal Structure", "27925004", None, "Lung"),
        ("kidney_cyst_left", "Morphologically Abnormal Structure", "367643001", "Left", "Kidney"),
    ],
)
def test_common_names_get_the_codes_of_the_standard(
    name: str, category: str, kind: str, side: str | None, region: str | None
) -> None:
    term = segment_term(name)
    assert term.name == name
    assert term.category.meaning == category
    assert (term.type.value, term.type.scheme) == (kind, "SCT")
    assert (term.side and term.side.meaning) == side
    assert (term.region and term.region.meaning) == region


@pytest.mark.parametrize("name", ["vertebrae_L5", "large", "liver segment 4", "foo cyst", "Leber", "normal", "背景"])
def test_other_names_get_a_code_of_our_own_instead_of_a_guess(name: str) -> None:
    term = segment_term(name)
    assert term.type.scheme == OWN_SCHEME
    assert term.type.meaning == name
    assert 0 < len(term.type.value) <= 16
    assert term.type.value.isascii()


def test_a_mapping_gives_codes_and_color() -> None:
    given = {
        "name": "lesion core",
        "category": ["49755003", "SCT", "Morphologically Abnormal Structure"],
        "type": ["6574001", "SCT", "Necrosis"],
        "color": [255, 128, 0],
    }
    term = segment_term(given)
    assert (term.type.meaning, term.color) == ("Necrosis", (255, 128, 0))
    assert segment_term(term) is term


def test_a_mapping_without_codes_is_looked_up_by_its_name() -> None:
    assert segment_term({"name": "spleen", "color": (1, 2, 3)}) == SegmentTerm(
        "spleen", segment_term("spleen").category, segment_term("spleen").type, (1, 2, 3)
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "Invalid DICOM text ''"),
        ("a\\b", "without"),
        ("x" * 65, "1 to 64"),
        ("two\nlines", "Invalid DICOM text"),
        (7, "expected its name"),
        ({"color": (1, 2, 3)}, "with 'name'"),
        ({"name": "a", "colour": (1, 2, 3)}, "colour"),
        ({"name": "a", "type": ["1", "SCT", "x"]}, "or neither"),
        ({"name": "a", "type": ["1", "SCT"], "category": ["1", "SCT", "x"]}, "expected code value"),
        ({"name": "a", "type": ["1" * 17, "SCT", "x"], "category": ["1", "SCT", "x"]}, "16 characters"),
        ({"name": "a", "type": None, "category": None}, "expected code value"),
        ({"name": "a", "color": (1, 2, 300)}, "0 to 255"),
        ({"name": "a", "color": "red"}, "0 to 255"),
    ],
)
def test_malformed_terms_are_refused_with_what_was_found(given: object, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        segment_term(given)  # type: ignore[arg-type]


def test_default_colors_differ_and_are_valid() -> None:
    colors = [default_color(value) for value in range(1, 120)]
    assert len(set(colors)) > 110
    assert all(0 <= part <= 255 for color in colors for part in color)


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (54.29, 80.8, 69.9)),
        ((0, 0, 255), (29.57, 68.3, -112.03)),
    ],
)
def test_colors_become_lab_under_d50(rgb: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
    assert lab_color(rgb) == pytest.approx(lab, abs=0.05)
