"""What follows from the data alone: template, intensities, grid, channels, and the name of the bundle."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import RequestError
from medseg.planning.case_stats import CaseStats
from medseg.planning.choices import analyze, bundle_name
from medseg.planning.request import PlanRequest
from tests.planning.synthetic import TISSUE, color_image, fingerprint, image, volume

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
CT = volume(low=-1000.0, high=1500.0)


@pytest.mark.parametrize(
    ("facts", "channel_names", "template"),
    [
        ({"low": -1000.0}, (), "ct_volume"),
        ({"low": -1000.0, "dtype": "float32"}, (), "mr_volume"),
        ({"low": -1000.0, "dtype": "float32"}, ("CT",), "ct_volume"),
        ({"low": -1000.0, "dtype": "float32", "modality": "CT"}, (), "ct_volume"),
        ({"low": -1000.0}, (" ct ",), "ct_volume"),
        ({"low": -1000.0}, ("PET",), "mr_volume"),
        ({"low": -1000.0, "channels": 2}, ("CT", "CT"), "ct_volume"),
        ({"low": -1000.0, "channels": 2}, ("CT", "PET"), "mr_volume"),
        ({"low": -100.0}, ("CT",), "mr_volume"),
        ({"low": -1000.0, "high": 35_000.0}, ("CT",), "ct_volume"),
        ({"low": -1000.0, "high": 35_001.0}, ("CT",), "mr_volume"),
    ],
)
def test_ct_needs_hounsfield_units_and_nothing_that_contradicts_them(
    facts: dict[str, Any], channel_names: tuple[str, ...], template: str
) -> None:
    found = fingerprint(volume(**facts), volume(**facts), channel_names=channel_names)
    analysis = analyze(found, PlanRequest())
    assert analysis.template == template
    assert ("intensity_range" in analysis.knobs) == (template == "ct_volume")
    assert ("normalization" in analysis.reasons) == (template == "mr_volume")


@pytest.mark.parametrize(("without_air", "template"), [(0, "ct_volume"), (1, "ct_volume"), (2, "mr_volume")])
def test_one_volume_in_ten_may_be_cropped_to_tissue(without_air: int, template: str) -> None:
    cases = [replace(CT, low=-50.0)] * without_air + [CT] * (10 - without_air)
    analysis = analyze(fingerprint(*cases), PlanRequest())
    assert analysis.template == template
    assert f"{10 - without_air} of 10" in analysis.reasons["template"]


def test_each_volume_has_to_be_ct_where_headers_say_the_modality() -> None:
    said = replace(CT, dtype="float32", modality="CT")
    assert analyze(fingerprint(said, said), PlanRequest()).template == "ct_volume"
    assert analyze(fingerprint(said, replace(said, modality="PT")), PlanRequest()).template == "mr_volume"


@pytest.mark.parametrize(
    ("cases", "template", "channels"),
    [
        ([color_image(), color_image()], "rgb_image", ["red", "green", "blue"]),
        ([color_image(), image()], "rgb_image", ["red", "green", "blue"]),
        ([image(), image()], "grey_image", ["grey"]),
        ([image(channels=2), image(channels=2)], "grey_image", ["channel 0", "channel 1"]),
        # A gray image that was stored as RGB, among gray ones.
        ([image(channels=3), image()], "grey_image", ["grey"]),
        ([volume()], "mr_volume", ["MRI"]),
        ([CT], "ct_volume", ["CT"]),
        ([volume(channels=2)], "mr_volume", ["channel 0", "channel 1"]),
    ],
)
def test_channels_are_named_after_the_images(cases: list[CaseStats], template: str, channels: list[str]) -> None:
    analysis = analyze(fingerprint(*cases), PlanRequest())
    assert analysis.template == template
    assert analysis.channels == {str(index): name for index, name in enumerate(channels)}


def test_channel_names_of_the_listing_are_taken_if_they_are_as_many_as_the_channels() -> None:
    cases = [volume(channels=2)]
    named = analyze(fingerprint(*cases, channel_names=("T1", "FLAIR")), PlanRequest())
    assert named.channels == {"0": "T1", "1": "FLAIR"}
    short = analyze(fingerprint(*cases, channel_names=("T1",)), PlanRequest())
    assert short.channels == {"0": "channel 0", "1": "channel 1"}
    color = analyze(fingerprint(color_image(), channel_names=("H", "E", "DAB")), PlanRequest())
    assert color.channels["0"] == "red"


@PROPERTY
@given(st.floats(-1000, 2000), st.floats(0, 2500))
def test_a_ct_window_holds_the_marked_values_with_a_margin_and_ends_on_tens(low: float, width: float) -> None:
    found = fingerprint(CT, intensities=(replace(TISSUE, low=low, high=low + width),))
    bottom, top = analyze(found, PlanRequest()).knobs["intensity_range"]
    assert bottom % 10 == top % 10 == 0
    margin = 0.1 * width - 1e-6
    assert bottom <= low - margin
    assert top >= low + width + margin
    assert 120 <= top - bottom <= 1.2 * max(width, 100) + 20 + 1e-6


def test_a_ct_window_holds_every_channel() -> None:
    channels = (replace(TISSUE, low=-200.0, high=0.0), replace(TISSUE, low=100.0, high=600.0))
    analysis = analyze(fingerprint(replace(CT, channels=2), intensities=channels), PlanRequest())
    assert analysis.knobs["intensity_range"] == [-280.0, 680.0]


def test_the_reason_for_standardizing_names_how_far_the_scales_differ() -> None:
    cases = [volume(percentiles=(0.0, 10.0, top)) for top in (321.0, 4567.0, 89.0)]
    reason = analyze(fingerprint(*cases), PlanRequest()).reasons["normalization"]
    assert "89" in reason
    assert "4567" in reason


@pytest.mark.parametrize(
    ("tops", "one_scale"), [((250.0, 240.0), True), ((200.0, 140.0), True), ((250.0, 90.0), False), ((9.0, 0.0), False)]
)
def test_color_keeps_its_scale_only_if_images_are_equally_bright(tops: tuple[float, ...], one_scale: bool) -> None:
    cases = [color_image(percentiles=(0.0, 50.0, top)) for top in tops for _ in range(5)]
    analysis = analyze(fingerprint(*cases), PlanRequest())
    assert ("intensity_range" in analysis.knobs) == one_scale
    assert ("intensity" in analysis.blocks) != one_scale
    assert analysis.norm == ("batch" if one_scale else "instance")


def test_one_odd_color_image_in_twenty_changes_no_scale() -> None:
    cases = [color_image() for _ in range(19)] + [color_image(percentiles=(0.0, 5.0, 12.0))]
    assert analyze(fingerprint(*cases), PlanRequest()).knobs["intensity_range"] == [0.0, 255.0]


@pytest.mark.parametrize(("high", "top"), [(180.0, 255.0), (255.0, 255.0), (255.5, 256.0), (4095.0, 4095.0)])
def test_the_scale_of_color_reaches_eight_bits_or_the_highest_value(high: float, top: float) -> None:
    analysis = analyze(fingerprint(color_image(high=high), color_image(high=100.0)), PlanRequest())
    assert analysis.knobs["intensity_range"] == [0.0, top]


def test_volumes_and_gray_images_get_instance_norm() -> None:
    for cases in ([CT], [volume()], [image()]):
        assert analyze(fingerprint(*cases), PlanRequest()).norm == "instance"


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([color_image(microns=0.25), color_image(microns=0.25)], 0.25),
        ([color_image(microns=0.25), color_image(microns=0.5)], None),
        ([color_image(microns=0.25), color_image()], None),
        ([color_image(), color_image()], None),
        ([image(microns=0.25), image(microns=0.25)], None),
    ],
)
def test_a_resolution_is_planned_where_all_color_images_state_the_same(
    cases: list[CaseStats], expected: float | None
) -> None:
    analysis = analyze(fingerprint(*cases), PlanRequest())
    assert analysis.knobs.get("microns_per_pixel") == expected
    assert ("microns_per_pixel" in analysis.reasons) == (expected is not None)


def test_images_have_no_spacing_and_their_median_size_counts_in_pixels() -> None:
    analysis = analyze(fingerprint(*(image(shape=shape) for shape in ((10, 90), (30, 50), (20, 70)))), PlanRequest())
    assert analysis.spacing == ()
    assert "spacing" not in analysis.knobs
    assert analysis.shape == (20, 70)
    assert analysis.spatial_dims == 2


def test_a_given_spacing_replaces_the_planned_one_and_changes_the_size() -> None:
    found = fingerprint(volume(shape=(60, 70, 50), spacing=(1.0, 1.0, 3.0)))
    analysis = analyze(found, PlanRequest(settings={"spacing": [2, 0.5, 1.5]}))
    assert analysis.spacing == (2.0, 0.5, 1.5)
    assert analysis.shape == (30, 140, 100)
    assert analysis.knobs["spacing"] == [2.0, 0.5, 1.5]
    assert analyze(found, PlanRequest()).shape == (60, 70, 50)


@pytest.mark.parametrize(
    "spacing", [1.0, "1,1,1", [1, 1], [1, 1, 1, 1], [1, 1, 0], [1, 1, -2.0], [1, 1, "1"], (1, 1, 1)]
)
def test_an_invalid_spacing_is_refused(spacing: Any) -> None:
    with pytest.raises(RequestError, match="spacing=") as error:
        analyze(fingerprint(volume()), PlanRequest(settings={"spacing": spacing}))
    assert repr(spacing) in str(error.value)


@pytest.mark.parametrize(("dims", "case"), [(2, volume(name="thorax")), (3, image(name="gland"))])
def test_other_dimensions_than_those_of_the_images_are_refused(dims: int, case: CaseStats) -> None:
    with pytest.raises(RequestError, match=case.name) as error:
        analyze(fingerprint(case), PlanRequest(dims=dims))
    assert f"--dims {dims}" in str(error.value)
    assert analyze(fingerprint(case), PlanRequest(dims=5 - dims)).spatial_dims == 5 - dims


@pytest.mark.parametrize(
    ("given", "folder", "dataset", "cases", "name"),
    [
        ("my_own_name", "lesion_ct_unet", "set", [volume()], "my_own_name"),
        ("", "lesion_ct_unet", "set", [volume()], "lesion_ct_unet"),
        ("", "out", "set", [volume()], "set_mri_banet_selfreg"),
        ("", "two_words", "set", [volume()], "set_mri_banet_selfreg"),
        ("", "Lesion_CT_UNet", "set", [volume()], "set_mri_banet_selfreg"),
        ("", "", "Task09 Spleen!", [CT], "task09_spleen_ct_banet_selfreg"),
        ("", "", "--", [color_image()], "dataset_rgb_banet_selfreg"),
        ("", "", "Zellen-7", [image()], "zellen_7_grey_banet_selfreg"),
    ],
)
def test_a_bundle_is_named_by_the_user_its_folder_or_its_data(
    given: str, folder: str, dataset: str, cases: list[CaseStats], name: str
) -> None:
    request = PlanRequest(network="BANet", selfreg=True, name=given)
    found = fingerprint(*cases, dataset=dataset)
    assert bundle_name(request, folder, analyze(found, request), found) == name


@PROPERTY
@given(st.text(max_size=30))
def test_whatever_a_data_set_is_called_the_name_is_a_valid_one(dataset: str) -> None:
    found = fingerprint(volume(), dataset=dataset)
    request = PlanRequest()
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*_mri_unet", bundle_name(request, "", analyze(found, request), found))
