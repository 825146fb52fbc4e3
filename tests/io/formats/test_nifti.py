import gzip
import logging

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

from medseg.errors import CaseError, GeometryError, RequestError
from medseg.io import load, read_grid, streams

AFFINE = np.array([[-2.0, 0, 0, 30], [0, 0, 1.5, -40], [0, 3, 0, 12], [0, 0, 0, 1]])


@pytest.fixture
def values():
    return np.random.default_rng(0).integers(-900, 900, (5, 6, 7)).astype(np.int16)


def save(path, array, *, affine=AFFINE, kind=nib.Nifti1Image, change=None, endianness="<"):
    """Write an image with nibabel; `change` edits the header as stored."""
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(array.dtype)
    image = kind(array, affine, header)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1, strip_shears=True)
    image.set_sform(affine, 1)
    nib.save(image, path)
    if change is not None:
        edit(path, kind, change)
    return path


def edit(path, kind, change):
    packed = path.name.endswith(".gz")
    data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    size = kind.header_class.sizeof_hdr
    header = kind.header_class(data[:size], check=False)
    change(header)
    data = header.binaryblock + data[size:]
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)


def setter(**fields):
    def change(header):
        for name, value in fields.items():
            header[name] = value

    return change


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint64, np.float32, np.float64])
def test_values_and_place_are_those_of_nibabel(tmp_path, values, kind, endianness, suffix, dtype):
    path = save(tmp_path / f"a{suffix}", np.abs(values).astype(dtype), kind=kind, endianness=endianness)
    image = load(path)
    reference = nib.load(path)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert np.array_equal(image[0].numpy(), reference.get_fdata(dtype=np.float32))
    assert np.array_equal(image.affine.numpy(), reference.affine)
    assert image.affine.dtype == torch.float64


def test_values_and_place_are_those_of_simpleitk(tmp_path, values):
    path = save(tmp_path / "a.nii.gz", values, change=setter(scl_slope=0.5, scl_inter=-7))
    image, reference = load(path), SimpleITK.ReadImage(str(path))
    assert np.array_equal(image[0].numpy(), SimpleITK.GetArrayFromImage(reference).T)
    for index in [(0, 0, 0), (4, 5, 6), (1, 2, 3)]:
        x, y, z = reference.TransformIndexToPhysicalPoint(index)
        assert np.allclose(image.affine.numpy() @ (*index, 1), (-x, -y, z, 1))


@pytest.mark.parametrize(("slope", "inter"), [(2.5, -1024), (1e-3, 0), (-1, 3), (0, 5), (np.nan, 5), (1, 0)])
def test_scale_factors_are_applied(tmp_path, values, slope, inter):
    path = save(tmp_path / "a.nii", values, change=setter(scl_slope=slope, scl_inter=inter))
    assert np.allclose(load(path)[0].numpy(), nib.load(path).get_fdata(), rtol=1e-6)


def test_large_numbers_keep_their_precision_through_the_offset(tmp_path):
    stored = np.arange(4_000_000_000, 4_000_000_060, dtype=np.uint32).reshape(3, 4, 5)
    path = save(tmp_path / "a.nii", stored, change=setter(scl_slope=1, scl_inter=-4_000_000_000))
    assert np.array_equal(load(path)[0].numpy(), np.arange(60).reshape(3, 4, 5))


def test_slabs_join_without_a_seam(tmp_path, values, monkeypatch):
    monkeypatch.setattr(streams, "_SLAB_BYTES", values[..., 0].nbytes * 3)
    path = save(tmp_path / "a.nii.gz", values)
    assert np.array_equal(load(path)[0].numpy(), values)


