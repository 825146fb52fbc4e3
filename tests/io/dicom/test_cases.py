import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from medseg.errors import CaseError, RequestError
from medseg.io import find_cases, list_cases, load, read_grid, write_mask
from tests.io.conftest import write_dicom_slide

ONE, TWO = "1.2.826.0.1.3680043.8.498.11112222", "1.2.826.0.1.3680043.8.498.33334444"


def names(cases):
    return [case["name"] if isinstance(case, dict) else case.name for case in cases]


@pytest.fixture
def tree(write_series, slice_of, save_image, tmp_path):
    """A patient with one series, one with two and a segmentation, and what lies beside them."""
    root = tmp_path / "root"
    write_series(root / "p1" / "ct")
    write_series(root / "p2", uid=ONE, series_number=3, name="a{}")
    write_series(root / "p2", uid=TWO, series_number=4, name="b{}", seed=1)
    save_image(slice_of(np.zeros((4, 4), "uint8"), modality="SEG"), root / "p2" / "seg")
    (root / "notes.txt").write_text("text")
    (root / "false.dcm").write_bytes(b"text")
    (root / "more.zip").write_bytes(b"PK")
    return root


def test_each_series_of_a_tree_is_one_case_that_loads(tree):
    found = list_cases(tree)
    assert [case.entry() for case in found.cases] == [
        {"image": str(tree / "p1" / "ct"), "name": "p1/ct.nii.gz"},
        {"image": f"{tree / 'p2'}::3_11112222", "name": "p2/3_11112222.nii.gz"},
        {"image": f"{tree / 'p2'}::4_33334444", "name": "p2/4_33334444.nii.gz"},
    ]
    assert [load(case.image).shape for case in found.cases] == [(1, 6, 5, 4)] * 3
    left = {item.path.rsplit("/", 1)[-1]: item.reason for item in found.skipped}
    assert left.keys() == {"seg", "notes.txt", "false.dcm", "more.zip"}
    assert left["seg"] == "a Segmentation object"
    assert "neither the prefix" in left["false.dcm"]
    assert "give it on its own" in left["more.zip"]


def test_a_folder_that_is_one_series_is_named_like_the_folder(tree):
    assert find_cases(tree / "p1") == [{"image": str(tree / "p1" / "ct"), "name": "ct.nii.gz"}]
    assert find_cases(tree / "p1" / "ct") == [{"image": str(tree / "p1" / "ct"), "name": "ct.nii.gz"}]


def test_masks_of_series_with_paths_for_uids_stay_in_the_folder_of_results(write_series, tmp_path):
    for number in "12":
        for file in write_series(tmp_path / "in", uid=f"1.2.30.40.5000{number}").files:
            path = tmp_path / f"{number}_{file.name}"
            path.write_bytes(file.read_bytes().replace(b"1.2.30.40.5000", b"1.2/../../5000"))
    shutil.rmtree(tmp_path / "in")
    cases = find_cases(tmp_path)
    assert len(cases) == 2
    for case in cases:
        assert "/" not in case["name"]
        assert load(case["image"]).shape == (1, 6, 5, 4)


def test_a_pattern_chooses_among_series_by_their_names(tree):
    assert names(find_cases(tree, pattern="3_*")) == ["p2/3_11112222.nii.gz"]
    assert names(find_cases(tree, pattern="p1/*")) == ["p1/ct.nii.gz"]


def test_one_series_can_be_named(tree):
    assert find_cases(f"{tree / 'p2'}::4#0") == [{"image": f"{tree / 'p2'}::4#0", "name": "p2_4_0.nii.gz"}]
    with pytest.raises(RequestError, match="does not exist"):
        find_cases(f"{tree / 'p9'}::4")


def test_a_single_file_is_a_case_whatever_it_is_called(tree):
    paths = sorted((tree / "p1" / "ct").iterdir())
    assert find_cases(paths[0]) == [{"image": str(paths[0]), "name": f"{paths[0].name}.nii.gz"}]


def test_slices_given_one_by_one_are_refused_with_the_way_out(tree):
    with pytest.raises(RequestError, match=r"4 of the files, .* give their folder"):
        find_cases(sorted((tree / "p1" / "ct").iterdir()))


def test_series_beside_other_images_are_cases_too(tree):
    (tree / "p1" / "scan.nii.gz").write_bytes(b"x")
    assert names(find_cases(tree / "p1")) == ["ct.nii.gz", "scan.nii.gz"]
    shutil.move(tree / "p1" / "scan.nii.gz", tree / "p1" / "ct.nii.gz")
    with pytest.raises(RequestError, match="have the same mask name"):
        find_cases(tree / "p1")


def test_an_archive_is_one_case_per_series(tree, tmp_path):
    for folder, expected in (("p1", ["study.nii.gz"]), ("p2", ["study/3_11112222.nii.gz", "study/4_33334444.nii.gz"])):
        path = tmp_path / "study.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in (tree / folder).rglob("*"):
                archive.write(file, file.relative_to(tree))
        found = list_cases(path)
        assert names(found.cases) == expected
        assert [load(case.image).shape for case in found.cases] == [(1, 6, 5, 4)] * len(expected)
    assert [item.reason for item in found.skipped] == ["a Segmentation object"]


