import logging
import tracemalloc
import zlib

import numpy as np
import pytest
from pydicom import dcmread

from medseg.errors import CaseError, GeometryError, MedsegError
from medseg.io import load, read_grid
from medseg.io.dicom import headers
from medseg.io.dicom.headers import read_headers
from medseg.io.dicom.sources import find_sources

PIXELS = np.arange(20, dtype="int16").reshape(4, 5)


def hostile(slice_of, save_image, path, **changes):
    ds = slice_of(PIXELS)
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = (
        ["0.5", "0.25", "0.125"],
        [1, 0, 0, 0, 1, 0],
        ["0.75", "0.375"],
    )
    save_image(ds, path)
    content = path.read_bytes()
    for old, new in changes.values():
        assert content.count(old) == 1
        content = content.replace(old, new)
    path.write_bytes(content)
    return path


ROWS = b"\x28\x00\x10\x00US\x02\x00\x04\x00"
COLUMNS = b"\x28\x00\x11\x00US\x02\x00\x05\x00"
POSITION = rb"0.5\0.25\0.125"
SAMPLES = b"\x28\x00\x02\x00US\x02\x00\x01\x00"
ALLOCATED = b"\x28\x00\x00\x01US\x02\x00\x10\x00"
STORED = b"\x28\x00\x01\x01US\x02\x00\x10\x00"
SPACING = rb"0.75\0.375"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"a": (ROWS, ROWS[:-2] + b"\xff\xff"), "b": (COLUMNS, COLUMNS[:-2] + b"\xff\xff")}, "truncated"),
        ({"a": (ROWS, ROWS[:-2] + b"\0\0")}, "0 rows"),
        ({"a": (ROWS, ROWS[:6] + b"\0\0")}, "cannot be|cannot be parsed|expected an integer|truncated|no image"),
        ({"a": (SAMPLES, SAMPLES[:-2] + b"\x02\0")}, "2 samples per pixel"),
        ({"a": (ALLOCATED, ALLOCATED[:-2] + b"\x0c\0")}, "BitsAllocated 12"),
        ({"a": (STORED, STORED[:-2] + b"\x11\0")}, "BitsStored 17"),
        ({"a": (STORED, STORED[:-2] + b"\0\0")}, "BitsStored 0"),
        ({"a": (POSITION, rb"nan\0.25\0.125")}, r"ImagePositionPatient is \[nan, 0.25, 0.125\]"),
        ({"a": (POSITION, rb"0.5\0.25\1e999")}, "ImagePositionPatient is"),
        ({"a": (POSITION, rb"0.5\0.25000125")}, "expected 3 finite numbers"),
        ({"a": (POSITION, rb"0,5\0.25\0.125")}, "ImagePositionPatient is not numeric"),
        ({"a": (SPACING, rb"0.00\0.000")}, "PixelSpacing 0 x 0"),
        ({"a": (SPACING, rb"-.75\0.375")}, "PixelSpacing -0.75 x 0.375"),
        ({"a": (SPACING, rb"          ")}, "no PixelSpacing"),
        ({"a": (SPACING, rb"1e5\1e5   ")}, "spacing of 1e"),
    ],
)
def test_hostile_headers_are_refused_with_the_reason(slice_of, save_image, tmp_path, changes, part):
    path = hostile(slice_of, save_image, tmp_path / "a.dcm", **changes)
    for read in (load, read_grid):
        with pytest.raises(CaseError, match=part):
            read(path)


