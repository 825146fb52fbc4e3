import zlib

import numpy as np
import pytest
import SimpleITK

from medseg.errors import CaseError, GeometryError
from medseg.io import load, read_grid, write_mask
from tests.io.conftest import AFFINE, assert_like_simpleitk, assert_refused, simpleitk

FIELDS = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
    "Offset": "-7.5 3 9.125",
    "CenterOfRotation": "0 0 0",
    "AnatomicalOrientation": "RAI",
    "ElementSpacing": "2 0.5 1.25",
    "DimSize": "4 5 6",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def save(path, array, change=(), *, data=None):
    """Write a file whose fields differ from those above by `change`; a field of None is left out."""
    fields = FIELDS | dict(change)
    last = fields.pop("ElementDataFile")
    lines = [f"{name} = {value}" for name, value in fields.items() if value is not None]
    text = "\n".join([*lines, f"ElementDataFile = {last}\n"])
    path.write_bytes(text.encode() + (array.tobytes(order="F") if data is None else data))
    return path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("MET_CHAR", "i1"), ("MET_UCHAR", "u1"), ("MET_SHORT", "i2"), ("MET_USHORT", "u2"), ("MET_UINT", "u4")],
        *[("MET_LONG_LONG", "i8"), ("MET_FLOAT", "f4"), ("MET_DOUBLE", "f8")],
    ],
)
def test_every_type_reads_as_in_simpleitk(tmp_path, values, packed, order, name, kind):
    data = (values // 8).astype(np.dtype(kind).newbyteorder(order)).tobytes(order="F")
    data = zlib.compress(data) if packed else data
    change = {"ElementType": name, "BinaryDataByteOrderMSB": order == ">"}
    if packed:
        change |= {"CompressedData": "True", "CompressedDataSize": len(data)}
    path = save(tmp_path / "a.mha", values, change, data=data)
    assert_like_simpleitk(path)
    assert np.array_equal(load(path).affine.numpy(), AFFINE)


@pytest.mark.parametrize("name", ["voxels.raw", "below/voxels.raw"])
def test_voxels_may_lie_in_a_file_beside_or_below(tmp_path, values, name):
    (tmp_path / "below").mkdir()
    (tmp_path / name).write_bytes(b"skipped" + values.tobytes(order="F"))
    for skip in (7, -1):
        change = {"ElementDataFile": name, "HeaderSize": skip}
        assert_like_simpleitk(save(tmp_path / "a.mhd", values, change, data=b""))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("../outside.raw", "expected a file in its own folder or below"),
        ("/etc/hostname", "expected a file in its own folder or below"),
        ("missing.raw", "is missing"),
        ("LIST", "is missing"),
        ("a%02d.raw 1 3 1", "is missing"),
        ("a.mhd", "names itself"),
    ],
)
def test_other_files_of_voxels_are_refused(tmp_path, values, name, part):
    (tmp_path / "in").mkdir()
    (tmp_path / "outside.raw").write_bytes(values.tobytes())
    path = save(tmp_path / "in" / "a.mhd", values, {"ElementDataFile": name}, data=b"")
    assert_refused(path, part)


