"""Any grid, any volume format: what other programs write is read where they put it, and the other way round."""

import gzip
from itertools import product

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.errors import CaseError
from medseg.io import Grid, load, read_grid, write_mask, write_probabilities

ITK_SUFFIXES = [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"]
SUFFIXES = [*ITK_SUFFIXES, ".mgh", ".mgz"]
MASK_SUFFIXES = [".nii", ".nii.gz", ".nrrd", ".mha", ".mgh", ".mgz"]
# Relative precision of the numbers that place the voxels.
EXACT = {".nrrd": 1e-14, ".nhdr": 1e-14, ".mha": 1e-14, ".mhd": 1e-14}
FLOAT32 = 4e-7
ITK_TYPES = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64]
MGH_TYPES = [np.uint8, np.int16, np.int32, np.float32]


def rotation(axis, degrees):
    """Rotate around `axis` (Rodrigues)."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@st.composite
def grids(draw):
    axis = draw(st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.2, 1)))
    turn = rotation(axis, draw(st.sampled_from([0, 0, 9, 25, 120])))
    order = draw(st.permutations(range(3)))
    flips = draw(st.tuples(*[st.sampled_from([1, -1])] * 3))
    spacing = draw(st.tuples(*[st.floats(0.01, 20)] * 3))
    affine = np.eye(4)
    affine[:3, :3] = (turn[:, order] * flips) * spacing
    affine[:3, 3] = draw(st.tuples(*[st.floats(-900, 900)] * 3))
    return Grid(draw(st.tuples(*[st.integers(1, 9)] * 3)), affine)


def tolerance(grid, suffix):
    reach = np.abs(grid.affine[:3, 3]).max() + max(grid.spacing) * sum(grid.shape)
    return reach * EXACT.get(suffix, FLOAT32)


def corners(grid):
    return [*product(*[(0, size - 1) for size in grid.shape])]


def world(affine, index):
    return (np.asarray(affine) @ (*index, 1))[:3]


def to_simpleitk(array, grid):
    """Return an image whose place is that of the grid, in LPS."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    lps = grid.affine * np.array([-1, -1, 1, 1])[:, None]
    image.SetSpacing(grid.spacing)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / grid.spacing).ravel().tolist())
    return image


def itk_world(image, index):
    """Return RAS+ mm of a voxel; works for SimpleITK and ITK."""
    return np.array(image.TransformIndexToPhysicalPoint([int(i) for i in index])) * (-1, -1, 1)


