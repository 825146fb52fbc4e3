"""What a DICOM SEG of the label server says of its segments."""

from __future__ import annotations

import pytest
from pydicom.sr.codedict import codes

from medseg.errors import RequestError
from medseg.label.segments import with_terms


def test_codes_are_those_of_the_name() -> None:
    liver = with_terms({"name": "liver"}, 3, corrected=False)["segmentAttribute"]
    assert liver["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == codes.SCT.Liver.value
    assert (liver["labelID"], liver["SegmentLabel"], liver["SegmentAlgorithmType"]) == (3, "liver", "AUTOMATIC")
    kidney = with_terms({"name": "left kidney"}, 1, corrected=True)["segmentAttribute"]
    assert kidney["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == codes.SCT.Kidney.value
    assert kidney["SegmentedPropertyTypeModifierCodeSequence"]["CodeMeaning"] == "Left"
    assert kidney["SegmentAlgorithmType"] == "SEMIAUTOMATIC"


def test_a_name_without_a_code_is_no_organ() -> None:
    found = with_terms({"name": "posterior"}, 2, corrected=True)["segmentAttribute"][
        "SegmentedPropertyTypeCodeSequence"
    ]
    assert found["CodeMeaning"] == "posterior"
    assert found["CodingSchemeDesignator"] == "99MEDSEG"


def test_what_the_viewer_says_stays() -> None:
    own = {"labelID": 1, "SegmentLabel": "theirs"}
    found = with_terms({"name": "liver", "segmentAttribute": own, "model_name": "m"}, 1, corrected=True)
    assert found["segmentAttribute"] == own
    assert found["model_name"] == "m"
    colored = with_terms({"name": "liver", "color": [1.0, 2.0, 3.0, 255]}, 1, corrected=True)["segmentAttribute"]
    assert colored["recommendedDisplayRGBValue"] == [1, 2, 3]


def test_a_name_too_long_for_dicom_is_refused() -> None:
    with pytest.raises(RequestError, match="64"):
        with_terms({"name": "x" * 65}, 1, corrected=True)