def test_metadata_are_those_that_monai_needs(tmp_path, values):
    path = save(tmp_path / "a.nii.gz", values)
    meta = load(path).meta
    assert meta["filename_or_obj"] == str(path)
    assert tuple(meta["spatial_shape"]) == (5, 6, 7)
    assert meta["space"] == "RAS"
    assert meta["original_channel_dim"] == 0
    assert np.array_equal(meta["original_affine"], AFFINE)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("meter", 1e3), ("micron", 1e-3), ("unknown", 1)])
def test_units_become_millimeters_as_in_simpleitk(tmp_path, values, unit, factor):
    path = save(tmp_path / "a.nii", values, affine=np.diag([0.5, 0.25, 0.75, 1]))
    code = nib.nifti1.unit_codes.code[unit]
    edit(path, nib.Nifti1Image, setter(xyzt_units=code))
    spacing = read_grid(path).spacing
    assert np.allclose(spacing, np.array([0.5, 0.25, 0.75]) * factor)
    assert np.allclose(spacing, SimpleITK.ReadImage(str(path)).GetSpacing())


def test_the_sform_goes_before_the_qform_and_a_conflict_is_said(tmp_path, values, caplog):
    other = np.diag([2.0, 3, 1.5, 1])
    path = save(tmp_path / "a.nii", values)
    image = nib.load(path)
    image.set_qform(other, 1)
    nib.save(image, tmp_path / "b.nii")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(load(tmp_path / "b.nii").affine.numpy(), AFFINE)
    assert "b.nii: sform and qform differ by up to 68.2 mm; the sform is used" in caplog.text
    edit(tmp_path / "b.nii", nib.Nifti1Image, setter(sform_code=0))
    assert np.allclose(load(tmp_path / "b.nii").affine.numpy(), other)


def test_an_unusable_qform_does_not_matter_beside_an_sform(tmp_path, values):
    path = save(tmp_path / "a.nii", values, change=setter(quatern_b=3))
    assert np.array_equal(load(path).affine.numpy(), AFFINE)
    edit(path, nib.Nifti1Image, setter(sform_code=0))
    with pytest.raises(GeometryError, match=r"a\.nii has an invalid qform"):
        load(path)


@pytest.mark.parametrize("shape", [(5, 6, 7, 1), (5, 6, 7, 1, 1)])
def test_axes_of_one_entry_are_no_channels(tmp_path, values, shape):
    path = save(tmp_path / "a.nii", values.reshape(shape))
    assert np.array_equal(load(path, spatial_dims=3)[0].numpy(), values)


def test_a_fourth_axis_is_channels_only_if_asked_for(tmp_path, values):
    path = save(tmp_path / "a.nii", np.stack([values, -values], axis=-1))
    assert np.array_equal(load(path, channels=2).numpy(), [values, -values])
    for channels in (None, 1, 3):
        with pytest.raises(CaseError, match="2 values per voxel") as error:
            load(path, channels=channels)
        assert str(path) in str(error.value)


def test_vector_images_of_simpleitk_have_channels(tmp_path, values):
    path = tmp_path / "a.nii"
    stack = np.stack([values, -values], axis=-1)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(stack, isVector=True), str(path))
    assert np.array_equal(load(path, channels=2).numpy(), np.moveaxis(stack, -1, 0).transpose(0, 3, 2, 1))


def test_two_axes_beyond_space_are_refused(tmp_path, values):
    path = save(tmp_path / "a.nii", np.broadcast_to(values[..., None, None], (5, 6, 7, 2, 2)))
    with pytest.raises(CaseError, match="2 x 2 values per voxel"):
        load(path, channels=4)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1)])
def test_one_slice_can_be_read_in_2d(tmp_path, values, shape):
    path = save(tmp_path / "a.nii", values[..., :1].reshape(shape))
    image = load(path, spatial_dims=2)
    assert np.array_equal(image.numpy(), values[None, ..., 0])
    assert image.spatial_ndim == 2
    assert read_grid(path, spatial_dims=2).shape == (5, 6)