def test_a_broken_archive_is_a_wrong_request(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(RequestError, match=r"a\.zip"):
        find_cases(tmp_path / "a.zip")


def test_localizers_are_left_out_and_pictures_are_cases_of_their_own(write_series, slice_of, save_image, tmp_path):
    scout = write_series(
        tmp_path / "s", edit=lambda ds, k: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])
    )
    for name in ("front", "side.dcm"):
        ds = slice_of(np.zeros((4, 4), "uint16"), modality="CR", series_uid=ONE)
        save_image(ds, tmp_path / "x" / name)
    found = list_cases(tmp_path)
    assert names(found.cases) == ["x/front.nii.gz", "x/side.nii.gz"]
    assert {item.path for item in found.skipped} == {str(path) for path in scout.files}
    assert {"localizer" in item.reason for item in found.skipped} == {True}
    assert load(scout.folder).shape == (1, 6, 5, 4)


def test_a_damaged_series_stays_a_case_so_that_it_is_reported(tree):
    for path in (tree / "p1" / "ct").iterdir():
        path.write_bytes(path.read_bytes()[:-4])
    assert names(find_cases(tree / "p1")) == ["ct.nii.gz"]


def test_masks_of_series_lie_on_them_and_can_be_replaced(tree, tmp_path):
    for case in find_cases(tree):
        target = tmp_path / "out" / case["name"]
        grid = read_grid(case["image"])
        mask = np.arange(120).reshape(grid.shape) % 3
        for _ in range(2):
            write_mask(mask, target, like=case["image"])
        written = load(target, label=True)
        assert np.array_equal(written.numpy()[0], mask)
        assert np.allclose(written.affine.numpy(), grid.affine, atol=1e-4)


@pytest.mark.parametrize(("content", "heavy"), [(b"text", False), (b"\0" * 128 + b"DICM", True)])
def test_only_dicom_content_brings_heavy_packages(tmp_path, content, heavy):
    (tmp_path / "a.nii.gz").write_bytes(b"x")
    (tmp_path / "b").write_bytes(content)
    code = (
        "import sys; from medseg.io import find_cases\n"
        f"find_cases({str(tmp_path)!r})\n"
        "print(sorted({'pydicom', 'numpy', 'torch', 'monai'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ("pydicom" in done.stdout) is heavy
    assert "torch" not in done.stdout
    assert heavy or done.stdout.strip() == "[]"


def write_slides(folder, *series):
    """Write slides of two levels, each with a label, an overview and a thumbnail."""
    pixels = np.zeros((80, 100, 3), np.uint8)
    for number, uid in enumerate(series):
        write_dicom_slide(folder / f"{number}_b.dcm", pixels, series=uid)
        write_dicom_slide(folder / f"{number}_c", pixels[::2, ::2], series=uid, number=1, mpp=1.0)
        for other, flavor in enumerate(("LABEL", "OVERVIEW", "THUMBNAIL"), start=2):
            write_dicom_slide(folder / f"{number}_a{flavor}.dcm", pixels, series=uid, number=other, flavor=flavor)
    return folder


def test_the_files_of_a_slide_in_a_folder_are_one_case_without_its_label_and_overview(tree, tmp_path):
    write_slides(tree / "s1", ONE)
    write_slides(tree / "s2", ONE, TWO)
    found = list_cases(tree)
    slides = [case.entry() for case in found.cases if case.name.startswith("s")]
    assert slides == [
        {"image": str(tree / "s1" / "0_b.dcm"), "name": "s1.geojson"},
        {"image": str(tree / "s2" / "0_b.dcm"), "name": "s2/0_b.geojson"},
        {"image": str(tree / "s2" / "1_b.dcm"), "name": "s2/1_b.geojson"},
    ]
    assert len(found.cases) == 6
    reasons = {item.path: item.reason for item in found.skipped}
    assert reasons[str(tree / "s1" / "0_aLABEL.dcm")] == "the label image of a slide"
    assert reasons[str(tree / "s1" / "0_aOVERVIEW.dcm")] == "the overview image of a slide"
    assert reasons[str(tree / "s1" / "0_aTHUMBNAIL.dcm")] == "the thumbnail of a slide"
    assert find_cases(tree / "s1") == [{"image": str(tree / "s1" / "0_b.dcm"), "name": "s1.geojson"}]


def test_a_single_file_of_a_slide_is_a_case_and_two_levels_in_a_list_are_refused(tmp_path):
    folder = write_slides(tmp_path / "s", ONE, TWO)
    for name in ("0_b.dcm", "0_c"):
        assert find_cases(folder / name) == [{"image": str(folder / name), "name": f"{name[:3]}.geojson"}]
    assert names(find_cases([folder / "0_b.dcm", folder / "1_c"])) == ["0_b.geojson", "1_c.geojson"]
    with pytest.raises(RequestError, match=r"2 of the files, .* are levels of one slide"):
        find_cases([folder / "0_b.dcm", folder / "0_c"])
    with pytest.raises(RequestError, match=r"0_aLABEL\.dcm is the label image of a slide"):
        find_cases(folder / "0_aLABEL.dcm")


def test_a_slide_in_an_archive_says_where_it_is_read_from(tmp_path):
    folder = write_slides(tmp_path / "s", ONE)
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    with pytest.raises(RequestError, match="Nothing to predict"):
        find_cases(tmp_path / "s.zip")


def test_a_slide_is_no_volume_and_says_what_takes_it(tmp_path):
    folder = write_slides(tmp_path / "s", ONE)
    for path in (folder, folder / "0_b.dcm"):
        with pytest.raises(CaseError, match="a whole-slide image, which needs a bundle for 2D color images"):
            load(path)