@pytest.mark.parametrize(
    "change",
    [
        {"TransformMatrix": None, "Rotation": FIELDS["TransformMatrix"]},
        {"TransformMatrix": None, "Orientation": FIELDS["TransformMatrix"]},
        {"Offset": None, "Position": FIELDS["Offset"]},
        {"Offset": None, "Origin": FIELDS["Offset"]},
        {"ElementSpacing": None, "ElementSize": FIELDS["ElementSpacing"]},
        {"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "False"},
        {"AnatomicalOrientation": "LPS"},
        {"Offset": None},
        {"Position": "50 60 70"},
        {"Origin": "50 60 70"},
        {"Position": "1 2 3", "Origin": "50 60 70"},
        {"Orientation": "1 0 0 0 1 0 0 0 1", "Rotation": "0 0 1 0 1 0 1 0 0", "ElementSize": "9 9 9"},
        {"TransformMatrix": None, "Orientation": "1 0 0 0 1 0 0 0 1", "Rotation": FIELDS["TransformMatrix"]},
    ],
)
def test_other_spellings_mean_what_they_mean_to_simpleitk_and_the_mask_lies_there(tmp_path, values, change):
    path = save(tmp_path / "a.mha", values, change)
    assert_like_simpleitk(path)
    write_mask(values > 0, tmp_path / "m.mha", like=path)
    (_, image), (_, mask) = simpleitk(path), simpleitk(tmp_path / "m.mha")
    assert mask.GetOrigin() == image.GetOrigin()
    assert mask.GetDirection() == image.GetDirection()
    assert mask.GetSpacing() == image.GetSpacing()


def test_values_side_by_side_are_channels_only_if_asked_for(tmp_path, values):
    stack = np.stack([values, -values])
    path = save(tmp_path / "a.mha", stack, {"ElementNumberOfChannels": 2})
    assert np.array_equal(load(path, channels=2).numpy(), stack)
    assert np.array_equal(load(path, index=1)[0].numpy(), -values)
    assert np.array_equal(simpleitk(path)[0].transpose(3, 2, 1, 0), stack)
    with pytest.raises(CaseError, match="2 values per voxel"):
        load(path)


def test_a_fourth_axis_is_a_series_and_masks_of_it_are_volumes(tmp_path, values):
    stack = np.stack([values, -values, values // 2], axis=-1)
    series = SimpleITK.GetImageFromArray(stack.T, isVector=False)
    series.SetSpacing((2, 0.5, 1.25, 3))
    series.SetOrigin((-7.5, 3, 9.125, 1))
    turn = np.eye(4)
    turn[:2, :2] = [[0, -1], [1, 0]]
    series.SetDirection(turn.ravel().tolist())
    path = tmp_path / "a.mha"
    SimpleITK.WriteImage(series, str(path))
    assert np.array_equal(load(path, index=2)[0].numpy(), values // 2)
    assert np.array_equal(load(path, channels=3).numpy(), np.moveaxis(stack, -1, 0))
    assert np.array_equal(read_grid(path).affine, AFFINE)
    with pytest.raises(CaseError, match="3 values per voxel"):
        load(path)
    write_mask(values > 0, tmp_path / "m.mha", like=path)
    found, image = simpleitk(tmp_path / "m.mha")
    assert np.array_equal(found.T, values > 0)
    assert image.GetOrigin() == (-7.5, 3, 9.125)
    assert np.array_equal(read_grid(tmp_path / "m.mha").affine, AFFINE)


def test_the_mask_copies_the_text_of_the_place_and_nothing_else(tmp_path, values):
    change = {"Offset": "-7.50 3.0  9.125", "Comment": "Jane Doe", "PatientID": "1970"}
    path = save(tmp_path / "a.mha", values, change)
    write_mask(values > 0, tmp_path / "m.mha", like=path)
    text = (tmp_path / "m.mha").read_bytes().partition(b"LOCAL")[0].decode()
    for line in ("TransformMatrix = 0 1 0 -1 0 0 0 0 1", "Offset = -7.50 3.0 9.125", "ElementSpacing = 2 0.5 1.25"):
        assert f"{line}\n" in text
    assert "Jane" not in text
    assert "1970" not in text


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"TransformMatrix": None}, GeometryError, "no TransformMatrix"),
        ({"ElementSpacing": None}, GeometryError, "no ElementSpacing"),
        ({"DistanceUnits": "um"}, GeometryError, "DistanceUnits 'um'"),
        ({"TransformMatrix": "1 0 0 0.5 1 0 0 0 1"}, GeometryError, "sheared"),
        ({"TransformMatrix": "1 0 0 0 nan 0 0 0 1"}, GeometryError, "non-finite"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, GeometryError, "singular"),
        ({"TransformMatrix": "1 0 0 1"}, CaseError, "expected 9 numbers"),
        ({"TransformMatrix": "1 0 0 0 x 0 0 0 1"}, CaseError, "expected 9 numbers"),
        ({"Offset": "1 2"}, CaseError, "expected 3 numbers"),
        ({"ElementSpacing": "0 1 1"}, GeometryError, "spacing of 0 mm"),
        ({"ElementSpacing": "1e400 1 1"}, GeometryError, "non-finite"),
        ({"NDims": "2"}, CaseError, "2 axes"),
        ({"NDims": "x"}, CaseError, "NDims is 'x'"),
        ({"ObjectType": "Mesh"}, CaseError, "MetaIO Mesh"),
        ({"BinaryData": "False"}, CaseError, "text voxels"),
        ({"DimSize": "4 5 0"}, GeometryError, "(4, 5, 0"),
        ({"DimSize": "4 5 -6"}, CaseError, "DimSize is '4 5 -6'"),
        ({"DimSize": "4 5 6.5"}, CaseError, "DimSize is '4 5 6.5'"),
        ({"DimSize": "40000 50000 60000"}, GeometryError, "the limit is"),
        ({"ElementNumberOfChannels": "99999999999"}, GeometryError, "the limit is"),
        ({"ElementNumberOfChannels": "0"}, GeometryError, "(4, 5, 6, 0)"),
        ({"DimSize": "400 500 600"}, CaseError, "240,000,000 bytes"),
        ({"DimSize": "400 500 600", "CompressedData": "True"}, CaseError, "(compressed)"),
        ({"CompressedData": "True"}, CaseError, "is damaged"),
        ({"ElementType": "MET_LONG"}, CaseError, "ElementType 'MET_LONG'"),
        ({"ElementType": "MET_ASCII_CHAR"}, CaseError, "ElementType 'MET_ASCII_CHAR'"),
        ({"ElementToIntensityFunctionSlope": "2"}, CaseError, "ElementToIntensityFunction"),
        ({"dimsize": "4 5 6", "DimSize": None}, CaseError, "has no DimSize"),
    ],
)
def test_wrong_headers_are_refused_with_file_and_reason(tmp_path, values, change, error, part):
    path = save(tmp_path / "a.mha", values, change)
    assert_refused(path, part, error)