def test_the_wrong_number_of_axes_is_refused(tmp_path, values):
    flat, deep = save(tmp_path / "flat.nii", values[..., 0]), save(tmp_path / "deep.nii", values)
    with pytest.raises(CaseError, match=r"flat\.nii is a 2D image"):
        load(flat, spatial_dims=3)
    with pytest.raises(CaseError, match=r"deep\.nii is a volume"):
        load(deep, spatial_dims=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.int32])
def test_labels_are_whole_numbers_whatever_their_type(tmp_path, dtype):
    labels = np.arange(60).reshape(3, 4, 5).astype(dtype)
    label = load(save(tmp_path / "a.nii", labels), label=True)
    assert label.dtype == torch.int32
    assert np.array_equal(label[0].numpy(), labels)


def test_labels_survive_a_rounded_scale_factor(tmp_path):
    labels = (np.arange(60) * 5).reshape(3, 4, 5).astype(np.uint16)
    path = save(tmp_path / "a.nii", labels, change=setter(scl_slope=0.2, scl_inter=0))
    assert np.array_equal(load(path, label=True)[0].numpy(), labels / 5)


@pytest.mark.parametrize(
    ("value", "part"),
    [(1.5, "1.5"), (np.nan, "NaN"), (np.inf, "NaN or Inf"), (3e9, "3000000000"), (-3e9, "-3000000000")],
)
def test_what_is_no_label_is_refused_with_its_value(tmp_path, value, part):
    labels = np.zeros((3, 4, 5))
    labels[1, 2, 3] = value
    path = save(tmp_path / "a.nii", labels)
    with pytest.raises(CaseError) as error:
        load(path, label=True)
    assert str(path) in str(error.value)
    assert part in str(error.value)


def test_voxels_that_are_no_numbers_are_counted(tmp_path):
    array = np.zeros((3, 4, 5))
    array[0, 0, :3], array[1, 1, 1], array[2, 2, 2] = np.nan, np.inf, 1e300
    path = save(tmp_path / "a.nii", array)
    with pytest.raises(CaseError, match=r"3 NaN and 2 Inf .* of 60 voxels") as error:
        load(path)
    assert str(path) in str(error.value)


def poke(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        (setter(sform_code=0, qform_code=0), GeometryError, "sform_code and qform_code are 0"),
        (setter(srow_x=[np.nan, 0, 0, 0]), GeometryError, "nan"),
        (setter(srow_x=[np.inf, 0, 0, 0]), GeometryError, "inf"),
        (setter(srow_x=0), GeometryError, "spacing of"),
        (setter(srow_x=[2, 2, 0, 0]), GeometryError, "sheared"),
        (setter(srow_x=[2e4, 0, 0, 0]), GeometryError, "2e+04"),
        (setter(dim=[3, 5, 0, 7, 1, 1, 1, 1]), GeometryError, "(5, 0, 7)"),
        (setter(dim=[3, 5, -6, 7, 1, 1, 1, 1]), GeometryError, "(5, -6, 7)"),
        (setter(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), GeometryError, "the limit is 2,147,483,648"),
        (setter(dim=[3, 500, 600, 700, 1, 1, 1, 1]), CaseError, "is truncated or has a wrong header"),
        (setter(dim=[1, 5, 1, 1, 1, 1, 1, 1]), CaseError, "dim[0] is 1"),
        (setter(dim=[9, 5, 6, 7, 1, 1, 1, 1]), CaseError, "dim[0] is 9"),
        (setter(datatype=128, bitpix=24), CaseError, "color (RGB)"),
        (setter(datatype=32, bitpix=64), CaseError, "complex"),
        (setter(datatype=77), CaseError, "corrupt NIfTI header"),
        (setter(vox_offset=16), CaseError, "corrupt NIfTI header"),
        (setter(vox_offset=0), CaseError, "invalid vox_offset of 0"),
        (setter(vox_offset=np.nan), CaseError, "corrupt NIfTI header"),
        (setter(scl_slope=2, scl_inter=np.nan), CaseError, "corrupt NIfTI header"),
        (setter(magic=b"ni1"), CaseError, "NIfTI pair"),
        (setter(magic=b"xyz"), CaseError, "is not a NIfTI file: its magic"),
        (setter(sizeof_hdr=7), CaseError, "does not start with a NIfTI header"),
    ],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_wrong_headers_are_refused_with_file_and_reason(tmp_path, values, suffix, change, error, part):
    path = save(tmp_path / f"a{suffix}", values, change=change)
    for read in (load, read_grid):
        if read is read_grid and "truncated" in part:
            continue
        with pytest.raises(error) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert part in str(caught.value)


