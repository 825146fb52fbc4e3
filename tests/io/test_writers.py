import gzip
import os
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from PIL import Image

from medseg.errors import CaseError, GeometryError, MedsegError, OutputError, RequestError
from medseg.io import load, read_grid, streams, write_label_files, write_mask, write_probabilities
from medseg.io.formats import nifti

AFFINE = np.array([[-1.6, 0, -0.9, 30], [1.2, 0, -1.2, -40], [0, 3, 0, 12], [0, 0, 0, 1]])
# (first byte, length) of dim_info, pixdim, xyzt_units, and qform_code to the end of srow_z.
PLACE = {348: [(39, 1), (76, 32), (123, 1), (252, 76)], 540: [(524, 1), (104, 64), (500, 4), (344, 8), (352, 144)]}


@pytest.fixture
def mask():
    return np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)


def source(path, shape=(5, 6, 7), *, kind=nib.Nifti1Image, endianness="<", **fields):
    """Write a NIfTI file whose header is full of things, `fields` among them."""
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(np.int16)
    image = kind(np.zeros(shape, np.int16), AFFINE, header)
    image.set_qform(np.diag([-1.0, 2, 3, 1]), 1)
    image.set_sform(AFFINE, 2)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_dim_info(0, 1, 2)
    image.header["descrip"], image.header["aux_file"], image.header["intent_name"] = b"Jane", b"Doe", b"1970"
    image.header["cal_max"], image.header["cal_min"], image.header["toffset"] = 100, -100, 3
    if kind is nib.Nifti1Image:
        image.header["db_name"] = b"Clinic"
    image.header.set_slope_inter(2, -5)
    for name, value in fields.items():
        image.header[name] = value
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe, born 1970"))
    nib.save(image, path)
    return path


def plain(path):
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_place_is_copied_bit_for_bit_and_nothing_else(tmp_path, mask, kind, endianness, suffix):
    like = source(tmp_path / "a.nii.gz", kind=kind, endianness=endianness)
    target = tmp_path / f"m{suffix}"
    write_mask(mask, target, like=like)
    before, after = plain(like), plain(target)
    size = struct.unpack(f"{endianness}i", after[:4])[0]
    assert size == kind.header_class.sizeof_hdr
    for start, length in PLACE[size]:
        assert after[start : start + length] == before[start : start + length]
    for secret in (b"Jane", b"Doe", b"1970", *([b"Clinic"] if kind is nib.Nifti1Image else [])):
        assert secret in before
        assert secret not in after
    written = nib.load(target)
    assert type(written) is kind
    assert written.header.endianness == endianness
    assert not written.header.extensions
    assert np.array_equal(np.asarray(written.dataobj), mask)
    assert written.get_data_dtype() == np.uint8
    for field in ("cal_max", "cal_min", "toffset"):
        assert written.header[field] == 0
    raw = kind.header_class(after[:size], check=False)
    assert (raw["scl_slope"], raw["scl_inter"]) == (1, 0)
    assert raw["intent_code"] == 1002
    assert np.array_equal(raw["dim"], kind.header_class(before[:size], check=False)["dim"])


def test_simpleitk_reads_the_mask_on_the_grid_of_the_image(tmp_path, mask):
    like, target = source(tmp_path / "a.nii.gz"), tmp_path / "m.nii.gz"
    write_mask(mask, target, like=like)
    image, written = SimpleITK.ReadImage(str(like)), SimpleITK.ReadImage(str(target))
    for get in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(image, get)() == getattr(written, get)()
    assert written.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    assert np.array_equal(SimpleITK.GetArrayFromImage(written).T, mask)


def test_odd_bits_of_the_source_survive(tmp_path, mask):
    like = source(tmp_path / "a.nii")
    data = bytearray(like.read_bytes())
    data[76:80] = struct.pack("<f", 0.0)  # a qfac of zero, which readers take for one
    data[92:96] = b"\x01\x00\xc0\x7f"  # a NaN with a payload, in the unused time step
    like.write_bytes(bytes(data))
    write_mask(mask, tmp_path / "m.nii", like=like)
    assert plain(tmp_path / "m.nii")[76:108] == bytes(data)[76:108]


@pytest.mark.parametrize(("largest", "dtype"), [(1, np.uint8), (255, np.uint8), (256, np.uint16), (65536, np.int32)])
@pytest.mark.parametrize("given", [np.int64, np.int32, np.float32, np.float64])
def test_the_type_is_the_smallest_that_holds_the_labels(tmp_path, mask, largest, dtype, given):
    like, target = source(tmp_path / "a.nii.gz"), tmp_path / "m.nii.gz"
    labels = mask.astype(given)
    labels[0, 0, 0] = largest
    write_mask(labels, target, like=like)
    written = nib.load(target)
    assert written.get_data_dtype() == dtype
    assert np.array_equal(np.asarray(written.dataobj), labels)


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda mask: torch.from_numpy(mask).bfloat16(),
        lambda mask: MetaTensor(torch.from_numpy(mask)),
        np.asfortranarray,
        lambda mask: mask[::-1].copy()[::-1],
    ],
)
def test_tensors_and_any_memory_layout_are_taken(tmp_path, mask, convert):
    like = source(tmp_path / "a.nii.gz")
    write_mask(convert(mask), tmp_path / "m.nii", like=like)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "m.nii").dataobj), mask)