@pytest.mark.parametrize("frames", ["2000000000", "-5", "0", "x", "99999999999999999999"])
def test_a_number_of_frames_that_cannot_be_is_refused_before_memory_is_taken(slice_of, save_image, tmp_path, frames):
    ds = slice_of(PIXELS)
    ds.NumberOfFrames = "7"
    path = save_image(ds, tmp_path / "a.dcm")
    length = len(frames) + len(frames) % 2
    old = b"\x28\x00\x08\x00IS\x02\x007 "
    new = b"\x28\x00\x08\x00IS" + length.to_bytes(2, "little") + frames.encode().ljust(length)
    path.write_bytes(path.read_bytes().replace(old, new))
    tracemalloc.start()
    with pytest.raises(CaseError, match=r"frames|NumberOfFrames|cannot be parsed|truncated"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_compressed_pixels_that_cannot_hold_what_is_claimed_are_refused(slice_of, save_image, tmp_path):
    ds = slice_of(PIXELS)
    ds.Rows = ds.Columns = 40000
    ds.compress = None
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.90"
    ds.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0\x04\0\0\0\xff\x4f\xff\x51\xfe\xff\xdd\xe0\0\0\0\0"
    ds["PixelData"].is_undefined_length = True
    with pytest.raises(CaseError, match="compressed bytes"):
        load(save_image(ds, tmp_path / "a.dcm"))


def test_a_limit_on_voxels_counts_for_series(write_series, tmp_path):
    series = write_series(tmp_path)
    with pytest.raises(GeometryError, match="120 voxels"):
        load(series.folder, max_voxels=119)
    assert load(series.folder, max_voxels=120).numel() == 120


@pytest.mark.parametrize("length", [140, 200, 400, 700, 900])
def test_files_cut_anywhere_are_refused_and_not_left_out_of_their_series(write_series, tmp_path, length):
    series = write_series(tmp_path)
    cut = series.files[-1]
    cut.write_bytes(cut.read_bytes()[:length])
    with pytest.raises(CaseError):
        load(series.folder)


def test_a_mosaic_of_slices_is_refused(write_series, tmp_path):
    def lay_side_by_side(ds, k):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]

    write_series(tmp_path, edit=lay_side_by_side, modality="MR")
    with pytest.raises(CaseError, match="is a mosaic"):
        load(tmp_path)


def test_a_deflated_file_is_read_and_a_bomb_is_refused(slice_of, save_image, tmp_path, monkeypatch):
    ds = slice_of(PIXELS)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    path = save_image(ds, tmp_path / "a.dcm")
    assert np.array_equal(load(path).numpy()[0], PIXELS.T)
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    packer = zlib.compressobj(9, wbits=-15)
    bomb = packer.compress(zlib.decompress(content[start:], -15)) + packer.compress(b"\0" * (8 << 20)) + packer.flush()
    path.write_bytes(content[:start] + bomb)
    monkeypatch.setattr(headers, "_MAX_INFLATED", 4 << 20)
    with pytest.raises(CaseError, match="unpacks to more than"):
        load(path)


def test_a_bomb_behind_a_long_or_wrong_meta_header_is_refused(slice_of, save_image, tmp_path, monkeypatch):
    ds = slice_of(PIXELS)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    ds.file_meta.FileMetaInformationVersion = bytes(3000)
    ds.PixelData += bytes(8 << 20)
    path = save_image(ds, tmp_path / "a.dcm")
    content = bytearray(path.read_bytes())
    monkeypatch.setattr(headers, "_MAX_INFLATED", 4 << 20)
    with pytest.raises(CaseError, match="unpacks to more than"):
        load(path)
    content[140:144] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(CaseError, match="unpacks to more than"):
        load(path)


def test_nothing_of_the_patient_is_in_messages_or_logs(write_series, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    write_series(tmp_path / "a", series_number=1)
    write_series(tmp_path / "b", series_number=2)

    def spoil(ds, k):
        ds.PatientName = "Secret^Name\\bad"
        ds.PixelData = ds.PixelData[: -2 * (k == 1)] if k == 1 else ds.PixelData

    write_series(tmp_path / "c", series_number=3, edit=spoil)
    told = []
    for path in (tmp_path, f"{tmp_path}::3", f"{tmp_path}::9"):
        with pytest.raises(MedsegError) as error:
            load(path)
        told.append(str(error.value))
    assert "1_" in told[0]
    assert not [text for text in (*told, caplog.text) if "Secret" in text]


def test_headers_are_read_once_per_change_of_a_file(write_series, tmp_path, monkeypatch):
    series = write_series(tmp_path)
    first = read_headers(find_sources(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(headers, "read_partial", None)
        assert read_headers(find_sources(tmp_path)) == first
    ds = dcmread(series.files[0])
    ds.Rows, ds.Columns, ds.PixelData = 1, 1, b"\0\0\0\0"
    ds.save_as(series.files[0])
    assert read_headers(find_sources(tmp_path)) != first