def values(shape, dtype, seed):
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.iinfo(np.int16)
    low, high = max(info.min, -(2**23)), min(info.max, 2**23)
    return np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype(dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    grid=grids(),
    suffix=st.sampled_from(ITK_SUFFIXES),
    dtype=st.sampled_from(ITK_TYPES),
    packed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_what_simpleitk_writes_is_read_where_it_lies(tmp_path_factory, grid, suffix, dtype, packed, seed):
    path = tmp_path_factory.mktemp("any") / f"scan{suffix}"
    array = values(grid.shape, dtype, seed)
    SimpleITK.WriteImage(to_simpleitk(array, grid), str(path), packed)
    image, reference = load(path), SimpleITK.ReadImage(str(path))
    assert np.array_equal(image[0].numpy(), SimpleITK.GetArrayFromImage(reference).T.astype(np.float32))
    assert np.array_equal(image[0].numpy(), array.astype(np.float32))
    for index in corners(grid):
        found = world(image.affine, index)
        assert np.allclose(found, itk_world(reference, index), rtol=0, atol=tolerance(grid, suffix))
        assert np.allclose(found, world(grid.affine, index), rtol=0, atol=tolerance(grid, suffix))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(grid=grids(), suffix=st.sampled_from([".mgh", ".mgz"]), dtype=st.sampled_from(MGH_TYPES), seed=st.integers(0, 9))
def test_what_nibabel_writes_as_mgh_is_read_where_it_lies(tmp_path_factory, grid, suffix, dtype, seed):
    path = tmp_path_factory.mktemp("any") / f"scan{suffix}"
    array = values(grid.shape, dtype, seed)
    nib.save(nib.MGHImage(array, grid.affine), path)
    image, reference = load(path), open_mgh(path)
    assert np.array_equal(image[0].numpy(), reference.get_fdata(dtype=np.float32))
    assert np.array_equal(image[0].numpy(), array.astype(np.float32))
    for affine in (reference.affine, grid.affine):
        assert np.allclose(image.affine, affine, rtol=0, atol=tolerance(grid, suffix))


def open_mgh(path):
    """Read with nibabel, which from a path would leave the file open."""
    data = path.read_bytes()
    return nib.MGHImage.from_bytes(gzip.decompress(data) if path.suffix == ".mgz" else data)


def write_source(path, array, grid):
    if path.suffix in (".mgh", ".mgz"):
        nib.save(nib.MGHImage(array, grid.affine), path)
    else:
        SimpleITK.WriteImage(to_simpleitk(array, grid), str(path))


def assert_same_place(source, target):
    """Say, in the words of the program that knows both formats, that two files share one grid to the last bit."""
    if target.suffix in (".mgh", ".mgz"):
        assert np.array_equal(open_mgh(source).affine, open_mgh(target).affine)
        return
    a, b = SimpleITK.ReadImage(str(source)), SimpleITK.ReadImage(str(target))
    c, d = itk.imread(str(source)), itk.imread(str(target))
    for get in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(a, get)() == getattr(b, get)()
    assert list(c.GetOrigin()) == list(d.GetOrigin())
    assert list(c.GetSpacing()) == list(d.GetSpacing())
    assert np.array_equal(itk.array_from_matrix(c.GetDirection()), itk.array_from_matrix(d.GetDirection()))


def read_labels(path):
    """Return the labels as the independent programs read them."""
    if path.suffix in (".mgh", ".mgz"):
        return np.asarray(open_mgh(path).dataobj)
    found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T
    assert np.array_equal(found, itk.array_from_image(itk.imread(str(path))).T)
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    grid=grids(),
    suffix=st.sampled_from(SUFFIXES),
    largest=st.sampled_from([1, 255, 256, 70000]),
    seed=st.integers(0, 9),
)
def test_masks_in_the_format_of_their_image_share_its_place_bit_for_bit(tmp_path_factory, grid, suffix, largest, seed):
    folder = tmp_path_factory.mktemp("any")
    source = folder / f"scan{suffix}"
    target = folder / f"mask{ {'.nhdr': '.nrrd', '.mhd': '.mha'}.get(suffix, suffix) }"
    write_source(source, values(grid.shape, np.int16, seed), grid)
    mask = np.random.default_rng(seed).integers(0, largest, grid.shape, endpoint=True)
    write_mask(mask, target, like=source)
    assert np.array_equal(read_labels(target), mask)
    assert np.array_equal(read_grid(target).affine, read_grid(source).affine)
    assert_same_place(source, target)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grid=grids(), before=st.sampled_from(SUFFIXES), after=st.sampled_from(MASK_SUFFIXES), seed=st.integers(0, 9))