def test_a_fourth_axis_that_mixes_with_space_is_refused(tmp_path, values):
    change = {"NDims": 4, "DimSize": "4 5 6 1", "ElementSpacing": "1 1 1 1", "Offset": "0 0 0 0"}
    path = save(tmp_path / "a.mha", values, change | {"TransformMatrix": "1 0 0 0 0 1 0 0 0 0 1 0.5 0 0 0 1"})
    with pytest.raises(GeometryError, match="fourth axis that is not independent"):
        load(path)


def test_a_negative_header_size_is_refused(tmp_path, values):
    (tmp_path / "a.raw").write_bytes(values.tobytes())
    path = save(tmp_path / "a.mhd", values, {"ElementDataFile": "a.raw", "HeaderSize": -5}, data=b"")
    with pytest.raises(CaseError, match="HeaderSize -5"):
        load(path)


@pytest.mark.parametrize(
    "content", [b"NRRD0004\n", b"\x1f\x8b\x08", b"NDims = 3\n", b"x" * (2 << 20), b"A = 1\nA = 2\n"]
)
def test_what_is_no_metaimage_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.mha").write_bytes(content)
    for read in (load, read_grid):
        with pytest.raises(CaseError, match=r"a\.mha is not a MetaImage"):
            read(tmp_path / "a.mha")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("packed", [True, False])
def test_files_cut_short_are_refused_by_name(tmp_path, values, packed, keep):
    data = values.tobytes(order="F")
    data = zlib.compress(data) if packed else data
    path = save(tmp_path / "a.mha", values, {"CompressedData": packed}, data=data[: int(len(data) * keep)])
    assert_refused(path, "truncated")


def test_a_wrong_checksum_is_refused(tmp_path, values):
    data = bytearray(zlib.compress(values.tobytes(order="F")))
    data[-2] ^= 1
    path = save(tmp_path / "a.mha", values, {"CompressedData": "True"}, data=bytes(data))
    with pytest.raises(CaseError, match="is damaged"):
        load(path)


def test_a_missing_origin_is_assumed_with_a_warning(tmp_path, values, assert_warns):
    path = save(tmp_path / "a.mha", values, {"Offset": None})
    assert np.array_equal(read_grid(path).affine[:3, 3], [0, 0, 0])
    assert_warns(lambda: load(path), "origin-assumed")
