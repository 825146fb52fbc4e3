"""From a file through the preprocessing, its inverse and the writer: the mask lies on the input, says everyone."""

from dataclasses import dataclass, field
from gzip import decompress
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Compose, Invertd, Orientationd, Spacingd

from medseg.transforms.load import LoadCased
from medseg.transforms.save import SaveMaskd

# (first byte, length) of dim, pixdim, xyzt_units, and qform_code to the end of srow_z.
PLACE = {348: [(40, 16), (76, 32), (123, 1), (252, 76)], 540: [(16, 64), (104, 64), (500, 4), (344, 8), (352, 144)]}
AWKWARD = Path(__file__).parents[3] / "shared" / "data" / "awkward" / "nifti"
SHAPE = (22, 18, 15)
VOXEL = (13, 6, 8)


def rotation(axis, degrees):
    """Rotate around `axis` (Rodrigues)."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def affine(directions, spacing=(1.0, 1.0, 1.0), origin=(-31.5, 20, 7)):
    full = np.eye(4)
    full[:3, :3] = np.asarray(directions) * spacing
    full[:3, 3] = origin
    return full


def permuted(*columns):
    """Directions of voxel axes from letters of the world axes they point to."""
    letters = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    return np.array([letters[letter] for letter in columns], float).T


@dataclass
class Volume:
    affine: np.ndarray
    name: str = "scan.nii.gz"
    kind: type = nib.Nifti1Image
    endianness: str = "<"
    codes: tuple[int, int] = (1, 1)
    qform: np.ndarray | None = None
    scale: tuple[float, float] | None = None
    shape: tuple[int, ...] = SHAPE
    voxel: tuple[int, ...] = field(default=VOXEL)

    def write(self, folder):
        """Write a bright ball of about three voxels around `voxel`."""
        away = np.indices(self.shape[:3]).T - self.voxel
        values = 1000 * np.exp(-(away**2).sum(axis=-1).T / 18)
        header = self.kind.header_class(endianness=self.endianness)
        header.set_data_dtype(np.int16)
        image = self.kind(values.astype(np.int16).reshape(self.shape), self.affine, header)
        image.set_qform(self.affine if self.qform is None else self.qform, self.codes[0])
        image.set_sform(self.affine, self.codes[1])
        image.header.set_xyzt_units("mm")
        if self.scale:
            image.header.set_slope_inter(*self.scale)
            image = self.kind(values * self.scale[0] + self.scale[1], None, image.header)
        nib.save(image, folder / self.name)
        return folder / self.name


OBLIQUE = rotation((1, 2, 3), 25)
VOLUMES = {
    "plain": Volume(affine(np.eye(3))),
    "anisotropic": Volume(affine(np.eye(3), (0.7, 0.8, 2.5))),
    "flipped_lps": Volume(affine(permuted("L", "P", "S"), (1.5, 1, 0.8))),
    "negative_determinant": Volume(affine(permuted("L", "A", "S"), (2, 1, 1.5))),
    "permuted_psr": Volume(affine(permuted("P", "S", "R"), (1, 2, 1.5))),
    "permuted_ial": Volume(affine(permuted("I", "A", "L"), (1.2, 1, 1.5))),
    "oblique": Volume(affine(OBLIQUE)),
    "oblique_flipped_anisotropic": Volume(affine(OBLIQUE * (1, -1, 1), (0.9, 0.9, 2))),
    "oblique_permuted": Volume(affine(OBLIQUE @ permuted("S", "L", "A"), (1, 1.4, 0.8))),
    "sform_only": Volume(affine(OBLIQUE, (1, 1, 2)), codes=(0, 1)),
    "qform_only": Volume(affine(OBLIQUE * (-1, 1, 1), (1, 1, 2)), codes=(1, 0)),
    "conflicting": Volume(affine(OBLIQUE), codes=(1, 2), qform=affine(permuted("L", "P", "S"), (1, 1, 1), (5, 5, 5))),
    "template_space": Volume(affine(permuted("L", "A", "S"), (2, 2, 2)), codes=(4, 4)),
    "scaled": Volume(affine(np.eye(3), (1, 1, 2)), scale=(0.25, -100.0)),
    "big_endian": Volume(affine(OBLIQUE, (1, 1, 2)), endianness=">"),
    "nifti2": Volume(affine(OBLIQUE, (1, 1, 2)), kind=nib.Nifti2Image),
    "nifti2_big_endian_plain": Volume(affine(OBLIQUE), kind=nib.Nifti2Image, endianness=">", name="scan.nii"),
    "unpacked": Volume(affine(OBLIQUE), name="scan.nii"),
    "one_time_point": Volume(affine(OBLIQUE), shape=(*SHAPE, 1)),
}


def predict(path, output_dir):
    """Find the bright ball on a grid of 1 mm in RAS, and write it as label 1 on the grid of the file."""
    before = Compose(
        [
            LoadCased("image", spatial_dims=3, channels=1),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=(1, 1, 1), mode="bilinear"),
        ]
    )
    case = before({"image": str(path)})
    middle = (case["image"].min() + case["image"].max()) / 2
    case["pred"] = torch.cat([middle - case["image"], case["image"] - middle])
    case = Invertd("pred", transform=before, orig_keys="image", nearest_interp=False)(case)
    case["pred"] = case["pred"].argmax(dim=0, keepdim=True)
    SaveMaskd("pred", output_dir)(case)
    return output_dir / path.name


def content(path):
    data = path.read_bytes()
    return decompress(data) if path.name.endswith(".gz") else data


def assert_same_place_in_file(source, mask):
    before, after = content(source), content(mask)
    assert before[:4] == after[:4]
    for start, length in PLACE[348 if b"\x5c\x01" in (before[:2], before[3:1:-1]) else 540]:
        assert after[start : start + length] == before[start : start + length]


def center_of_label(labels):
    """Return the center of label 1 in voxels; `labels` has x first."""
    found = np.argwhere(np.asarray(labels).reshape(np.asarray(labels).shape[:3]) == 1)
    assert len(found) > 20
    return found.mean(axis=0)


def assert_nibabel_agrees(volume, source, mask):
    image, written = nib.load(source), nib.load(mask)
    assert written.shape == image.shape == volume.shape
    assert np.array_equal(written.affine, image.affine)
    for get in ("get_sform", "get_qform"):
        (a, code_a), (b, code_b) = (getattr(i.header, get)(coded=True) for i in (image, written))
        assert code_a == code_b
        assert np.array_equal(a, b)
    world = nib.affines.apply_affine(written.affine, center_of_label(written.dataobj))
    target = nib.affines.apply_affine(volume.affine, volume.voxel)
    assert np.linalg.norm(world - target) < 0.3 * max(nib.affines.voxel_sizes(volume.affine))


def same_grid_in_simpleitk(source, mask):
    image, written = SimpleITK.ReadImage(str(source)), SimpleITK.ReadImage(str(mask))
    for get in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(image, get)() == getattr(written, get)()
    return image, written


def assert_simpleitk_agrees(volume, source, mask):
    image, written = same_grid_in_simpleitk(source, mask)
    dims = image.GetDimension()
    center = [*center_of_label(SimpleITK.GetArrayFromImage(written).T), 0][:dims]
    world = np.array(written.TransformContinuousIndexToPhysicalPoint(center))
    target = np.array(image.TransformIndexToPhysicalPoint([*volume.voxel, 0][:dims]))
    assert np.linalg.norm(world - target) < 0.3 * max(image.GetSpacing()[:3])
    if volume.qform is None:
        given = nib.affines.apply_affine(volume.affine, volume.voxel) * (-1, -1, 1)
        assert np.allclose(target[:3], given, atol=1e-3)


def assert_itk_agrees(volume, source, mask):
    image, written = itk.imread(str(source)), itk.imread(str(mask))
    assert list(image.GetOrigin()) == list(written.GetOrigin())
    assert list(image.GetSpacing()) == list(written.GetSpacing())
    assert np.array_equal(itk.array_from_matrix(image.GetDirection()), itk.array_from_matrix(written.GetDirection()))
    dims = image.GetImageDimension()
    center = [*center_of_label(itk.array_view_from_image(written).T), 0][:dims]
    index = itk.ContinuousIndex[itk.D, dims]()
    for axis, value in enumerate(center):
        index.SetElement(axis, float(value))
    world = np.array(written.TransformContinuousIndexToPhysicalPoint(index))
    target = np.array(image.TransformIndexToPhysicalPoint([*volume.voxel, 0][:dims]))
    assert np.linalg.norm(world - target) < 0.3 * max(list(image.GetSpacing())[:3])


@pytest.mark.parametrize("name", VOLUMES)
def test_the_mask_lies_on_the_input(tmp_path, name):
    volume = VOLUMES[name]
    source = volume.write(tmp_path)
    mask = predict(source, tmp_path / "out")
    assert_same_place_in_file(source, mask)
    assert_nibabel_agrees(volume, source, mask)
    if volume.kind is nib.Nifti1Image:  # ITK 5.4 reads no NIfTI-2
        assert_simpleitk_agrees(volume, source, mask)
        assert_itk_agrees(volume, source, mask)


def test_the_mask_covers_the_ball_and_nothing_else(tmp_path):
    source = VOLUMES["oblique_permuted"].write(tmp_path)
    found = np.asarray(nib.load(predict(source, tmp_path / "out")).dataobj) == 1
    values = nib.load(source).get_fdata()
    expected = values > (values.min() + values.max()) / 2
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.95


@pytest.mark.data
@pytest.mark.skipif(not AWKWARD.is_dir(), reason=f"needs the real files in {AWKWARD}")
@pytest.mark.parametrize("name", ["anatomical.nii", "cord_t2.nii.gz", "fmri_pitch.nii.gz", "orientation_lps.nii.gz"])
def test_masks_of_real_files_lie_on_them(tmp_path, name):
    mask = predict(AWKWARD / name, tmp_path)
    assert_same_place_in_file(AWKWARD / name, mask)
    image, written = same_grid_in_simpleitk(AWKWARD / name, mask)
    values, labels = SimpleITK.GetArrayFromImage(image).astype(float), SimpleITK.GetArrayFromImage(written)
    expected = values > (values.min() + values.max()) / 2
    assert 2 * (expected & (labels == 1)).sum() / (expected.sum() + (labels == 1).sum()) > 0.8


directions = st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.2, 1))
steps = st.floats(0.6, 2.5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    axis=directions,
    degrees=st.floats(-180, 180),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    spacing=st.tuples(steps, steps, steps),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    only=st.sampled_from([(0, 1), (1, 0), (1, 1)]),
)
def test_the_mask_lies_on_any_input(tmp_path_factory, axis, degrees, flips, spacing, origin, only):
    volume = Volume(affine(rotation(axis, degrees) * flips, spacing, origin), codes=only)
    folder = tmp_path_factory.mktemp("any")
    source = volume.write(folder)
    mask = predict(source, folder / "out")
    assert_same_place_in_file(source, mask)
    assert_nibabel_agrees(volume, source, mask)
    assert_simpleitk_agrees(volume, source, mask)
