import json
from pathlib import Path

import pytest

from medseg.errors import RequestError
from medseg.io import find_dataset

DATA = Path(__file__).parents[3] / "shared" / "data"


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def pair(stem):
    return {"image": f"./imagesTr/{stem}.nii.gz", "label": f"./labelsTr/{stem}.nii.gz"}


@pytest.fixture
def decathlon(tmp_path):
    for stem in "abc":
        touch(tmp_path, f"imagesTr/{stem}.nii.gz", f"labelsTr/{stem}.nii.gz")
    write_json(tmp_path / "dataset.json", {"training": [pair("b"), pair("a")], "validation": [pair("c")]})
    return tmp_path


@pytest.fixture
def pictures(tmp_path):
    for stem in ("a", "sub/b", "c.1"):
        touch(tmp_path, f"images/{stem}.jpg", f"labels/{stem}.png")
    touch(tmp_path, "images/.a.swp", "images/Thumbs.db")
    write_json(tmp_path / "split.json", {"train": ["sub/b", "c.1"], "val": ["a"], "native": ["zz"]})
    return tmp_path


@pytest.mark.parametrize("where", ["", "dataset.json"])
def test_decathlon_lists_are_taken_in_their_order(decathlon, where):
    train = find_dataset(decathlon / where, "train")
    assert [case["name"] for case in train] == ["b.nii.gz", "a.nii.gz"]
    assert train[0] == {
        "image": str(decathlon / "imagesTr/b.nii.gz"),
        "label": str(decathlon / "labelsTr/b.nii.gz"),
        "name": "b.nii.gz",
    }
    assert [case["name"] for case in find_dataset(decathlon / where, "val")] == ["c.nii.gz"]


def test_a_decathlon_set_without_validation_takes_split_json(decathlon):
    write_json(decathlon / "dataset.json", {"training": [pair("a"), pair("b")]})
    with pytest.raises(RequestError) as error:
        find_dataset(decathlon, "val")
    for part in (str(decathlon / "split.json"), '"train"', '"a"'):
        assert part in str(error.value)
    write_json(decathlon / "split.json", {"train": ["b"], "val": ["a"]})
    assert [case["name"] for case in find_dataset(decathlon, "val")] == ["a.nii.gz"]


def test_a_named_split_file_goes_before_the_lists(decathlon):
    write_json(decathlon / "fold1.json", {"train": ["a", "c"], "val": ["b"]})
    found = find_dataset(decathlon, "train", split_file="fold1.json")
    assert [case["name"] for case in found] == ["a.nii.gz", "c.nii.gz"]


def test_pictures_pair_by_stem_whatever_the_suffix(pictures):
    train = find_dataset(pictures, "train")
    assert [case["name"] for case in train] == ["sub/b.png", "c.1.png"]
    assert train[1]["image"] == str(pictures / "images/c.1.jpg")
    assert train[1]["label"] == str(pictures / "labels/c.1.png")


def test_labels_of_another_observer_can_be_chosen(pictures):
    touch(pictures, "labels_2nd/a.png")
    (case,) = find_dataset(pictures, "val", labels="labels_2nd")
    assert case["label"] == str(pictures / "labels_2nd/a.png")


def test_nnunet_folders_are_read_with_one_channel(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    write_json(tmp_path / "dataset.json", {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"})
    write_json(tmp_path / "split.json", {"train": ["a"], "val": ["b"]})
    (case,) = find_dataset(tmp_path, "train")
    assert case["image"] == str(tmp_path / "imagesTr/a_0000.nii.gz")
    assert case["label"] == str(tmp_path / "labelsTr/a.nii.gz")
    touch(tmp_path, "imagesTr/a_0001.nii.gz")
    with pytest.raises(RequestError, match="several files") as error:
        find_dataset(tmp_path, "train")
    assert str(tmp_path / "imagesTr") in str(error.value)


def test_nnunet_folds_are_the_split_where_there_is_no_other(tmp_path):
    for stem in "abc":
        touch(tmp_path, f"imagesTr/{stem}_0000.nii.gz", f"labelsTr/{stem}.nii.gz")
    folds = [{"train": ["b", "c"], "val": ["a"]}, {"train": ["a", "b"], "val": ["c"]}]
    write_json(tmp_path / "splits_final.json", folds)
    assert [case["name"] for case in find_dataset(tmp_path, "val")] == ["a_0000.nii.gz"]
    write_json(tmp_path / "split.json", {"train": ["a"], "val": ["b"]})
    assert [case["name"] for case in find_dataset(tmp_path, "val")] == ["b_0000.nii.gz"]


@pytest.mark.parametrize("content", [{"train": []}, [], [3], [{"train": ["b"]}]])
def test_what_is_no_list_of_folds_is_refused(content, tmp_path):
    touch(tmp_path, "imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz")
    write_json(tmp_path / "splits_final.json", content)
    with pytest.raises(RequestError, match=r"splits_final\.json"):
        find_dataset(tmp_path, "train")


def test_a_missing_label_names_the_image(pictures):
    (pictures / "labels/a.png").unlink()
    with pytest.raises(RequestError) as error:
        find_dataset(pictures, "val")
    assert str(pictures / "images/a.jpg") in str(error.value)
    assert find_dataset(pictures, "train")


def test_a_missing_split_says_what_is_needed(pictures):
    (pictures / "split.json").unlink()
    with pytest.raises(RequestError) as error:
        find_dataset(pictures, "train")
    for part in (str(pictures / "split.json"), '"train"', '"val"', '"a"'):
        assert part in str(error.value)


def test_only_train_and_val_exist(pictures):
    with pytest.raises(RequestError, match="'test'"):
        find_dataset(pictures, "test")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"train": ["a"], "val": ["sub/bb"]}, "Did you mean 'sub/b'"),
        ({"train": ["a"], "val": ["../c"]}, "'../c'"),
        ({"train": ["a"], "val": ["a"]}, "lists a more than once"),
        ({"train": ["a", "a"], "val": ["c.1"]}, "lists a more than once"),
        ({"train": ["a"], "val": []}, "is empty"),
        ({"train": ["a"]}, "'val' is None"),
        ({"train": ["a"], "val": "c.1"}, "'val' is 'c.1'"),
        ({"train": ["a"], "val": [1]}, "'val' is [1]"),
        (["a"], "has a list at its top level"),
    ],
)
def test_wrong_splits_are_refused(pictures, content, part):
    write_json(pictures / "split.json", content)
    with pytest.raises(RequestError) as error:
        find_dataset(pictures, "val")
    assert part in str(error.value)
    assert str(pictures) in str(error.value)


