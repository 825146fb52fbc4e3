from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, LoadImaged
from PIL import Image

from medseg.errors import CaseError, GeometryError, RequestError
from medseg.io import find_dataset
from medseg.transforms.labels import MapLabelsd
from medseg.transforms.load import LoadCased

DATA = Path(__file__).parents[3] / "shared" / "data"


def volume(path, array, affine=None):
    nib.save(nib.Nifti1Image(array, np.diag([1, 2, 3, 1]) if affine is None else affine), path)
    return str(path)


@pytest.fixture
def case(tmp_path):
    array = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    return {
        "image": volume(tmp_path / "image.nii.gz", array.astype(np.float32)),
        "label": volume(tmp_path / "label.nii.gz", array.astype(np.float64)),
        "name": "image.nii.gz",
    }


def test_images_are_float_and_labels_are_whole(case):
    loaded = LoadCased(["image", "label"], spatial_dims=3, channels=1)(case)
    assert isinstance(loaded["image"], MetaTensor)
    assert loaded["image"].dtype == torch.float32
    assert loaded["label"].dtype == torch.int32
    assert torch.equal(loaded["image"].as_tensor(), loaded["label"].as_tensor().float())
    assert loaded["label"].meta["filename_or_obj"] == case["label"]
    assert loaded["name"] == "image.nii.gz"
    assert isinstance(case["image"], str)


def test_images_can_keep_the_type_of_their_file(tmp_path):
    array = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    paths = {key: volume(tmp_path / f"{key}.nii.gz", array) for key in ("image", "label")}
    loaded = LoadCased(["image", "label"], dtype="stored")(paths)
    assert loaded["image"].dtype == torch.int16
    assert loaded["label"].dtype == torch.int32
    assert np.array_equal(loaded["image"][0].numpy(), array)


def test_other_programs_find_the_loader_by_its_type():
    assert isinstance(LoadCased("image"), LoadImaged)


def test_label_keys_can_have_any_name(case):
    loaded = LoadCased(["image", "label"], label_keys="image")(case)
    assert loaded["image"].dtype == torch.int32
    assert loaded["label"].dtype == torch.float32


def test_missing_keys_are_allowed_only_if_asked_for(case):
    del case["label"]
    assert "label" not in LoadCased(["image", "label"], allow_missing_keys=True)(case)
    with pytest.raises(KeyError, match="label"):
        LoadCased(["image", "label"])(case)


@pytest.mark.parametrize(
    ("shape", "affine", "part"),
    [
        ((4, 5, 7), None, "(4, 5, 6) and (4, 5, 7)"),
        ((4, 5, 6), np.diag([-1, 2, 3, 1]), "corners are up to"),
        ((4, 5, 6), np.diag([1, 2, 3.1, 1]), "corners are up to 0.5 mm apart"),
    ],
)
def test_image_and_label_must_lie_on_one_grid(case, tmp_path, shape, affine, part):
    volume(tmp_path / "label.nii.gz", np.zeros(shape, np.uint8), affine)
    with pytest.raises(GeometryError) as error:
        LoadCased(["image", "label"])(case)
    assert case["image"] in str(error.value)
    assert case["label"] in str(error.value)
    assert part in str(error.value)


def test_what_the_model_cannot_take_is_refused(case):
    with pytest.raises(CaseError, match=r"image\.nii\.gz is a volume"):
        LoadCased("image", spatial_dims=2)(case)
    with pytest.raises(CaseError, match="expected 3"):
        LoadCased("image", channels=3)(case)


def test_foreign_readers_are_refused(case):
    with pytest.raises(RequestError, match="str"):
        LoadCased("image")(case, reader="ITKReader")


def test_worker_processes_and_batches_work(case):
    dataset = Dataset([case] * 2, Compose([LoadCased(["image", "label"])]))
    batch = next(iter(DataLoader(dataset, batch_size=2, num_workers=1)))
    assert batch["image"].shape == batch["label"].shape == (2, 1, 4, 5, 6)
    assert np.array_equal(batch["image"].affine[1], np.diag([1, 2, 3, 1]))


def test_grey_and_color_pictures_share_a_batch(tmp_path):
    Image.new("L", (4, 3), 7).save(tmp_path / "a.png")
    Image.new("RGB", (4, 3), (7, 7, 7)).save(tmp_path / "b.png")
    load = LoadCased("image", spatial_dims=2, channels=3)
    images = [load({"image": str(tmp_path / name)})["image"] for name in ("a.png", "b.png")]
    assert torch.equal(*(image.as_tensor() for image in images))


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data sets in {DATA}")
@pytest.mark.parametrize(
    ("name", "channels", "mapping"),
    [
        ("msd_hippocampus", 1, {0: 0, 1: 1, 2: 2}),
        ("glas", 3, {0: 0, "other": 1}),
        ("dsb2018", 3, {0: 0, "other": 1}),
        ("monuseg", 3, {0: 0, 255: 1}),
        ("isbi2012_em", 1, {255: 0, 0: 1}),
        ("chase_db1", 3, {0: 0, 255: 1}),
    ],
)
def test_real_cases_load_with_their_labels(name, channels, mapping):
    cases = find_dataset(DATA / name, "val")
    chain = Compose([LoadCased(["image", "label"], channels=channels), MapLabelsd("label", mapping)])
    for case in cases[:: max(1, len(cases) // 4)]:
        loaded = chain(case)
        assert loaded["image"].shape[0] == channels
        assert loaded["label"].shape == (1, *loaded["image"].shape[1:])
        assert set(loaded["label"].unique().tolist()) == set(mapping.values())
