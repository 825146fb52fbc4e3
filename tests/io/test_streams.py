import gzip
import io

import numpy as np
import pytest

from medseg.io import load, streams, write_mask
from medseg.io.streams import Voxels, gzip_writer, read_voxels, write_voxels
from medseg.io.voxels import ReadOptions


def read(data, voxels, **options):
    return read_voxels(io.BytesIO(data), voxels, "a.raw", ReadOptions(**options))


@pytest.mark.parametrize("slab", [1, 600, 1 << 20])
@pytest.mark.parametrize("shape", [(7, 50), (7, 5, 11), (64, 40, 5)])
@pytest.mark.parametrize("vector", [1, 3])
def test_slabs_of_any_size_join_without_a_seam(monkeypatch, slab, shape, vector):
    monkeypatch.setattr(streams, "_SLAB_BYTES", slab)
    stored = np.random.default_rng(0).integers(-900, 900, (vector, *shape)).astype(">i2")
    voxels = Voxels(shape, stored.dtype, vector=vector)
    found = read(stored.tobytes(order="F"), voxels, channels=vector)
    assert found.flags.c_contiguous
    assert np.array_equal(found, stored)
    sink = io.BytesIO()
    write_voxels(sink, stored, stored.dtype)
    assert sink.getvalue() == stored.tobytes(order="F")


def test_reading_stops_at_an_error_in_the_middle(monkeypatch):
    monkeypatch.setattr(streams, "_SLAB_BYTES", 100)
    values = np.zeros((5, 5, 50), np.float32)
    values[0, 0, 25] = np.nan
    with pytest.raises(Exception, match="NaN"):
        read(values.tobytes(order="F"), Voxels(values.shape, values.dtype), label=True)


def test_any_program_unpacks_what_is_packed_and_the_same_content_gives_the_same_bytes():
    content = np.arange(100_000).tobytes()
    packed = []
    for pieces in (1, 7):
        stream = io.BytesIO()
        with gzip_writer(stream) as writer:
            for start in range(0, len(content), len(content) // pieces):
                writer.write(content[start : start + len(content) // pieces])
        packed.append(stream.getvalue())
        assert gzip.decompress(stream.getvalue()) == content
    assert packed[0] == packed[1]
    assert packed[0][3:8] == b"\0\0\0\0\0"  # no name, no time


def test_packed_data_in_several_members_are_read_to_the_end(tmp_path):
    import nibabel as nib

    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), tmp_path / "a.nii")
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data[:390]) + gzip.compress(data[390:]))
    assert np.array_equal(load(tmp_path / "b.nii.gz")[0].numpy(), np.arange(60).reshape(3, 4, 5))
    write_mask(np.ones((3, 4, 5)), tmp_path / "m.nii.gz", like=tmp_path / "b.nii.gz")
    assert load(tmp_path / "m.nii.gz", label=True).min() == 1