def test_max_voxels_can_be_lowered(tmp_path, values):
    path = save(tmp_path / "a.nii", values)
    with pytest.raises(GeometryError, match="limit is 209"):
        load(path, max_voxels=209)
    assert load(path, max_voxels=210).shape == (1, 5, 6, 7)


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".nii", lambda path: cut(path, 100)),
        (".nii", lambda path: cut(path, 700)),
        (".nii", lambda path: path.write_bytes(b"DICM" * 200)),
        (".nii.gz", lambda path: cut(path, 40)),
        (".nii.gz", lambda path: cut(path, path.stat().st_size // 2)),
        (".nii.gz", lambda path: cut(path, path.stat().st_size - 4)),
        (".nii.gz", lambda path: poke(path, path.stat().st_size - 8, b"\1\2\3\4")),
        (".nii.gz", lambda path: poke(path, 200, b"\xff" * 20)),
        (".nii.gz", lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-3]))),
        (".nii.gz", lambda path: path.write_bytes(b"\x1f\x8b")),
        (".nii.gz", lambda path: path.write_bytes(b"")),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, values, suffix, damage):
    path = save(tmp_path / f"a{suffix}", values)
    damage(path)
    with pytest.raises(CaseError) as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_gzip_that_cannot_hold_its_voxels_is_refused_before_memory_is_taken(tmp_path, values, monkeypatch):
    path = save(tmp_path / "a.nii.gz", values, change=setter(dim=[3, 1000, 1000, 1000, 1, 1, 1, 1]))
    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: pytest.fail("memory was taken"))
    with pytest.raises(CaseError, match=r"2,000,000,352 bytes.*compressed"):
        load(path)


def test_the_content_decides_whether_a_file_is_gzipped(tmp_path, values):
    path = save(tmp_path / "a.nii.gz", values)
    path.rename(tmp_path / "b.nii")
    assert np.array_equal(load(tmp_path / "b.nii")[0].numpy(), values)