def test_masks_without_any_label_and_of_booleans_are_written(tmp_path, mask):
    like = source(tmp_path / "a.nii.gz")
    write_mask(mask > 9, tmp_path / "m.nii", like=like)
    assert not np.asarray(nib.load(tmp_path / "m.nii").dataobj).any()


def test_slabs_join_without_a_seam(tmp_path, mask, monkeypatch):
    monkeypatch.setattr(streams, "_SLAB_BYTES", mask[..., 0].nbytes * 3)
    like = source(tmp_path / "a.nii.gz")
    write_mask(mask, tmp_path / "m.nii.gz", like=like)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "m.nii.gz").dataobj), mask)


@pytest.mark.parametrize(
    ("shape", "written"), [((5, 6, 7, 1), (5, 6, 7, 1)), ((5, 6, 7, 3), (5, 6, 7)), ((5, 6, 7, 1, 2), (5, 6, 7))]
)
def test_masks_of_several_channels_are_3d_and_axes_of_one_entry_stay(tmp_path, mask, shape, written):
    like = source(tmp_path / "a.nii.gz", shape)
    write_mask(mask, tmp_path / "m.nii.gz", like=like)
    image = nib.load(tmp_path / "m.nii.gz")
    assert image.shape == written
    assert np.array_equal(np.asarray(image.dataobj).reshape(mask.shape), mask)
    assert np.array_equal(image.affine, nib.load(like).affine)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1)])
def test_masks_of_one_slice_are_written_from_2d(tmp_path, mask, shape):
    like = source(tmp_path / "a.nii.gz", shape)
    write_mask(mask[..., 0], tmp_path / "m.nii.gz", like=like)
    image = nib.load(tmp_path / "m.nii.gz")
    assert image.shape == shape
    assert np.array_equal(np.asarray(image.dataobj).reshape(5, 6), mask[..., 0])


def test_two_writes_give_the_same_bytes(tmp_path, mask):
    like = source(tmp_path / "a.nii.gz")
    first, second = tmp_path / "one.nii.gz", tmp_path / "other.nii.gz"
    write_mask(mask, first, like=like)
    write_mask(mask, second, like=like)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[4:8] == b"\0\0\0\0"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
@pytest.mark.parametrize(("largest", "mode"), [(255, "L"), (65535, "I;16")])
def test_masks_of_pictures_are_grey_png(tmp_path, suffix, largest, mode):
    like, target = tmp_path / f"a{suffix}", tmp_path / "m.png"
    Image.new("RGB", (7, 5)).save(like)
    mask = np.arange(35).reshape(7, 5)
    mask[0, 4] = largest
    write_mask(mask, target, like=like)
    with Image.open(target) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", mode, (7, 5))
        assert picture.getpixel((0, 4)) == largest
    assert np.array_equal(load(target, label=True)[0].numpy(), mask)


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".TIF"])
@pytest.mark.parametrize(("largest", "mode"), [(255, "L"), (65535, "I;16")])
def test_masks_of_pictures_can_be_tiff(tmp_path, suffix, largest, mode):
    like, target = tmp_path / "a.png", tmp_path / f"m{suffix}"
    Image.new("RGB", (7, 5)).save(like)
    mask = np.arange(35).reshape(7, 5)
    mask[0, 4] = largest
    write_mask(mask, target, like=like)
    with Image.open(target) as picture:
        assert (picture.format, picture.mode, picture.size) == ("TIFF", mode, (7, 5))
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(target))).T, mask)
    assert np.array_equal(load(target, label=True)[0].numpy(), mask)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1)])
def test_one_slice_may_become_a_picture(tmp_path, mask, shape):
    like = source(tmp_path / "a.nii.gz", shape)
    write_mask(mask[..., :1].reshape(shape), tmp_path / "m.png", like=like)
    assert np.array_equal(load(tmp_path / "m.png", label=True)[0].numpy(), mask[..., 0])


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "a.nii.gz")


