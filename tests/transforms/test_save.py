import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Flipd, Invertd, Orientationd, SaveImaged, Spacingd
from PIL import Image

from medseg.errors import CaseError, GeometryError, OutputError, RequestError
from medseg.io import load
from medseg.io.names import mask_name
from medseg.notices import collect
from medseg.transforms.load import LoadCased
from medseg.transforms.save import SaveMaskd

AFFINE = np.diag([-1.0, -2, 3, 1])


@pytest.fixture
def loaded(tmp_path):
    array = np.random.default_rng(0).integers(0, 3, (6, 6, 6)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "scan.nii.gz")
    case = LoadCased("image")({"image": str(tmp_path / "scan.nii.gz")})
    case["pred"] = case["image"].clone()
    return case


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "out"


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_mask_goes_under_the_name_of_the_case(loaded, out):
    loaded["name"] = "sub/case1.nii.gz"
    assert SaveMaskd("pred", out)(loaded) == loaded
    assert written(out) == ["sub/case1.nii.gz"]
    mask = nib.load(out / "sub" / "case1.nii.gz")
    assert np.array_equal(np.asarray(mask.dataobj), loaded["pred"][0].numpy())
    assert np.array_equal(mask.affine, AFFINE)


def test_without_a_name_the_file_name_counts(loaded, out):
    SaveMaskd("pred", str(out))(loaded)
    assert written(out) == ["scan.nii.gz"]


def test_other_programs_find_the_writer_by_its_type(out):
    assert isinstance(SaveMaskd("pred", out), SaveImaged)
    assert not out.exists()


@pytest.mark.parametrize("image", ["tensor", "path"])
def test_the_image_tells_the_file_of_a_plain_tensor(loaded, out, image):
    loaded["pred"] = loaded["pred"].as_tensor()
    if image == "path":
        loaded["image"] = loaded["image"].meta["filename_or_obj"]
    SaveMaskd("pred", out)(loaded)
    assert written(out) == ["scan.nii.gz"]


def test_another_image_key_can_be_named(loaded, out):
    case = {"scan": loaded["image"], "pred": loaded["pred"].as_tensor()}
    SaveMaskd("pred", out, image_key="scan")(case)
    assert written(out) == ["scan.nii.gz"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_pictures_come_back_on_their_pixels(tmp_path, out, suffix):
    pixels = np.zeros((5, 7), np.uint8)
    pixels[1, 4:] = 255
    Image.fromarray(pixels).save(tmp_path / f"tile{suffix}")
    before = Compose(
        [LoadCased("image", spatial_dims=2, channels=1), Flipd("image", 0), Spacingd("image", (0.5, 0.25))]
    )
    case = before({"image": str(tmp_path / f"tile{suffix}")})
    case["pred"] = case["image"].clone()
    case = Invertd("pred", transform=before, orig_keys="image", nearest_interp=False)(case)
    case["pred"] = (case["pred"] > 127).int()
    SaveMaskd("pred", out)(case)
    assert written(out) == ["tile.png"]
    assert np.array_equal(load(out / "tile.png", label=True)[0].numpy().T, pixels > 127)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1)])
def test_single_slices_are_worked_on_in_2d(tmp_path, out, shape):
    array = np.random.default_rng(0).integers(0, 3, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "slice.nii.gz")
    before = Compose([LoadCased("image", spatial_dims=2), Flipd("image", 1)])
    case = before({"image": str(tmp_path / "slice.nii.gz")})
    case["pred"] = case["image"].clone()
    SaveMaskd("pred", out)(Invertd("pred", transform=before, orig_keys="image")(case))
    mask = nib.load(out / "slice.nii.gz")
    assert np.array_equal(np.asarray(mask.dataobj), array)
    assert np.array_equal(mask.affine, AFFINE)


def test_a_mask_that_was_not_inverted_is_refused_even_if_its_shape_fits(loaded, out):
    turned = Orientationd("image", axcodes="RAS", labels=None)(loaded)
    assert turned["image"].shape == loaded["pred"].shape
    with pytest.raises(GeometryError, match="Invertd") as error:
        SaveMaskd("pred", out)({"pred": (turned["image"] > 1).int()})
    assert "scan.nii.gz" in str(error.value)
    assert not out.exists()


def one_hot(mask):
    return torch.cat([mask == 0, mask == 1, mask == 2])


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        (one_hot, CaseError, "has 3 channels"),
        (lambda mask: mask[0], CaseError, "expected (1, 6, 6, 6), channel first"),
        (lambda mask: mask[None], CaseError, "expected (1, 6, 6, 6), channel first"),
        (lambda mask: mask[:, 1:].as_tensor(), GeometryError, "(5, 6, 6)"),
        (lambda mask: mask[:, 1:], GeometryError, "(5, 6, 6)"),
        (lambda mask: mask + 0.5, CaseError, ".5: expected "),
    ],
)
def test_what_is_no_label_map_is_refused_and_leaves_no_file(loaded, out, change, error, part):
    loaded["pred"] = change(loaded["pred"])
    with pytest.raises(error) as caught:
        SaveMaskd("pred", out)(loaded)
    assert part in str(caught.value)
    assert "scan.nii.gz" in str(caught.value)
    assert written(out) == []


def test_names_that_climb_out_are_refused(loaded, out):
    loaded["name"] = "../scan.nii.gz"
    with pytest.raises(OutputError, match="Invalid result name"):
        SaveMaskd("pred", out)(loaded)
    assert not out.exists()