def test_nothing_is_logged_by_nibabel(tmp_path, values, caplog):
    with caplog.at_level(logging.DEBUG):
        path = save(tmp_path / "a.nii", values, change=setter(pixdim=[0, -2, 3, 1.5, 0, 0, 0, 0], bitpix=3))
        load(path)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("dtype", "fields", "kept"),
    [
        (np.uint8, {}, torch.uint8),
        (np.int8, {}, torch.int16),
        (np.int16, {}, torch.int16),
        (np.int16, {"scl_slope": 0}, torch.int16),
        (np.uint16, {}, torch.int32),
        (np.int32, {}, torch.int32),
        (np.uint32, {}, torch.float32),
        (np.float32, {}, torch.float32),
        (np.float64, {}, torch.float32),
        (np.int16, {"scl_slope": 2}, torch.float32),
        (np.int16, {"scl_inter": -1024}, torch.float32),
    ],
)
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_whole_numbers_stay_in_their_type_if_asked_for(tmp_path, values, dtype, fields, kept, endianness):
    stored = (values // 8).astype(dtype)
    change = setter(**{"scl_slope": 1, "scl_inter": 0, **fields})
    path = save(tmp_path / "a.nii.gz", stored, change=change, endianness=endianness)
    image = load(path, dtype="stored")
    assert image.dtype == kept
    assert np.array_equal(image.numpy(), load(path).numpy())
    assert load(path).dtype == torch.float32
    assert load(save(tmp_path / "b.nii", values), dtype="stored", label=True).dtype == torch.int32


def test_other_types_cannot_be_asked_for(tmp_path, values):
    with pytest.raises(RequestError, match="'float16'"):
        load(save(tmp_path / "a.nii", values), dtype="float16")


def test_one_volume_of_a_series_is_read_alone(tmp_path, values):
    stack = np.stack([values, -values, values // 2], axis=-1)
    path = save(tmp_path / "a.nii.gz", stack)
    for index in range(3):
        assert np.array_equal(load(path, index=index)[0].numpy(), stack[..., index])
    assert np.array_equal(load(save(tmp_path / "b.nii", values), index=0)[0].numpy(), values)


@pytest.mark.parametrize(
    ("shape", "options", "part"),
    [
        ((5, 6, 7, 3), {"index": 3}, "index 3 is out of range, the last volume is 2"),
        ((5, 6, 7, 3), {"index": -1}, "index -1 is out of range"),
        ((5, 6, 7), {"index": 1}, "one value per voxel: index 1 is out of range"),
        ((5, 6, 7, 3), {"index": 1, "channels": 3}, "expected 3"),
        ((5, 6, 7, 2, 2), {"index": 1}, "2 x 2 values per voxel"),
    ],
)
def test_volumes_that_a_series_does_not_have_are_refused(tmp_path, values, shape, options, part):
    path = save(tmp_path / "a.nii", np.resize(values, shape))
    with pytest.raises(CaseError) as error:
        load(path, **options)
    assert str(path) in str(error.value)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"qoffset_x": 77}, "sform-qform-conflict", "sform and qform differ by up to"),
        ({"sform_code": 0, "pixdim": [1, 0, 2, 0, 0, 0, 0, 0]}, "spacing-assumed", "is 0 along axis 1, 3; 1 mm is"),
        ({"sform_code": 0, "pixdim": [1, 2, -3, 1, 0, 0, 0, 0]}, "header-repaired", "is 2, -3, 1; its absolute value"),
        ({"sform_code": 0, "pixdim": [3, 2, 3, 1, 0, 0, 0, 0]}, "header-repaired", "(qfac) is 3; 1 is assumed"),
        ({"sform_code": 99}, "header-repaired", "sform_code 99 is undefined; 0 is assumed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_assumed_about_a_header_is_warned_of(tmp_path, values, assert_warns, caplog, fields, code, text):
    path = save(tmp_path / "a.nii", values, change=setter(**fields))
    assert_warns(lambda: load(path), code)
    assert text in caplog.text


def test_pixdim_does_not_matter_beside_an_sform(tmp_path, values, caplog):
    load(save(tmp_path / "a.nii", values, change=setter(pixdim=[1, 0, 2, 0, 0, 0, 0, 0], qform_code=0)))
    assert caplog.text == ""


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, -1, 1, 1])])
def test_an_identity_affine_is_suspicious(tmp_path, values, assert_warns, affine):
    path = save(tmp_path / "a.nii", values, affine=affine)
    assert_warns(lambda: load(path), "identity-affine")


def test_whole_numbers_that_float32_rounds_are_warned_of(tmp_path, values, assert_warns, caplog):
    large = values.astype(np.int32)
    large[0, 0, 0] = 2**24
    assert load(save(tmp_path / "exact.nii", large)).max() == 2**24
    assert caplog.text == ""
    large[0, 0, 0] = -(2**24) - 1
    path = save(tmp_path / "a.nii", large)
    assert_warns(lambda: load(path), "values-rounded")
    assert "up to 16,777,217" in caplog.text
    assert load(path, dtype="stored").min() == -(2**24) - 1
