import bz2
import gzip

import numpy as np
import pytest
import SimpleITK
import torch

from medseg.errors import CaseError, GeometryError
from medseg.io import load, read_grid, write_mask
from tests.io.conftest import AFFINE, assert_like_simpleitk, assert_refused, simpleitk

FIELDS = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "4 5 6",
    "space directions": "(0,2,0) (-0.5,0,0) (0,0,1.25)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(-7.5,3,9.125)",
}


def header(change, extra=""):
    """Return a header; a field of None is left out."""
    lines = [f"{name}: {value}" for name, value in (FIELDS | change).items() if value is not None]
    return ("NRRD0004\n# a comment\n" + "\n".join(lines) + f"\n{extra}\n").encode()


def save(path, array, change=(), *, extra="", data=None):
    """Write a file whose fields differ from those above by `change`."""
    path.write_bytes(header(dict(change), extra) + (array.tobytes(order="F") if data is None else data))
    return path


@pytest.mark.parametrize(("encoding", "pack"), [("raw", bytes), ("gzip", gzip.compress), ("gz", gzip.compress)])
@pytest.mark.parametrize(("endian", "order"), [("little", "<"), ("big", ">")])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("signed char", "i1"), ("uchar", "u1"), ("short", "i2"), ("unsigned short", "u2"), ("uint32", "u4")],
        *[("long long int", "i8"), ("float", "f4"), ("double", "f8")],
    ],
)
def test_every_type_in_every_coding_reads_as_in_simpleitk(tmp_path, values, encoding, pack, endian, order, name, kind):
    stored = (values // 8).astype(np.dtype(kind).newbyteorder(order))
    change = {"type": name, "endian": endian, "encoding": encoding}
    path = save(tmp_path / "a.nrrd", stored, change, data=pack(stored.tobytes(order="F")))
    assert_like_simpleitk(path)
    assert np.array_equal(load(path).affine.numpy(), AFFINE)


def test_bzip2_is_unpacked(tmp_path, values):
    data = bz2.compress(values.tobytes(order="F"))
    path = save(tmp_path / "a.nrrd", values, {"encoding": "bzip2"}, data=data)
    assert np.array_equal(load(path)[0].numpy(), values)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CaseError, match="is damaged or truncated"):
        load(path)


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1, 1)),
        ("LPS", (-1, -1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("RAS", (1, 1, 1)),
        ("Left-Anterior-Superior", (-1, 1, 1)),
        ("LAS", (-1, 1, 1)),
    ],
)
def test_spaces_become_ras_as_in_simpleitk(tmp_path, values, space, signs):
    path = save(tmp_path / "a.nrrd", values, {"space": space})
    assert_like_simpleitk(path)
    assert np.array_equal(read_grid(path).affine[:3, 3], np.array([-7.5, 3, 9.125]) * signs)


@pytest.mark.parametrize("name", ["voxels.raw", "below/voxels.raw", "./voxels.raw"])
@pytest.mark.parametrize("field", ["data file", "datafile"])
@pytest.mark.parametrize("packed", [True, False])
def test_voxels_may_lie_in_a_file_beside_or_below(tmp_path, values, name, field, packed):
    (tmp_path / "below").mkdir()
    data = values.tobytes(order="F")
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    change = {field: name, "encoding": "gzip" if packed else "raw"}
    path = save(tmp_path / "a.nhdr", values, change, data=b"")
    assert_like_simpleitk(path)
    path.write_bytes(path.read_bytes().rstrip() + b"\n")  # the empty line at the end may be missing
    assert np.array_equal(load(path)[0].numpy(), values)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("../outside.raw", "expected a file in its own folder or below"),
        ("/etc/hostname", "expected a file in its own folder or below"),
        ("link.raw", "expected a file in its own folder or below"),
        ("missing.raw", "is missing"),
        (".", "is missing"),
        ("LIST", "is missing"),
        ("a%02d.raw 1 3 1", "is missing"),
        ("a.nhdr", "names itself"),
    ],
)
def test_other_files_of_voxels_are_refused(tmp_path, values, name, part):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "outside.raw").write_bytes(values.tobytes())
    (folder / "link.raw").symlink_to(tmp_path / "outside.raw")
    path = save(folder / "a.nhdr", values, {"data file": name}, data=b"")
    assert_refused(path, part)