def test_masks_in_another_format_lie_on_the_image_as_exactly_as_it_can_say(tmp_path_factory, grid, before, after, seed):
    folder = tmp_path_factory.mktemp("any")
    source, target = folder / f"scan{before}", folder / f"mask{after}"
    write_source(source, values(grid.shape, np.int16, seed), grid)
    mask = np.random.default_rng(seed).integers(0, 9, grid.shape)
    write_mask(mask, target, like=source)
    assert np.array_equal(read_labels(target), mask)
    held = read_grid(source)
    for index in corners(grid):
        expected, atol = world(held.affine, index), tolerance(grid, after)
        assert np.allclose(world(read_grid(target).affine, index), expected, rtol=0, atol=atol)
        if after in (".mgh", ".mgz"):
            assert np.allclose(world(open_mgh(target).affine, index), expected, rtol=0, atol=2 * atol)
        else:
            for image in (SimpleITK.ReadImage(str(target)), itk.imread(str(target))):
                assert np.allclose(itk_world(image, index), expected, rtol=0, atol=2 * atol)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_from_another_format_has_equal_sform_and_qform(tmp_path, suffix):
    grid = Grid((4, 5, 6), [[0, -2, 0, 7.7], [0.6, 0, 0, -3], [0, 0, 1.1, 9], [0, 0, 0, 1]])
    SimpleITK.WriteImage(to_simpleitk(np.zeros(grid.shape, np.int16), grid), str(tmp_path / "scan.nrrd"))
    write_mask(np.ones(grid.shape), tmp_path / f"mask{suffix}", like=tmp_path / "scan.nrrd")
    header = nib.load(tmp_path / f"mask{suffix}").header
    (sform, code_s), (qform, code_q) = header.get_sform(coded=True), header.get_qform(coded=True)
    assert (code_s, code_q) == (1, 1)
    assert np.allclose(sform, grid.affine, rtol=1e-6)
    assert np.allclose(qform, sform, atol=1e-5)
    assert header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("after", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("before", [".nii.gz", ".nrrd", ".mha", ".mgz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_probabilities_are_channels_on_the_grid_for_everyone(tmp_path, before, after, dtype):
    grid = Grid((4, 5, 6), [[0, -2, 0, 7.5], [0.5, 0, 0, -3], [0, 0, 1.25, 9], [0, 0, 0, 1]])
    source, target = tmp_path / f"scan{before}", tmp_path / f"map{after}"
    write_source(source, np.zeros(grid.shape, np.int16), grid)
    given = (np.random.default_rng(0).random((3, *grid.shape)) * (255 if dtype is np.uint8 else 1)).astype(dtype)
    write_probabilities(given, target, like=source)
    assert np.array_equal(load(target, channels=3).numpy(), given.astype(np.float32))
    assert np.allclose(load(target, channels=3).affine, grid.affine, atol=1e-6)
    if after.startswith(".nii"):
        reference = nib.load(target)
        assert np.array_equal(np.moveaxis(reference.get_fdata(), -1, 0), given)
        assert np.allclose(reference.affine, grid.affine, atol=1e-6)
    image = SimpleITK.ReadImage(str(target))
    found = SimpleITK.GetArrayFromImage(image)  # (z, y, x, C), or of a NIfTI (C, z, y, x)
    moved = found.transpose(0, 3, 2, 1) if after.startswith(".nii") else found.transpose(3, 2, 1, 0)
    assert np.array_equal(moved, given)


@pytest.mark.parametrize("suffix", MASK_SUFFIXES)
def test_masks_of_one_slice_keep_their_place(tmp_path, suffix):
    affine = np.diag([-1.0, 2, 3, 1])
    nib.save(nib.Nifti1Image(np.zeros((4, 5), np.int16), affine), tmp_path / "slice.nii.gz")
    mask = np.arange(20).reshape(4, 5)
    write_mask(mask, tmp_path / f"mask{suffix}", like=tmp_path / "slice.nii.gz")
    assert np.array_equal(load(tmp_path / f"mask{suffix}", label=True, spatial_dims=2)[0].numpy(), mask)
    assert np.allclose(read_grid(tmp_path / f"mask{suffix}").affine, affine)


@pytest.mark.parametrize("suffix", MASK_SUFFIXES)
def test_equal_masks_are_equal_bytes(tmp_path, suffix):
    SimpleITK.WriteImage(SimpleITK.Image(30, 40, 50, SimpleITK.sitkInt16), str(tmp_path / "scan.mha"))
    mask = np.random.default_rng(0).integers(0, 3, (30, 40, 50))
    for name in ("one", "other"):
        write_mask(mask, tmp_path / f"{name}{suffix}", like=tmp_path / "scan.mha")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"other{suffix}").read_bytes()


def damaged(data, random):
    """Return a file with a few bytes changed, lost, or put in, mostly in its header."""
    pieces = [b"0", b"-1", b"9" * 20, b"nan", b"1e400", b"(", b"\n", b":", b"none", b"\0"]
    result = bytearray(data)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(min(len(result), int(random.choice([400, 600, len(result)])))))
        length = int(random.integers(0, 9))
        result[at : at + length] = pieces[random.integers(len(pieces))] if random.random() < 0.6 else b""
    return bytes(result or b"x")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mgh", ".mgz"])
def test_damaged_files_are_refused_by_name_or_read_never_worse(tmp_path, suffix):
    random = np.random.default_rng(0)
    grid = Grid((5, 6, 7), np.diag([-1.0, -2, 3, 1]))
    write_source(tmp_path / f"whole{suffix}", values(grid.shape, np.int16, 0), grid)
    path, data, messages = tmp_path / f"a{suffix}", (tmp_path / f"whole{suffix}").read_bytes(), []
    for _ in range(300):
        path.write_bytes(damaged(data, random))
        try:
            assert np.isfinite(load(path).numpy()).all()
        except CaseError as error:
            messages.append(str(error))
    assert 50 < len(messages) <= 300
    assert all(str(path) in message for message in messages)
