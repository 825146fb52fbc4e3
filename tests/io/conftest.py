"""Volumes and DICOM slides with known contents, and what SimpleITK says of a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage

from medseg.errors import CaseError
from medseg.io import load

# Of 4 x 5 x 6 voxels whose first two axes are exchanged, one of them turned around.
AFFINE = np.array([[0, 0.5, 0, 7.5], [-2, 0, 0, -3], [0, 0, 1.25, 9.125], [0, 0, 0, 1]])


@pytest.fixture
def values() -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(-900, 900, (4, 5, 6)).astype(np.int16)


def simpleitk(path: Path) -> tuple[NDArray[Any], SimpleITK.Image]:
    """Return the voxels, slowest axis first, and the image of SimpleITK."""
    image = SimpleITK.ReadImage(str(path))
    return SimpleITK.GetArrayFromImage(image), image


def assert_like_simpleitk(path: Path) -> None:
    """Check that a file of `values` has the voxels and places that SimpleITK sees."""
    image, (array, reference) = load(path), simpleitk(path)
    assert np.array_equal(image[0].numpy(), array.T.astype(np.float32))
    for index in [(0, 0, 0), (3, 4, 5), (1, 2, 3)]:
        x, y, z = reference.TransformIndexToPhysicalPoint(index)
        assert np.allclose(image.affine.numpy() @ (*index, 1), (-x, -y, z, 1))


def assert_refused(path: Path, part: str, error: type[CaseError] = CaseError) -> None:
    """Check that loading a file ends in an error that names it and says `part`."""
    with pytest.raises(error) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)


def write_dicom_slide(
    path: Path,
    pixels: NDArray[np.uint8],
    *,
    mpp: float = 0.5,
    tile: int = 64,
    series: str = "1.2.3",
    number: int = 0,
    flavor: str = "VOLUME",
    jpeg: bool = False,
) -> Path:
    """Write `(y, x, 3)` as one file of a DICOM slide, tiled; uncompressed or as JPEG with a table of frames.

    Args:
        path: the file.
        pixels: of one level, or of what else `flavor` says.
        mpp: micrometers per pixel.
        tile: side of a tile.
        series: UID that the files of one slide share.
        number: tells the files of a series apart; 0 is the finest level.
        flavor: "VOLUME", "LABEL", "OVERVIEW" or "THUMBNAIL".
        jpeg: compress.
    """
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % tile), (0, -width % tile), (0, 0)))
    tiles = padded.reshape(padded.shape[0] // tile, tile, padded.shape[1] // tile, tile, 3).swapaxes(1, 2)
    dataset = Dataset()
    dataset.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    dataset.SOPInstanceUID = f"{series}.{number + 1}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2", series, f"{series}.9"
    dataset.Modality = "SM"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", flavor, "RESAMPLED" if number and flavor == "VOLUME" else "NONE"]
    dataset.Rows = dataset.Columns = tile
    dataset.NumberOfFrames = tiles.shape[0] * tiles.shape[1]
    dataset.TotalPixelMatrixColumns, dataset.TotalPixelMatrixRows = width, height
    dataset.DimensionOrganizationType = "TILED_FULL"
    dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
    dataset.PhotometricInterpretation = "YBR_FULL_422" if jpeg else "RGB"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    measures, groups, optics = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    groups.PixelMeasuresSequence = [measures]
    optics.OpticalPathIdentifier = "1"
    dataset.SharedFunctionalGroupsSequence, dataset.OpticalPathSequence = [groups], [optics]
    frames = [_jpeg_bytes(frame) for frame in tiles.reshape(-1, tile, tile, 3)] if jpeg else []
    dataset.add_new("PixelData", "OB", encapsulate(frames) if jpeg else tiles.tobytes())
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def _jpeg_bytes(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()