@pytest.mark.parametrize(("encoding", "skip"), [("raw", 7), ("raw", -1), ("gzip", 7)])
def test_bytes_are_skipped_as_in_simpleitk(tmp_path, values, encoding, skip):
    data = b"skipped" + values.tobytes(order="F")
    change = {"encoding": encoding, "byte skip": skip}
    assert_like_simpleitk(
        save(tmp_path / "a.nrrd", values, change, data=gzip.compress(data) if encoding == "gzip" else data)
    )


@pytest.mark.parametrize("first", [True, False])
def test_a_fourth_axis_is_channels_or_a_series_only_if_asked_for(tmp_path, values, first):
    stack = np.stack([values, -values, values // 2], axis=0 if first else -1)
    change = {
        "dimension": 4,
        "sizes": "3 4 5 6" if first else "4 5 6 3",
        "space directions": ("none " if first else "") + FIELDS["space directions"] + ("" if first else " none"),
        "kinds": "vector domain domain domain" if first else "domain domain domain list",
    }
    path = save(tmp_path / "a.nrrd", stack, change)
    expected = stack if first else np.moveaxis(stack, -1, 0)
    assert np.array_equal(load(path, channels=3).numpy(), expected)
    assert np.array_equal(load(path, index=1)[0].numpy(), -values)
    assert np.array_equal(simpleitk(path)[0].transpose(3, 2, 1, 0), expected)
    with pytest.raises(CaseError, match="3 values per voxel"):
        load(path)
    with pytest.raises(CaseError, match="index 3 is out of range, the last volume is 2"):
        load(path, index=3)
    mask = (values > 0).astype(int)
    write_mask(mask, tmp_path / "m.nrrd", like=path)
    found, image = simpleitk(tmp_path / "m.nrrd")
    assert np.array_equal(found.T, mask)
    assert image.GetDirection() == simpleitk(path)[1].GetDirection()


def test_segmentations_of_slicer_are_labels(tmp_path):
    labels = np.arange(120).reshape(4, 5, 6) % 3
    extra = "Segment0_ID:=Segment_1\nSegment0_LabelValue:=1\nSegment0_Name:=liver: left\nSegmentation_x:=\n"
    path = save(tmp_path / "a.seg.nrrd", labels.astype(np.uint8), {"type": "unsigned char"}, extra=extra)
    assert np.array_equal(load(path, label=True)[0].numpy(), labels)
    assert load(path, label=True).dtype == torch.int32


def test_keys_of_the_writer_may_hold_colons_as_those_of_simpleitk_do(tmp_path, values):
    image = simpleitk(save(tmp_path / "a.nrrd", values))[1]
    for key in ("dicom:0010,0010", "dicom:0010,0020", "type", "sizes:x"):
        image.SetMetaData(key, "9: 9")
    SimpleITK.WriteImage(image, str(tmp_path / "b.nrrd"))
    assert b"\ndicom:0010,0020:=9: 9\n" in (tmp_path / "b.nrrd").read_bytes()
    assert_like_simpleitk(tmp_path / "b.nrrd")


def test_the_mask_copies_the_text_of_the_place_and_nothing_else(tmp_path, values):
    change = {"space origin": "(-7.50, 3.0,  9.125)", "space units": '"mm" "mm" "mm"', "content": "Jane Doe"}
    path = save(tmp_path / "a.nrrd", values, change, extra="Patient:=Jane\n")
    write_mask(values > 0, tmp_path / "m.nrrd", like=path)
    text = (tmp_path / "m.nrrd").read_bytes().partition(b"\n\n")[0].decode()
    for name in ("space", "space directions", "space origin", "space units"):
        assert f"{name}: {(FIELDS | change)[name]}\n" in f"{text}\n"
    assert "Jane" not in text


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"space": None}, GeometryError, "no 'space'"),
        ({"space": None, "space dimension": 3}, GeometryError, "no 'space'"),
        ({"space directions": None, "spacings": "1 1 1"}, GeometryError, "no 'space directions'"),
        ({"space": "scanner-xyz"}, GeometryError, "has no valid orientation"),
        ({"space": "left-anterior-superior-time"}, GeometryError, "has no valid orientation"),
        ({"space units": '"cm" "cm" "cm"'}, GeometryError, "expected mm"),
        ({"space directions": "(1,0,0) (0.5,1,0) (0,0,1)"}, GeometryError, "sheared"),
        ({"space directions": "(1,0,0) (0,nan,0) (0,0,1)"}, GeometryError, "non-finite"),
        ({"space directions": "(1,0,0) (0,1e400,0) (0,0,1)"}, GeometryError, "non-finite"),
        ({"space directions": "(1,0,0) (0,0,0) (0,0,1)"}, GeometryError, "spacing of 0 mm"),
        ({"space directions": "(1,0) (0,1) (0,0)"}, GeometryError, "expected three numbers"),
        ({"space directions": "(1,0,0) (0,x,0) (0,0,1)"}, GeometryError, "expected three numbers"),
        ({"space directions": "(1,0,0) (0,1,0)"}, CaseError, "do not match"),
        ({"space directions": "(1,0,0) none (0,0,1)"}, CaseError, "2 spatial axes"),
        ({"space origin": "(1,2)"}, GeometryError, "expected three numbers"),
        ({"dimension": 4}, CaseError, "do not match"),
        ({"sizes": "4 5 0"}, GeometryError, "(4, 5, 0)"),
        ({"sizes": "4 5 -6"}, GeometryError, "(4, 5, -6)"),
        ({"sizes": "4 5 6.5"}, CaseError, "'sizes' is '4 5 6.5'"),
        ({"sizes": "4 5 99999999999999999999"}, CaseError, "'sizes' is"),
        ({"sizes": "40000 50000 60000"}, GeometryError, "the limit is"),
        ({"sizes": "400 500 600"}, CaseError, "240,000,000 bytes"),
        ({"sizes": "400 500 600", "encoding": "gzip"}, CaseError, "(compressed)"),
        ({"sizes": None}, CaseError, "has no 'sizes'"),
        ({"type": "block"}, CaseError, "type 'block'"),
        ({"endian": None}, CaseError, "has no 'endian'"),
        ({"endian": "middle"}, CaseError, "byte order 'middle'"),
        ({"encoding": "ascii"}, CaseError, "encoding 'ascii'"),
        ({"encoding": "hex"}, CaseError, "encoding 'hex'"),
        ({"line skip": 2}, CaseError, "'line skip' of 2"),
        ({"byte skip": -2}, CaseError, "'byte skip' is -2"),
        ({"byte skip": 10**12}, CaseError, "is truncated"),
        ({"encoding": "gzip", "byte skip": -1}, CaseError, "'byte skip' is -1"),
        ({"encoding": "bzip2", "byte skip": 10**12}, CaseError, "'byte skip' is 1000000000000"),
        ({"Sizes": "4 5 6"}, CaseError, "duplicate field 'Sizes"),
        ({"encoding": "gzip"}, CaseError, "cannot be read"),
        ({"encoding": "bzip2"}, CaseError, "cannot be read"),
    ],
)
def test_wrong_headers_are_refused_with_file_and_reason(tmp_path, values, change, error, part):
    path = save(tmp_path / "a.nrrd", values, change)
    assert_refused(path, part, error)


@pytest.mark.parametrize(
    "content",
    [b"NRRD0009\n", b"NRRD", b"\x1f\x8b\x08", b"NRRD0004\nno colon\n", b"NRRD0004\n" + b"x" * (5 << 20)],
    ids=["version", "short", "gzip", "line", "long"],
)
def test_what_is_no_nrrd_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.nrrd").write_bytes(content)
    for read in (load, read_grid):
        with pytest.raises(CaseError, match=r"a\.nrrd"):
            read(tmp_path / "a.nrrd")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_files_cut_short_are_refused_by_name(tmp_path, values, encoding, keep):
    data = values.tobytes(order="F")
    data = gzip.compress(data) if encoding == "gzip" else data
    path = save(tmp_path / "a.nrrd", values, {"encoding": encoding}, data=data[: int(len(data) * keep)])
    assert_refused(path, "truncated")


def test_a_missing_origin_is_assumed_with_a_warning(tmp_path, values, assert_warns):
    path = save(tmp_path / "a.nrrd", values, {"space origin": None})
    assert np.array_equal(read_grid(path).affine[:3, 3], [0, 0, 0])
    assert_warns(lambda: load(path), "origin-assumed")