def test_broken_json_is_named(pictures):
    (pictures / "split.json").write_text("{")
    with pytest.raises(RequestError, match=r"split\.json cannot be read as JSON"):
        find_dataset(pictures, "val")


def test_one_stem_twice_is_refused(pictures):
    touch(pictures, "labels/a.tif")
    with pytest.raises(RequestError, match="same stem") as error:
        find_dataset(pictures, "val")
    assert "a.png" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"image": "../x.nii", "label": "labelsTr/a.nii.gz"}, "'../x.nii'"),
        ({"image": "/x.nii", "label": "labelsTr/a.nii.gz"}, "'/x.nii'"),
        ({"image": "imagesTr/a.nii.gz", "label": "labelsTr/../../x.nii"}, "is outside"),
        ({"image": "imagesTr/missing.nii.gz", "label": "labelsTr/a.nii.gz"}, "missing.nii.gz"),
        ({"image": "a" * 5000, "label": "labelsTr/a.nii.gz"}, "does not exist"),
        ({"image": "imagesTr/a.nii.gz", "label": "labelsTr/missing.nii.gz"}, "labelsTr/missing.nii.gz"),
        ({"image": "imagesTr/a.nii.gz"}, "has no 'label'"),
        ({"image": ["imagesTr/a.nii.gz"], "label": "labelsTr/a.nii.gz"}, "expected one path"),
        ("imagesTr/a.nii.gz", "has no 'label'"),
    ],
)
def test_wrong_entries_of_a_listing_are_refused(decathlon, entry, part):
    write_json(decathlon / "dataset.json", {"training": [entry], "validation": [pair("c")]})
    with pytest.raises(RequestError) as error:
        find_dataset(decathlon, "train")
    assert str(decathlon / "dataset.json") in str(error.value)
    assert part in str(error.value)


def test_a_case_in_training_and_validation_is_refused(decathlon):
    write_json(decathlon / "dataset.json", {"training": [pair("a")], "validation": [pair("a")]})
    with pytest.raises(RequestError, match="lists a more than once"):
        find_dataset(decathlon, "train")


@pytest.mark.parametrize("content", [{"training": []}, {"training": {}}])
def test_an_empty_or_misshapen_training_list_is_refused(decathlon, content):
    write_json(decathlon / "dataset.json", content)
    with pytest.raises(RequestError, match="'training'"):
        find_dataset(decathlon, "train")


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    with pytest.raises(RequestError, match="No data set at"):
        find_dataset(tmp_path / "missing", "train")
    with pytest.raises(RequestError, match=r"expected a dataset\.json"):
        find_dataset(tmp_path, "train")
    touch(tmp_path, "images/readme.txt")
    with pytest.raises(RequestError, match="no folder labels/"):
        find_dataset(tmp_path, "train")
    touch(tmp_path, "labels/a.png")
    with pytest.raises(RequestError, match="has no images"):
        find_dataset(tmp_path, "train")


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data sets in {DATA}")
@pytest.mark.parametrize(
    ("name", "train", "val"),
    [("msd_hippocampus", 160, 40), ("glas", 61, 24), ("dsb2018", 189, 47), ("chase_db1", 16, 4)],
)
def test_real_sets_have_the_cases_that_they_claim(name, train, val):
    assert len(find_dataset(DATA / name, "train")) == train
    assert len(find_dataset(DATA / name, "val")) == val


def test_test_cases_are_listed_where_the_set_has_labels_for_them(tmp_path: Path) -> None:
    for name in ("imagesTr/a", "labelsTr/a", "imagesTs/b", "labelsTs/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    listing = {
        "training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}],
        "test": [{"image": "imagesTs/b.nii.gz", "label": "labelsTs/b.nii.gz"}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    (case,) = find_dataset(tmp_path, "test")
    assert Path(case["label"]) == tmp_path / "labelsTs" / "b.nii.gz"
    (tmp_path / "dataset.json").write_text(json.dumps({**listing, "test": ["imagesTs/b.nii.gz"]}))
    with pytest.raises(RequestError, match="has no 'label'"):
        find_dataset(tmp_path, "test")
