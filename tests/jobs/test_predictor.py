"""`medseg.Predictor`: the labels of `medseg predict`, for files and images in memory, from one or several threads."""

from __future__ import annotations

import importlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from pydicom.data import get_testdata_file

import medseg
from medseg import Predictor
from medseg.bundle.catalog import Bundle
from medseg.errors import CaseError, GeometryError, RequestError
from medseg.types import Case


@pytest.fixture(scope="module")
def image(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume whose axes are oblique, not in RAS order and of unequal voxel size."""
    source = nib.load(sorted((tiny_data / "imagesTr").iterdir())[0])
    c, s = np.cos(0.06), np.sin(0.06)
    axes = np.array([[0, -c, s], [1, 0, 0], [0, s, c]])
    affine = nib.affines.from_matvec(axes * (2.1, 1.9, 2.4), (30.5, -12.25, 7))
    made = nib.Nifti1Image(np.asarray(source.dataobj), affine)
    path = tmp_path_factory.mktemp("image") / "scan.nii.gz"
    made.to_filename(path)
    return path


@pytest.fixture(scope="module")
def mask(trained: Bundle, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The mask file that `medseg predict` writes."""
    out = tmp_path_factory.mktemp("masks")
    manifest = medseg.predict(trained.root, image, out)
    assert manifest.counts["done"] == 1
    found = nib.load(out / "scan.nii.gz")
    assert set(np.unique(found.dataobj)) > {0}
    return found


@pytest.fixture(scope="module")
def predictor(trained: Bundle) -> Any:
    with Predictor(trained.root) as made:
        yield made


def labels_of(mask: Any) -> Any:
    return np.asarray(mask.dataobj)


def test_a_path_gives_the_labels_of_the_command(predictor: Predictor, image: Path, mask: Any) -> None:
    found = predictor(image)
    assert isinstance(found, MetaTensor)
    assert (found.numpy()[0] == labels_of(mask)).all()
    assert found.dtype == torch.uint8
    assert np.allclose(found.affine.numpy(), mask.affine, atol=0)


def test_a_numpy_array_gives_an_array(predictor: Predictor, image: Path, mask: Any) -> None:
    source = nib.load(image)
    for array in (np.asarray(source.dataobj), np.asfortranarray(source.dataobj)[..., None]):
        found = predictor(array, affine=source.affine)
        assert type(found) is np.ndarray
        assert found.dtype == np.uint8
        assert np.array_equal(found, labels_of(mask))


@pytest.mark.parametrize("loaded", [True, False], ids=["in memory", "lazy"])
def test_a_nibabel_image_gives_the_very_image_that_is_written(
    predictor: Predictor, image: Path, mask: Any, loaded: bool
) -> None:
    source = nib.load(image)
    if loaded:
        source = nib.Nifti1Image(np.asarray(source.dataobj), source.affine, source.header)
    source.header["descrip"] = "a name"
    found = predictor(source)
    assert type(found) is nib.Nifti1Image
    assert found.to_bytes() == nib.Nifti1Image(labels_of(mask), mask.affine, mask.header).to_bytes()
    assert np.array_equal(found.affine, mask.affine)


def test_a_scaled_nibabel_image_is_read_as_its_file_is(trained: Bundle, image: Path, tmp_path: Path) -> None:
    source = nib.load(image)
    values = np.asarray(source.dataobj).astype(np.int16)
    scaled = nib.Nifti1Image(values, source.affine)
    scaled.header.set_slope_inter(0.25, -3)
    scaled.header["scl_slope"], scaled.header["scl_inter"] = 0.25, -3
    scaled.to_filename(tmp_path / "scaled.nii")
    lazy = nib.load(tmp_path / "scaled.nii")
    by_file, by_memory = medseg.load(tmp_path / "scaled.nii"), medseg.load(lazy)  # type: ignore[arg-type]
    assert torch.equal(by_file.as_tensor(), by_memory.as_tensor())
    assert torch.equal(by_file.affine, by_memory.affine)


@pytest.mark.parametrize("package", ["SimpleITK", "itk"])
def test_an_itk_image_gives_one_with_the_same_geometry(
    predictor: Predictor, image: Path, mask: Any, package: str
) -> None:
    if package == "itk":
        itk = importlib.import_module("itk")
        source = itk.imread(str(image))
        found = predictor(source)
        array = itk.array_from_image(found)
        assert np.array_equal(itk.array_from_matrix(found.GetDirection()), itk.array_from_matrix(source.GetDirection()))
    else:
        source = sitk.ReadImage(str(image))
        found = predictor(source)
        array = sitk.GetArrayFromImage(found)
        assert found.GetDirection() == source.GetDirection()
    assert tuple(found.GetOrigin()) == tuple(source.GetOrigin())
    assert tuple(found.GetSpacing()) == tuple(source.GetSpacing())
    # ITK keeps the geometry in other numbers, which round otherwise
    assert (labels_of(mask) != array.T).mean() < 1e-3


def test_a_metatensor_gives_a_metatensor(predictor: Predictor, image: Path, mask: Any) -> None:
    source = medseg.load(image)
    source.meta["mine"] = 5
    found = predictor(source)
    assert type(found) is MetaTensor
    assert found.shape == source.shape
    assert torch.equal(found.affine, source.affine)
    assert found.meta["mine"] == 5
    assert np.array_equal(found.numpy()[0], labels_of(mask))


def test_a_metatensor_in_lps_lies_where_its_ras_twin_lies(predictor: Predictor, image: Path, mask: Any) -> None:
    source = medseg.load(image)
    flip = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    lps = MetaTensor(source.as_tensor(), affine=flip @ source.affine, meta={"space": "LPS"})
    found = predictor(lps)
    assert np.array_equal(found.numpy()[0], labels_of(mask))
    assert torch.equal(found.affine, lps.affine)


def test_pydicom_datasets_give_labels_on_the_series_grid(
    predictor: Predictor, trained: Bundle, image: Path, tmp_path: Path
) -> None:
    datasets = dicom_series(image, tmp_path / "series")
    labels, affine = predictor(list(reversed(datasets)))
    medseg.predict(trained.root, tmp_path / "series", tmp_path / "masks")
    (written,) = (tmp_path / "masks").glob("*.nii.gz")
    found = nib.load(written)
    assert np.array_equal(labels, np.asarray(found.dataobj))
    assert np.allclose(affine, found.affine, atol=1e-4)
    assert labels.any()


def dicom_series(image: Path, folder: Path) -> list[Any]:
    """Write a volume as an axial CT series, and return its datasets."""
    template = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    array = np.asarray(nib.load(image).dataobj)
    array = (array - array.min()).astype(np.int16)
    folder.mkdir()
    datasets = []
    for number in range(array.shape[2]):
        dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        dataset.Rows, dataset.Columns = array.shape[1], array.shape[0]
        dataset.PixelData = np.ascontiguousarray(array[:, :, number].T).tobytes()
        dataset.ImagePositionPatient = [-20, 10, 3 * number]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [2, 2]
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        dataset.InstanceNumber = number + 1
        dataset.SOPInstanceUID = f"{template.SOPInstanceUID}.{number + 1}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(folder / f"{number}.dcm")
        datasets.append(dataset)
    return datasets


@pytest.mark.parametrize("kind", ["path", "numpy", "nibabel", "SimpleITK", "metatensor"])
def test_probabilities_lie_in_native_space_and_agree_with_the_labels(
    predictor: Predictor, image: Path, mask: Any, kind: str
) -> None:
    source = nib.load(image)
    if kind == "numpy":
        shares = predictor(np.asarray(source.dataobj), affine=source.affine, probabilities=True)
    elif kind == "nibabel":
        shares = np.asarray(predictor(source, probabilities=True).dataobj)
    elif kind == "SimpleITK":
        given = sitk.ReadImage(str(image))
        shares = sitk.GetArrayFromImage(predictor(given, probabilities=True)).transpose(2, 1, 0, 3)
    else:
        given = image if kind == "path" else medseg.load(image)
        shares = np.moveaxis(predictor(given, probabilities=True).numpy(), 0, -1)
    assert shares.shape == (*mask.shape, 3)
    assert shares.dtype == np.float32
    # Voxels beyond the border of the resampled image are certain background
    assert np.allclose(shares.sum(-1), 1, atol=1e-5)
    assert (shares.argmax(-1) != labels_of(mask)).mean() < 1e-3
    # The next call gives labels again
    assert np.array_equal(predictor(image).numpy()[0], labels_of(mask))


def test_four_threads_get_equal_masks(predictor: Predictor, image: Path, mask: Any) -> None:
    source = nib.load(image)
    array = np.asarray(source.dataobj)
    calls = [
        lambda: predictor(image).numpy()[0],
        lambda: predictor(array, affine=source.affine),
        lambda: np.moveaxis(predictor(source, probabilities=True).get_fdata(), -1, 0).argmax(0),
        lambda: np.asarray(predictor(source).dataobj),
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: calls[number % 4](), range(8)))
    for number, labels in enumerate(found):
        differing = (labels != labels_of(mask)).mean()
        assert differing < 1e-3 if number % 4 == 2 else differing == 0