def test_each_label_gets_a_file_with_a_safe_name(tmp_path, mask):
    like = source(tmp_path / "a.nii.gz")
    labels = {1: "liver", 2: "../left lung: upper/lobe", 5: "ab..senté"}
    files = write_label_files(mask, tmp_path / "case.v2", like=like, labels=labels)
    assert names(tmp_path) == [
        "case.v2_ab..senté.nii.gz",
        "case.v2_label_3.nii.gz",
        "case.v2_left_lung_upper_lobe.nii.gz",
        "case.v2_liver.nii.gz",
    ]
    assert sorted(files) == [1, 2, 3, 5]
    for value, file in files.items():
        assert np.array_equal(np.asarray(nib.load(file).dataobj), mask == value)
        assert np.array_equal(nib.load(file).affine, AFFINE.astype(np.float32))


@pytest.mark.parametrize(("path", "written"), [("case.mha", "case_one.mha"), ("sub/case", "sub/case_one.nii.gz")])
def test_label_files_have_the_ending_of_the_path_or_of_the_image(tmp_path, mask, path, written):
    like = source(tmp_path / "a.nii.gz")
    assert write_label_files(mask > 2, tmp_path / path, like=like, labels={1: "one"}) == {1: tmp_path / written}
    assert np.array_equal(load(tmp_path / written, label=True)[0].numpy(), mask > 2)


def test_label_files_of_pictures_are_pictures(tmp_path):
    Image.new("L", (7, 5)).save(tmp_path / "a.jpg")
    files = write_label_files(np.eye(7, 5), tmp_path / "tile", like=tmp_path / "a.jpg")
    assert files == {1: tmp_path / "tile_label_1.png"}
    assert np.array_equal(load(files[1], label=True)[0].numpy(), np.eye(7, 5))


def test_label_files_of_what_has_no_ending_are_nifti(tmp_path, mask, monkeypatch):
    like = source(tmp_path / "a.nii.gz")
    monkeypatch.setattr("medseg.io.writers.read_grid", lambda path, **options: read_grid(like))
    files = write_label_files(mask > 0, tmp_path / "case", like=tmp_path / "folder")
    assert files == {1: tmp_path / "case_label_1.nii.gz"}
    assert np.array_equal(np.asarray(nib.load(files[1]).dataobj), mask > 0)


@pytest.mark.parametrize(
    ("labels", "part"), [({1: "a b", 2: "A_B"}, "have the same file name"), ({-1: "x"}, "label value -1")]
)
def test_labels_that_cannot_have_a_file_are_refused_and_leave_nothing(tmp_path, mask, labels, part):
    like = source(tmp_path / "a.nii.gz")
    with pytest.raises(RequestError, match=part):
        write_label_files(mask, tmp_path / "case", like=like, labels=labels)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        (lambda array: array[:, 1:], GeometryError, "(4, 6, 7)"),
        (lambda array: array.astype(np.float64), CaseError, "float64"),
        (lambda array: array.astype(np.int16), CaseError, "int16"),
        (lambda array: array[0, 0], CaseError, "(6, 7)"),
    ],
)
def test_what_is_no_map_of_probabilities_is_refused_and_leaves_nothing(tmp_path, mask, change, error, part):
    like = source(tmp_path / "a.nii.gz")
    with pytest.raises(error) as caught:
        write_probabilities(change(np.stack([mask, mask]).astype(np.float32)), tmp_path / "m.nii.gz", like=like)
    assert part in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["m.mgz", "m.png", "m.txt", "a.nii.gz"])
def test_probabilities_need_a_format_with_channels_and_a_name_of_their_own(tmp_path, mask, name):
    like = source(tmp_path / "a.nii.gz")
    before = like.read_bytes()
    with pytest.raises(OutputError, match=name):
        write_probabilities(np.stack([mask, mask]), tmp_path / name, like=like)
    assert names(tmp_path) == []
    assert like.read_bytes() == before


