import shutil

import numpy as np
import pytest

from medseg.errors import CaseError, RequestError
from medseg.io import load, read_grid
from medseg.io.dicom import open_series

ONE, TWO = "1.2.826.0.1.3680043.8.498.11112222", "1.2.826.0.1.3680043.8.498.33332222"


@pytest.fixture
def study(write_series, slice_of, save_image, tmp_path):
    """Two series and a segmentation in one folder tree."""
    first = write_series(tmp_path / "a", uid=ONE, series_number=3, modality="MR")
    second = write_series(tmp_path / "b" / "c", uid=TWO, series_number=12, seed=5, shape=(3, 4, 5))
    save_image(slice_of(np.zeros((4, 4), "uint8"), modality="SEG"), tmp_path / "seg.dcm")
    return tmp_path, first, second


def test_a_series_tells_what_others_need_of_it(write_series, tmp_path):
    series = write_series(tmp_path, modality="MR", uid=ONE)
    found = open_series(tmp_path)
    assert found.files == tuple(series.files)
    assert (found.uid, found.study_uid, found.frame_of_reference) == (ONE, "1.2.3", "1.2.3.4")
    assert (found.modality, found.number, found.description) == ("MR", "3", "of Secret^Name")
    assert found.grid.shape == (6, 5, 4)
    assert np.allclose(found.grid.affine, series.affine, atol=1e-6)
    assert found.frames == (1, 1, 1, 1)
    assert [header.SOPInstanceUID for header in found.headers()] == list(found.sop_uids)
    assert all("PixelData" not in header for header in found.headers())


@pytest.mark.parametrize(
    ("name", "which"),
    [
        (ONE, 0), ("11112222", 0), ("33332222", 1), ("3", 0), ("12", 1), ("3_11112222", 0), ("12_8.33332222", None),
        ("12_98.33332222", 1), ("12#0", 1),
    ],
)  # fmt: skip
def test_a_series_is_named_by_number_uid_ending_or_both(study, name, which):
    root, *both = study
    if which is None:
        name, which = "12_498.33332222", 1
    assert open_series(root, series=name).uid == both[which].uid
    assert np.array_equal(load(f"{root}::{name}").numpy()[0], both[which].values)


def test_without_a_name_the_series_are_listed(study):
    root, *_ = study
    with pytest.raises(CaseError) as error:
        load(root)
    message = str(error.value)
    for part in ("has 2 series", "3_11112222: MR, 4 x 6 x 5", "12_33332222: CT, 5 x 3 x 4", f"{root.name}::NAME"):
        assert part in message


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("2222", "has 2 series named 2222"),
        ("7", "has no series '7'"),
        ("222", "has no series"),
        ("3#1", "no volume 1"),
    ],
)
def test_names_that_do_not_choose_are_refused(study, name, part):
    with pytest.raises(CaseError, match=part):
        load(f"{study[0]}::{name}")


@pytest.mark.parametrize("name", ["3#", "3#x", "3#-1", "3#1#1"])
def test_names_that_cannot_be_read_are_refused(study, name):
    with pytest.raises(RequestError, match="Invalid series"):
        load(f"{study[0]}::{name}")


def test_objects_that_are_no_images_are_named(study):
    with pytest.raises(CaseError, match=r"has no DICOM image; seg\.dcm is a Segmentation object"):
        load(study[0] / "seg.dcm")


def test_a_single_file_of_a_series_is_one_slice(write_series, tmp_path):
    series = write_series(tmp_path)
    image = load(series.files[2])
    assert image.shape == (1, 6, 5, 1)
    assert np.array_equal(image.numpy()[0, ..., 0], series.values[..., 2])
    assert np.allclose(image.affine[:3, 3], series.affine[:3, 3] + 2 * series.affine[:3, 2], atol=1e-6)


def test_the_files_of_a_series_may_lie_in_several_folders(write_series, tmp_path):
    series = write_series(tmp_path / "all")
    (tmp_path / "more").mkdir()
    for path in series.files[:2]:
        path.rename(tmp_path / "more" / path.name)
    assert np.array_equal(load(tmp_path).numpy()[0], series.values)


def test_copies_of_a_series_in_other_folders_are_series_of_their_own(write_series, tmp_path):
    series = write_series(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(CaseError, match="has 2 series"):
        load(tmp_path)
    assert np.array_equal(load(tmp_path / "b").numpy()[0], series.values)


def test_series_without_uids_are_told_by_their_folder(write_series, tmp_path):
    def strip(ds, k):
        del ds.SeriesInstanceUID, ds.SeriesNumber

    first = write_series(tmp_path / "a", edit=strip)
    write_series(tmp_path / "b", edit=strip, origin=(0, 0, 900.0))
    assert np.array_equal(load(tmp_path / "a").numpy()[0], first.values)
    with pytest.raises(CaseError, match="has 2 series"):
        load(tmp_path)


def test_damage_of_one_series_does_not_matter_to_another(study):
    root, first, second = study
    first.files[0].write_bytes(first.files[0].read_bytes()[:-10])
    assert np.array_equal(load(f"{root}::12").numpy()[0], second.values)
    with pytest.raises(CaseError, match=r"truncated: .* 10 are missing"):
        load(f"{root}::3")


@pytest.mark.parametrize("shared", [True, False])
def test_an_enhanced_file_is_sorted_and_rescaled_frame_by_frame(write_enhanced, tmp_path, shared):
    written = write_enhanced(tmp_path / "e.dcm", shared=shared)
    image = load(tmp_path)
    assert np.array_equal(image.numpy()[0], written.values)
    assert np.allclose(image.affine.numpy(), written.affine, atol=1e-6)
    series = open_series(tmp_path)
    assert series.files == (tmp_path / "e.dcm",)
    assert len(series.sop_uids) == 1
    assert series.frames == (4, 3, 2, 1)


def test_points_in_time_of_an_enhanced_file_are_separated(write_enhanced, tmp_path):
    written = write_enhanced(tmp_path / "e.dcm", times=3)
    with pytest.raises(CaseError, match="has 3 volumes"):
        load(tmp_path)
    assert np.array_equal(load(tmp_path, index=0).numpy()[0], written.values)
    assert open_series(tmp_path, index=1).frames == (8, 7, 6, 5)


def test_enhanced_files_without_places_for_each_frame_are_refused(write_enhanced, tmp_path):
    def strip(ds):
        del ds.PerFrameFunctionalGroupsSequence

    def shorten(ds):
        ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:3]

    write_enhanced(tmp_path / "a.dcm", edit=strip)
    with pytest.raises(CaseError, match="4 frames without geometry"):
        read_grid(tmp_path / "a.dcm")
    write_enhanced(tmp_path / "b.dcm", edit=shorten)
    with pytest.raises(CaseError, match="4 frames, but 3 per-frame functional groups"):
        read_grid(tmp_path / "b.dcm")
