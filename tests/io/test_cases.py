import json
import os

import pytest

from medseg.errors import RequestError
from medseg.io import find_cases, list_cases


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return [folder / name for name in names]


def names(cases):
    return [case["name"] if isinstance(case, dict) else case.name for case in cases]


def test_one_file_is_one_case_with_an_absolute_path(tmp_path, monkeypatch):
    touch(tmp_path, "a.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert find_cases("a.nii.gz") == [{"image": str(tmp_path / "a.nii.gz"), "name": "a.nii.gz"}]


def test_a_folder_is_searched_deeply_and_sorted(tmp_path):
    touch(tmp_path, "b.nii", "sub/deep/c.JPG", "a.nii.gz", ".hidden.nii", ".cache/d.nii", "__MACOSX/e.nii", "notes.txt")
    found = list_cases(tmp_path)
    assert names(found.cases) == ["a.nii.gz", "b.nii", "sub/deep/c.png"]
    assert [case.entry() for case in found.cases] == find_cases(str(tmp_path))
    left = {os.path.relpath(item.path, tmp_path): item.reason for item in found.skipped}
    assert left == {
        ".cache": "hidden folder",
        "__MACOSX": "hidden folder",
        ".hidden.nii": "hidden file",
        "notes.txt": "not a supported image format",
    }


def test_headers_of_two_file_images_are_left_out_with_the_way_out(tmp_path):
    touch(tmp_path, "a.nii", "b.hdr", "b.img")
    assert [".nii.gz" in item.reason for item in list_cases(tmp_path).skipped] == [True, True]


def test_pipes_are_left_out(tmp_path):
    touch(tmp_path, "a.nii")
    os.mkfifo(tmp_path / "b.nii")
    os.mkfifo(tmp_path / "c")
    found = list_cases(tmp_path)
    assert names(found.cases) == ["a.nii"]
    assert ["a pipe" in item.reason for item in found.skipped] == [True, True]
    with pytest.raises(RequestError, match="a pipe or device"):
        list_cases(tmp_path / "b.nii")


def test_links_to_folders_are_reported_and_not_followed(tmp_path):
    touch(tmp_path, "in/a.nii", "elsewhere/b.nii")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = list_cases(tmp_path / "in")
    assert names(found.cases) == ["a.nii"]
    assert [(item.path, item.reason) for item in found.skipped] == [(str(tmp_path / "in/loop"), "link to a folder")]


def test_names_in_a_list_are_relative_to_the_shared_folder(tmp_path):
    paths = touch(tmp_path, "one/x.nii.gz", "two/x.nii.gz")
    assert names(find_cases(paths)) == ["one/x.nii.gz", "two/x.nii.gz"]
    assert names(find_cases(paths[:1])) == ["x.nii.gz"]


@pytest.mark.parametrize(
    ("pattern", "expected"), [("*_t1.nii", ["a_t1.nii", "sub/b_t1.nii"]), ("sub/*", ["sub/b_t1.nii", "sub/b_t2.nii"])]
)
def test_a_pattern_chooses_by_name_or_by_path(tmp_path, pattern, expected):
    touch(tmp_path, "a_t1.nii", "a_t2.nii", "sub/b_t1.nii", "sub/b_t2.nii")
    found = list_cases(tmp_path, pattern=pattern)
    assert names(found.cases) == expected
    assert {item.reason for item in found.skipped} == {f"does not match {pattern!r}"}


def test_two_images_with_one_mask_name_are_refused_by_name(tmp_path):
    png, jpg = touch(tmp_path, "a.png", "a.jpg")
    with pytest.raises(RequestError) as error:
        find_cases(tmp_path)
    assert str(png) in str(error.value)
    assert str(jpg) in str(error.value)


def test_a_file_given_twice_is_refused(tmp_path):
    (path,) = touch(tmp_path, "a.png")
    with pytest.raises(RequestError, match=r"a\.png"):
        find_cases([path, path])


def test_an_empty_result_says_what_was_looked_for_and_seen(tmp_path):
    touch(tmp_path, "a.txt", "b.txt", "c.dcm")
    with pytest.raises(RequestError) as error:
        find_cases(tmp_path, pattern="*.nii")
    message = str(error.value)
    for part in (str(tmp_path), ".nii.gz", "'*.nii'", "2 x .txt", "1 x .dcm"):
        assert part in message


def test_an_empty_folder_and_an_empty_list_are_refused(tmp_path):
    with pytest.raises(RequestError, match="no files at all"):
        find_cases(tmp_path)
    with pytest.raises(RequestError, match="list of files"):
        find_cases([])


@pytest.mark.parametrize("name", ["missing.nii", "missing_folder", "missing.json"])
def test_what_does_not_exist_is_named(tmp_path, name):
    with pytest.raises(RequestError) as error:
        find_cases(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_file_that_is_no_image_and_a_folder_in_a_list_are_refused(tmp_path):
    (path,) = touch(tmp_path, "a.txt")
    with pytest.raises(RequestError, match=r"a\.txt"):
        find_cases(path)
    with pytest.raises(RequestError, match="is a folder"):
        find_cases([tmp_path])


def write_listing(folder, **content):
    path = folder / "dataset.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("entry", ["./imagesTs/b.nii.gz", {"image": "imagesTs/b.nii.gz"}])
def test_a_decathlon_folder_predicts_its_test_list(tmp_path, entry):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz")
    listing = write_listing(tmp_path, training=[], validation=[{"image": "imagesTr/a.nii.gz"}], test=[entry])
    expected = [{"image": str(tmp_path / "imagesTs/b.nii.gz"), "name": "b.nii.gz"}]
    assert find_cases(listing) == expected
    found = list_cases(tmp_path)
    assert [case.entry() for case in found.cases] == expected
    assert str(tmp_path / "labelsTr/a.nii.gz") in [item.path for item in found.skipped]


def test_without_a_test_list_the_validation_list_counts(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz")
    listing = write_listing(
        tmp_path, test=[], validation=[{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]
    )
    assert names(find_cases(listing)) == ["a.nii.gz"]


def test_a_listing_with_nothing_to_predict_says_so(tmp_path):
    listing = write_listing(tmp_path, training=["x"])
    with pytest.raises(RequestError, match="'test'") as error:
        find_cases(listing)
    assert str(listing) in str(error.value)


def test_a_folder_with_a_split_predicts_its_validation_cases(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png", "labels/a.png", "labels/b.png")
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "val": ["b"]}))
    assert find_cases(tmp_path) == [{"image": str(tmp_path / "images/b.png"), "name": "b.png"}]
    assert names(find_cases(tmp_path / "images")) == ["a.png", "b.png"]


@pytest.mark.parametrize("entry", ["../outside.nii", "/outside.nii", "missing.nii", "", 3, {"label": "a"}])
def test_listed_files_outside_or_missing_are_refused(tmp_path, entry):
    listing = write_listing(tmp_path, test=[entry])
    with pytest.raises(RequestError) as error:
        find_cases(listing)
    assert str(listing) in str(error.value)
    assert str(entry) in str(error.value)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(RequestError, match="Permission denied"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("output_format", "expected"),
    [
        ("", ["a.nii.gz", "b.mha", "c.png", "sub/d.nrrd"]),
        ("nrrd", ["a.nrrd", "b.nrrd", "c.nrrd", "sub/d.nrrd"]),
        ("dicom-seg", ["a.seg.dcm", "b.seg.dcm", "c.seg.dcm", "sub/d.seg.dcm"]),
    ],
)
def test_masks_are_named_by_the_format_that_is_asked_for(tmp_path, output_format, expected):
    touch(tmp_path, "a.nii.gz", "b.mhd", "c.jpg", "sub/d.nhdr")
    assert names(find_cases(tmp_path, output_format=output_format)) == expected


def test_a_format_that_makes_two_masks_share_a_name_is_refused(tmp_path):
    touch(tmp_path, "a.nii.gz", "a.nrrd")
    assert names(find_cases(tmp_path)) == ["a.nii.gz", "a.nrrd"]
    with pytest.raises(RequestError, match=r"have the same mask name a\.mha"):
        find_cases(tmp_path, output_format="mha")


def test_unknown_formats_are_refused(tmp_path):
    touch(tmp_path, "a.nii.gz")
    with pytest.raises(RequestError, match="'nift': use one of nifti"):
        find_cases(tmp_path, output_format="nift")