def test_probabilities_may_be_tensors_of_half_precision(tmp_path, mask):
    like = source(tmp_path / "a.nii.gz")
    given = torch.rand((2, 5, 6, 7), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        write_probabilities(given.to(dtype), tmp_path / "m.nii.gz", like=like)
        assert torch.equal(load(tmp_path / "m.nii.gz", channels=2).as_tensor(), given.to(dtype).float())


def test_an_older_mask_is_replaced_and_permissions_are_the_usual_ones(tmp_path, mask):
    like, target = source(tmp_path / "a.nii.gz"), tmp_path / "m.nii.gz"
    target.write_bytes(b"old")
    write_mask(mask, target, like=like)
    assert nib.load(target).shape == (5, 6, 7)
    (tmp_path / "usual").touch()
    assert target.stat().st_mode == (tmp_path / "usual").stat().st_mode


class Refusal:
    """A folder with an image, and the promise that a refused write leaves it as it was."""

    def __init__(self, folder):
        self.folder = folder
        self.image = source(folder / "a.nii.gz")
        self.picture = folder / "p.png"
        Image.new("L", (7, 5)).save(self.picture)

    def state(self):
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    return Refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        (lambda mask: mask[1:], GeometryError, "(4, 6, 7)"),
        (lambda mask: mask[0], GeometryError, "(6, 7)"),
        (lambda mask: mask[None], GeometryError, "(1, 5, 6, 7)"),
        (lambda mask: mask.transpose(2, 1, 0), GeometryError, "(7, 6, 5)"),
        (lambda mask: mask - 1.0, CaseError, "the negative label -1"),
        (lambda mask: mask + 0.5, CaseError, ".5: expected integer labels"),
        (lambda mask: mask * np.nan, CaseError, "nan"),
        (lambda mask: mask * np.inf + 1, CaseError, "inf"),
        (lambda mask: mask.astype(np.int64) * 2**31, CaseError, "expected at most 2147483647"),
        (lambda mask: mask.astype(complex), CaseError, "complex128"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_mask_of_the_image_is_refused_and_leaves_nothing(folder, mask, change, error, part):
    before = folder.state()
    with pytest.raises(error) as caught:
        write_mask(change(mask), folder.folder / "m.nii.gz", like=folder.image)
    assert part in str(caught.value)
    assert "a.nii.gz" in str(caught.value) or "m.nii.gz" in str(caught.value)
    assert folder.state() == before


@pytest.mark.parametrize("name", ["m.png", "m.mhd", "m", "m.nii.gz.txt"])
def test_a_volume_needs_the_name_of_a_volume(folder, mask, name):
    before = folder.state()
    with pytest.raises(OutputError) as error:
        write_mask(mask, folder.folder / name, like=folder.image)
    assert name in str(error.value)
    assert ".nii.gz" in str(error.value)
    assert folder.state() == before


@pytest.mark.parametrize("name", ["m.jpg", "m.nii.gz", "m.nrrd"])
def test_a_picture_needs_the_name_of_a_picture(folder, name):
    before = folder.state()
    with pytest.raises(OutputError, match=r"expected a name in \.png or \.tif"):
        write_mask(np.zeros((7, 5), int), folder.folder / name, like=folder.picture)
    assert folder.state() == before


def test_a_png_cannot_hold_labels_beyond_16_bits(folder):
    before = folder.state()
    with pytest.raises(CaseError, match="65535"):
        write_mask(np.full((7, 5), 65536), folder.folder / "m.png", like=folder.picture)
    assert folder.state() == before


@pytest.mark.parametrize("way", ["same", "relative", "symlink", "hardlink"])
def test_the_image_is_never_overwritten(folder, mask, way):
    target = folder.image
    if way == "relative":
        target = folder.folder / "sub" / ".." / "a.nii.gz"
    if way == "symlink":
        target = folder.folder / "m.nii.gz"
        target.symlink_to(folder.image)
    if way == "hardlink":
        target = folder.folder / "m.nii.gz"
        os.link(folder.image, target)
    before = folder.state()
    with pytest.raises(OutputError, match="is the image itself"):
        write_mask(mask, target, like=folder.image)
    assert folder.state() == before


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), ValueError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [True, False])
def test_an_error_in_the_middle_leaves_no_part_and_keeps_the_old_mask(folder, mask, monkeypatch, failure, old):
    target = folder.folder / "m.nii.gz"
    if old:
        target.write_bytes(b"old")
    before = folder.state()

    def fail(stream, header, labels, grid):
        stream.write(b"some bytes")
        stream.flush()
        assert len(folder.state()) == len(before) + 1
        raise failure

    monkeypatch.setattr(nifti, "_write_plain", fail)
    with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)) as error:
        write_mask(mask, target, like=folder.image)
    if isinstance(failure, OSError):
        assert str(target) in str(error.value)
        assert "No space left" in str(error.value)
    assert folder.state() == before


@pytest.mark.parametrize("name", ["p.png/m.nii.gz", "taken.nii.gz"])
def test_places_that_cannot_be_written_are_named(folder, mask, name):
    (folder.folder / "taken.nii.gz").mkdir()
    before = folder.state()
    with pytest.raises(OutputError) as error:
        write_mask(mask, folder.folder / name, like=folder.image)
    assert name in str(error.value)
    assert folder.state() == before


def test_a_vanished_image_is_named(folder, mask):
    folder.image.unlink()
    with pytest.raises(MedsegError, match=r"a\.nii\.gz does not exist"):
        write_mask(mask, folder.folder / "m.nii.gz", like=folder.image)


def test_labels_without_a_name_are_called_by_their_number_with_a_warning(tmp_path, mask, assert_warns):
    like = source(tmp_path / "a.nii.gz")
    assert_warns(lambda: write_label_files(mask, tmp_path / "case", like=like, labels={1: "one"}), "label-unnamed")