def test_the_folder_of_the_images_is_refused(loaded, tmp_path):
    before = (tmp_path / "scan.nii.gz").read_bytes()
    with pytest.raises(OutputError, match="is the image itself"):
        SaveMaskd("pred", tmp_path)(loaded)
    assert (tmp_path / "scan.nii.gz").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(loaded, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(OutputError, match="taken"):
        SaveMaskd("pred", tmp_path / "taken" / "out")(loaded)


def test_a_mask_without_a_known_image_is_refused(out):
    with pytest.raises(RequestError, match="No image file for the mask 'pred'"):
        SaveMaskd("pred", out)({"pred": MetaTensor(torch.zeros(1, 2, 2, 2))})


def test_missing_keys_are_allowed_only_if_asked_for(out):
    assert SaveMaskd("pred", out, allow_missing_keys=True)({"x": 1}) == {"x": 1}
    with pytest.raises(KeyError, match="pred"):
        SaveMaskd("pred", out)({"x": 1})


def test_two_entries_would_share_one_file(out):
    with pytest.raises(RequestError, match="supports one key"):
        SaveMaskd(["pred", "label"], out)


def test_masks_are_written_after_a_batch_is_taken_apart(loaded, out, tmp_path):
    before = Compose([LoadCased("image"), Orientationd("image", axcodes="RAS", labels=None)])
    case = {"image": str(tmp_path / "scan.nii.gz"), "name": "case.nii.gz"}
    batch = next(iter(DataLoader(Dataset([case], before), batch_size=1)))
    batch["pred"] = batch["image"] * 1
    (item,) = decollate_batch(batch)
    SaveMaskd("pred", out)(Invertd("pred", transform=before, orig_keys="image")(item))
    assert np.array_equal(np.asarray(nib.load(out / "case.nii.gz").dataobj), loaded["pred"][0].numpy())


@pytest.mark.parametrize(
    ("output_format", "name"),
    [("nrrd", "case1.nrrd"), ("mha", "case1.mha"), ("mgz", "case1.mgz"), ("nifti", "case1.nii.gz")],
)
@pytest.mark.parametrize("given", ["", "case1.nii.gz", "as written"])
def test_the_format_of_masks_can_be_chosen(loaded, out, output_format, name, given):
    """The case may carry the name of the mask, of the image, or none."""
    loaded["name"] = name if given == "as written" else given
    SaveMaskd("pred", out, output_format=output_format)(loaded)
    name = name if given else name.replace("case1", "scan")
    assert written(out) == [name]
    assert torch.equal(load(out / name, label=True).as_tensor(), loaded["pred"].as_tensor().int())
    assert np.allclose(load(out / name).affine, AFFINE)


def test_labels_can_have_their_own_files_beside_the_mask(loaded, out):
    loaded["name"] = "sub/case1.nii.gz"
    SaveMaskd("pred", out, separate_labels=True, labels={"0": "background", "1": "liver"})(loaded)
    assert written(out) == [f"sub/case1{part}.nii.gz" for part in ("", "_label_2", "_liver")]
    liver = load(out / "sub" / "case1_liver.nii.gz", label=True)
    assert torch.equal(liver[0].as_tensor() == 1, loaded["pred"][0].as_tensor() == 1)


def test_the_whole_mask_is_written_when_its_parts_are_complete(loaded, out, monkeypatch):
    def fail(*args, **options):
        raise OutputError("the disk is full")

    monkeypatch.setattr("medseg.transforms.save.write_label_files", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        SaveMaskd("pred", out, separate_labels=True)(loaded)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"output_format": "nift"}, "'nift': use one of nifti"),
        ({"output_format": "dicom-seg", "separate_labels": True}, "remove separate_labels"),
        ({"labels": {"liver": "1"}}, "expected integers as keys"),
    ],
)
def test_wrong_options_are_refused_at_once(out, options, part):
    with pytest.raises(RequestError, match=part):
        SaveMaskd("pred", out, **options)


@pytest.mark.parametrize(
    ("output_format", "module", "function"),
    [("dicom-seg", "medseg.io.dicom.seg", "write_seg"), ("rtstruct", "medseg.io.dicom.rtstruct", "write_rtstruct")],
)
def test_dicom_objects_are_left_to_their_writers(loaded, out, tmp_path, monkeypatch, output_format, module, function):
    calls = []
    monkeypatch.setattr(
        f"{module}.{function}", lambda mask, path, like, *, labels: calls.append((mask, path, like, labels))
    )
    SaveMaskd("pred", out, output_format=output_format, labels={"1": "liver"})(loaded)
    ((mask, path, like, labels),) = calls
    assert np.array_equal(mask, loaded["pred"][0].numpy())
    assert path == out / mask_name("scan.nii.gz", output_format)
    assert like == tmp_path / "scan.nii.gz"
    assert labels == {1: "liver", 2: "label 2"}


def test_a_strict_run_writes_no_label_that_nothing_names(loaded, out, assert_warns):
    writer = SaveMaskd("pred", out, separate_labels=True, labels={"1": "liver"})
    with collect(strict=True), pytest.raises(CaseError, match="label-unnamed"):
        writer(loaded)
    assert written(out) == []
    assert_warns(lambda: writer(loaded), "label-unnamed")
