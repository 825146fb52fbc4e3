"""Ids are no paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg.errors import RequestError
from medseg.label.request_checks import check_path, check_query, check_tag, image_inside


@pytest.mark.parametrize(
    "value",
    [
        "../secret",
        "a/b",
        "/etc/passwd",
        "..\\secret",
        "~/x",
        "C:\\x",
        "C:/x",
        "a\0b",
        "sub/..",
        "\\\\host\\share",
        "..",
    ],
)
def test_values_that_lead_out_are_refused(value: str) -> None:
    with pytest.raises(RequestError, match="'image'"):
        check_query([("output", "all"), ("image", value)])


@pytest.mark.parametrize("value", ["case_1", "case.1", "1.2.840.10008", "a..b", "MUELLER HANS", "3: T1 MPRAGE", ""])
def test_ids_pass(value: str) -> None:
    check_query([("image", value)])


def test_other_values_may_hold_slashes_but_lead_nowhere() -> None:
    check_query([("StudyDate", "2020/01/01"), ("PatientID", "1:234"), ("includefield", "all")])
    with pytest.raises(RequestError, match="'logfile'"):
        check_query([("logfile", "/etc/passwd")])


@pytest.mark.parametrize("value", ["true", "1", "on", "yes", "t", "TRUE"])
def test_no_archive_is_unpacked(value: str) -> None:
    check_query([("uncompress", "false"), ("uncompress", "0")])
    with pytest.raises(RequestError, match="not unpacked"):
        check_query([("uncompress", value)])


@pytest.mark.parametrize(
    "path", ["/proxy/dicom/../system", "/proxy/dicom/%2e%2e/system", "/proxy/dicom/%252e%252e/a", "/a/..\\b", "/.."]
)
def test_addresses_that_climb_are_refused(path: str) -> None:
    check_path("/proxy/dicom/wado/studies/1.2..3/series/metadata")
    with pytest.raises(RequestError, match=r"'\.\.'"):
        check_path(path)


@pytest.mark.parametrize("tag", ["../x", "a/b", "", "a b", None, 3, "-x", "x" * 65])
def test_tags_are_words(tag: object) -> None:
    assert check_tag("final") == "final"
    with pytest.raises(RequestError, match="tag"):
        check_tag(tag)


def test_only_files_in_the_allowed_folders_are_read(tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    (studies / "a.nii").touch()
    (tmp_path / "secret.nii").touch()
    (studies / "link.nii").symlink_to(tmp_path / "secret.nii")
    assert image_inside(studies / "a.nii", [studies]) == studies / "a.nii"
    for path in (tmp_path / "secret.nii", studies / ".." / "secret.nii", studies / "link.nii"):
        with pytest.raises(RequestError, match="not among the studies"):
            image_inside(path, [studies])