def test_an_image_that_fails_does_not_spoil_the_next(predictor: Predictor, image: Path, mask: Any) -> None:
    array = np.asarray(nib.load(image).dataobj).astype(np.float32)
    array[0, 0, 0] = np.nan
    with pytest.raises(CaseError, match="the array") as caught:
        predictor(array, affine=np.eye(4))
    assert caught.value.code == "nonfinite"
    assert np.array_equal(predictor(image).numpy()[0], labels_of(mask))


def test_settings_are_the_bundles(trained: Bundle, image: Path, tmp_path: Path) -> None:
    with Predictor(trained.root, overlap=0.0, sw_batch_size=1) as predictor:
        medseg.predict(trained.root, image, tmp_path, settings={"overlap": 0.0})
        assert np.array_equal(predictor(image).numpy()[0], labels_of(nib.load(tmp_path / "scan.nii.gz")))
    assert predictor.labels == {1: "small", 2: "large"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlop": 0.5}, "overlap"),
        ({"overlap": "half"}, "overlap"),
        ({"output_format": "nrrd"}, r"Use medseg\.predict"),
        ({"trust": "0" * 64}, "SHA-256|fingerprint"),
    ],
)
def test_wrong_settings_are_refused(trained: Bundle, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Predictor(trained.root, **settings)


@pytest.mark.parametrize(
    ("image", "options", "kind", "message"),
    [
        (np.zeros((5, 6, 7)), {}, RequestError, "needs its affine"),
        (np.zeros((5, 6, 7)), {"affine": np.diag([0, 1, 1, 1])}, GeometryError, "spacing"),
        (np.zeros((5, 6, 7)), {"affine": np.eye(2)}, GeometryError, r"expected \(4, 4\)"),
        (np.zeros((5, 6, 7, 2)), {"affine": np.eye(4)}, CaseError, "2 values per voxel"),
        (np.zeros((5, 6, 7), complex), {"affine": np.eye(4)}, CaseError, "complex128"),
        (np.zeros((5, 6)), {}, CaseError, "is a 2D image"),
        (torch.zeros(1, 5, 6, 7), {}, RequestError, "MetaTensor"),
        (MetaTensor(torch.zeros(5, 6)), {}, RequestError, r"\(C, x, y\[, z\]\)"),
        (nib.Nifti1Image(np.zeros((5, 6, 7)), None), {}, GeometryError, "sform"),
        (nib.Nifti1Image(np.zeros((5, 6, 7)), np.eye(4)), {"affine": np.eye(4)}, RequestError, "Omit the argument"),
        (sitk.Image(2, 3, 4, sitk.sitkComplexFloat32), {}, CaseError, "complex64"),
        (pydicom.Dataset(), {}, RequestError, "TransferSyntaxUID"),
        ([], {}, RequestError, "Unsupported image type list"),
        ("missing.nii.gz", {}, RequestError, "does not exist"),
        ("missing.nii.gz", {"affine": np.eye(4)}, RequestError, "Omit affine"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_image_is_refused(
    predictor: Predictor, image: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        predictor(image, **options)


def test_a_folder_of_several_images_is_refused(predictor: Predictor, image: Path, tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        shutil.copy(image, tmp_path / name)
    with pytest.raises(RequestError, match="contains 2 images") as caught:
        predictor(tmp_path)
    assert caught.value.data == {"found": 2}


def test_a_closed_predictor_says_so(trained: Bundle, image: Path) -> None:
    predictor = Predictor(trained.root)
    predictor.close()
    with pytest.raises(RequestError, match="is closed"):
        predictor(image)


def test_several_bundles_form_an_ensemble(trained: Bundle, image: Path, tmp_path: Path) -> None:
    with Predictor([trained.root, trained.root]) as predictor:
        medseg.predict([trained.root, trained.root], image, tmp_path)
        assert np.array_equal(predictor(image).numpy()[0], labels_of(nib.load(tmp_path / "scan.nii.gz")))


def test_slides_are_left_to_predict(predictor: Predictor, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.jobs import predictor as module

    class Slides:
        cases = (Case("a.geojson", (str(image),), kind="slide"),)

    monkeypatch.setattr(module, "list_cases", lambda path: Slides)
    with pytest.raises(RequestError, match="whole-slide"):
        predictor(image)


WINDOWS = {"_target_": "monai.inferers.SlidingWindowInferer", "roi_size": "@roi_size", "overlap": "@overlap"}
MONAIS_STEPS = [
    {"_target_": "monai.transforms.Activationsd", "keys": "pred", "softmax": True},
    {
        "_target_": "monai.transforms.Invertd",
        "keys": "pred",
        "transform": "@preprocessing",
        "orig_keys": "image",
        "nearest_interp": False,
        "to_tensor": True,
    },
    {"_target_": "monai.transforms.AsDiscreted", "keys": "pred", "argmax": True},
]


@pytest.mark.parametrize("way", ["native inferer", "MONAI's transforms"])
def test_other_inferers_give_labels_and_probabilities_too(
    trained_copy: Bundle, image: Path, tmp_path: Path, way: str
) -> None:
    file = trained_copy.config_path("inference")
    config = json.loads(file.read_text())
    if way == "native inferer":
        config["inferer"] = {"_target_": "medseg.components.NativeInferer", "inferer": WINDOWS}
    else:
        config["inferer"] = WINDOWS
        config["postprocessing"]["transforms"][:0] = MONAIS_STEPS
    file.write_text(json.dumps(config))
    medseg.predict(trained_copy.root, image, tmp_path / "masks")
    expected = labels_of(nib.load(tmp_path / "masks" / "scan.nii.gz"))
    source = nib.load(image)
    with Predictor(trained_copy.root) as predictor:
        shares = predictor(np.asarray(source.dataobj), affine=source.affine, probabilities=True)
        assert np.array_equal(predictor(image).numpy()[0], expected)
    assert shares.shape == (*expected.shape, 3)
    assert (shares.argmax(-1) != expected).mean() < 1e-3


def test_a_workflow_without_probabilities_says_so(trained_copy: Bundle, image: Path) -> None:
    file = trained_copy.config_path("inference")
    config = json.loads(file.read_text())
    config["inferer"] = WINDOWS
    file.write_text(json.dumps(config))
    with (
        Predictor(trained_copy.root) as predictor,
        pytest.raises(RequestError, match="no probabilities in native space"),
    ):
        predictor(image, probabilities=True)
