import gzip
import struct

import nibabel as nib
import numpy as np
import pytest

from medseg.errors import CaseError, GeometryError
from medseg.io import load, read_grid, write_mask
from tests.io.conftest import AFFINE, assert_refused

# First byte and length of goodRASFlag, delta, Mdc and Pxyz_c.
PLACE = (28, 62)


def save(path, array, *, change=()):
    """Write with nibabel; `change` holds (first byte, bytes) to poke into the header."""
    data = bytearray(nib.MGHImage(array, AFFINE).to_bytes())
    for start, piece in change:
        data[start : start + len(piece)] = piece
    path.write_bytes(gzip.compress(bytes(data), mtime=0) if path.suffix == ".mgz" else bytes(data))
    return path


def plain(path):
    return gzip.decompress(path.read_bytes()) if path.suffix == ".mgz" else path.read_bytes()


@pytest.mark.parametrize("suffix", [".mgh", ".mgz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_values_and_place_are_those_of_nibabel(tmp_path, values, suffix, dtype):
    path = save(tmp_path / f"a{suffix}", np.abs(values).astype(dtype))
    image, reference = load(path), nib.MGHImage.from_bytes(plain(path))
    assert np.array_equal(image[0].numpy(), reference.get_fdata(dtype=np.float32))
    assert np.array_equal(image.affine.numpy(), reference.affine)
    assert np.array_equal(image.affine.numpy(), AFFINE)


def test_frames_are_channels_or_a_series_only_if_asked_for(tmp_path, values):
    stack = np.stack([values, -values, values // 2], axis=-1)
    path = save(tmp_path / "a.mgz", stack)
    assert np.array_equal(load(path, channels=3).numpy(), np.moveaxis(stack, -1, 0))
    assert np.array_equal(load(path, index=2)[0].numpy(), values // 2)
    with pytest.raises(CaseError, match="3 values per voxel"):
        load(path)
    write_mask(values > 0, tmp_path / "m.mgz", like=path)
    mask = nib.MGHImage.from_bytes(plain(tmp_path / "m.mgz"))
    assert mask.shape == values.shape
    assert np.array_equal(np.asarray(mask.dataobj), values > 0)


@pytest.mark.parametrize("suffix", [".mgh", ".mgz"])
def test_the_place_is_copied_bit_for_bit_and_nothing_else(tmp_path, values, suffix):
    change = [(30, struct.pack(">f", 2.0000002)), (100, b"Jane Doe")]
    path = save(tmp_path / f"a{suffix}", values, change=change)
    write_mask(values > 0, tmp_path / f"m{suffix}", like=path)
    start, length = PLACE
    before, after = plain(path), plain(tmp_path / f"m{suffix}")
    assert before[start : start + length] == after[start : start + length]
    assert len(after) == 284 + values.size
    assert b"Jane" in before
    assert b"Jane" not in after


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ((28, b"\0\0"), GeometryError, "goodRASFlag is 0"),
        ((30, struct.pack(">f", 0)), GeometryError, "spacing of 0 mm"),
        ((30, struct.pack(">f", float("nan"))), GeometryError, "non-finite"),
        ((30, struct.pack(">f", float("inf"))), GeometryError, "non-finite"),
        ((42, struct.pack(">f", 0.5)), GeometryError, "sheared"),
        ((4, struct.pack(">i", 0)), GeometryError, "(0, 5, 6, 1)"),
        ((4, struct.pack(">i", -4)), GeometryError, "(-4, 5, 6, 1)"),
        ((4, struct.pack(">3i", 40000, 50000, 60000)), GeometryError, "the limit is"),
        ((4, struct.pack(">3i", 400, 500, 600)), CaseError, "240,000,284 bytes"),
        ((20, struct.pack(">i", 2)), CaseError, "MGH type 2"),
        ((0, struct.pack(">i", 2)), CaseError, "version 1"),
    ],
)
@pytest.mark.parametrize("suffix", [".mgh", ".mgz"])
def test_wrong_headers_are_refused_with_file_and_reason(tmp_path, values, suffix, change, error, part):
    path = save(tmp_path / f"a{suffix}", values, change=[change])
    assert_refused(path, part, error)


@pytest.mark.parametrize("suffix", [".mgh", ".mgz"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_files_cut_short_are_refused_by_name(tmp_path, values, suffix, keep):
    path = save(tmp_path / f"a{suffix}", values)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(CaseError, match=rf"a\{suffix}"):
        load(path)


def test_the_center_of_an_odd_volume_is_kept(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 1), np.int16), AFFINE), tmp_path / "a.nii")
    write_mask(np.zeros((3, 4, 1)), tmp_path / "m.mgh", like=tmp_path / "a.nii")
    assert np.allclose(read_grid(tmp_path / "m.mgh").affine, AFFINE)
    assert np.allclose(nib.MGHImage.from_bytes(plain(tmp_path / "m.mgh")).affine, AFFINE)
