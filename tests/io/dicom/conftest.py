"""Synthetic DICOM series with known values and a known place in space."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "SEG": "1.2.840.10008.5.1.4.1.1.66.4",
    "RTSTRUCT": "1.2.840.10008.5.1.4.1.1.481.3",
}
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
PATIENT = "Secret^Name"
# Of masks, and when the objects made of them say that they were made.
LABELS = {2: "liver", 4: "kidney_left", 7: "something else"}
WHEN = datetime(2024, 5, 6, 7, 8, 9)
DATA = Path(__file__).parents[4] / "shared" / "data"
ABDOMEN = DATA / "ct_abdomen_totalseg" / "dicom"


@dataclass(frozen=True)
class Written:
    """What a series on disk must read as: `values` of shape (columns, rows, slices), stored; `affine` to RAS+ mm."""

    folder: Path
    files: list[Path]
    values: NDArray[Any]
    affine: NDArray[np.float64]
    uid: str


def number(value: float) -> str:
    """Return a decimal string of at most 16 characters."""
    for digits in range(15, 5, -1):
        text = f"{value:.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(value)


def rotation(angles: Sequence[float]) -> NDArray[np.float64]:
    a, b, c = angles
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return z @ y @ x


def image(pixels: NDArray[Any], *, modality: str = "CT", series_uid: str = "", number_: int = 3) -> Dataset:
    """Return a data set of one grey slice `(rows, columns)` without a place."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = CLASSES[modality], generate_uid()
    ds.PatientName, ds.PatientID = PATIENT, "Secret-4711"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", series_uid or generate_uid()
    ds.FrameOfReferenceUID = "1.2.3.4"
    ds.Modality, ds.SeriesNumber, ds.InstanceNumber = modality, number_, 1
    ds.SeriesDescription = f"of {PATIENT}"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape[:2]
    bits = pixels.dtype.itemsize * 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    return ds


def save(ds: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(ds.PixelData) % 2:
        ds.PixelData += b"\0"
    dcmwrite(path, ds, enforce_file_format=True)
    return path


@pytest.fixture(scope="session")  # functions only, so that hypothesis takes them
def slice_of() -> Callable[..., Dataset]:
    return image


@pytest.fixture(scope="session")  # functions only, so that hypothesis takes them
def save_image() -> Callable[[Dataset, Path], Path]:
    return save


@pytest.fixture(scope="session")  # functions only, so that hypothesis takes them
def write_series() -> Callable[..., Written]:
    return make_series


def make_series(
    folder: Path,
    *,
    shape: tuple[int, int, int] = (6, 5, 4),
    spacing: tuple[float, float, float] = (0.7, 0.9, 2.5),
    angles: Sequence[float] = (0.3, -0.2, 0.5),
    origin: Sequence[float] = (-80.0, 33.0, 120.5),
    dtype: str = "int16",
    modality: str = "CT",
    seed: int = 0,
    shear: Sequence[float] = (0.0, 0.0),
    uid: str = "",
    series_number: int = 3,
    edit: Callable[[Dataset, int], None] | None = None,
    name: str = "IM{:03d}",
) -> Written:
    """Write a series whose file names and instance numbers say nothing about the order of its slices.

    `shear` shifts each slice against the one before, in mm along rows and columns. `edit` changes slice k before it is
    written.
    """
    rng = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    values = rng.integers(max(limits.min, -1000), min(limits.max, 3000), shape, dtype=dtype)
    turned = rotation(angles)
    step = turned @ [shear[0], shear[1], spacing[2]]
    uid = uid or generate_uid()
    order = list(range(shape[2]))
    random.Random(seed).shuffle(order)
    files = []
    for k in range(shape[2]):
        ds = image(np.ascontiguousarray(values[:, :, k].T), modality=modality, series_uid=uid, number_=series_number)
        ds.ImageOrientationPatient = [number(v) for v in (*turned[:, 0], *turned[:, 1])]
        ds.ImagePositionPatient = [number(v) for v in np.asarray(origin) + k * step]
        ds.PixelSpacing = [number(spacing[1]), number(spacing[0])]
        ds.SliceThickness = "99"  # never a distance
        ds.SliceLocation = str(-k * 7)
        ds.InstanceNumber = order[k] + 1
        if edit:
            edit(ds, k)
        files.append(save(ds, folder / name.format(order[k])))
    affine = np.eye(4)
    affine[:3, :3] = turned * spacing
    affine[:3, 2], affine[:3, 3] = step, origin
    return Written(folder, files, values, LPS @ affine, uid)


@pytest.fixture(scope="session")  # functions only, so that hypothesis takes them
def write_enhanced() -> Callable[..., Written]:
    return make_enhanced


def make_enhanced(
    path: Path,
    *,
    shape: tuple[int, int, int] = (6, 5, 4),
    times: int = 1,
    shared: bool = True,
    edit: Callable[[Dataset], None] | None = None,
) -> Written:
    """Write an enhanced MR file, its frames in reverse order; `values` are of the first time, rescaled by frame."""
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 4000, (times, *shape), dtype="uint16")
    turned, spacing, origin = rotation((0.1, 0.7, -0.4)), (1.5, 1.25, 3.0), np.array([10.0, -20.0, 30.0])
    frames, groups = [], []
    for time in range(times):
        for k in reversed(range(shape[2])):
            frames.append(stored[time, :, :, k].T)
            group = Dataset()
            group.PlanePositionSequence = Items([Dataset()])
            group.PlanePositionSequence[0].ImagePositionPatient = [
                number(v) for v in origin + k * spacing[2] * turned[:, 2]
            ]
            group.PixelValueTransformationSequence = Items([Dataset()])
            group.PixelValueTransformationSequence[0].RescaleSlope = str(k + 1)
            group.PixelValueTransformationSequence[0].RescaleIntercept = "-5"
            group.FrameContentSequence = Items([Dataset()])
            group.FrameContentSequence[0].TemporalPositionIndex = time + 1
            groups.append(group)
    common = Dataset()
    common.PlaneOrientationSequence = Items([Dataset()])
    common.PlaneOrientationSequence[0].ImageOrientationPatient = [number(v) for v in (*turned[:, 0], *turned[:, 1])]
    common.PixelMeasuresSequence = Items([Dataset()])
    common.PixelMeasuresSequence[0].PixelSpacing = [number(spacing[1]), number(spacing[0])]
    common.PixelMeasuresSequence[0].SliceThickness = "99"
    ds = image(np.stack(frames)[0], modality="MR")
    ds.SOPClassUID, ds.NumberOfFrames, ds.PixelData = ENHANCED_MR, len(frames), np.stack(frames).tobytes()
    ds.PixelSpacing = ["9", "9"]  # must not count
    if shared:
        ds.SharedFunctionalGroupsSequence = Items([common])
    else:
        for group in groups:
            group.update(common)
    ds.PerFrameFunctionalGroupsSequence = Items(groups)
    if edit:
        edit(ds)
    save(ds, path)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turned * spacing, origin
    values = stored[0] * (np.arange(shape[2]) + 1.0) - 5
    return Written(path.parent, [path], values, LPS @ affine, ds.SeriesInstanceUID)


def random_mask(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.int64]:
    """Return random values of `LABELS` and 0, with an empty first slice."""
    mask = np.random.default_rng(seed).choice([0, 0, 2, 4, 7], shape)
    mask[:, :, 0] = 0
    return mask


def edited(path: Path, change: Callable[[Dataset], None]) -> Path:
    """Write a changed copy of a DICOM file beside it."""
    dataset = dcmread(path)
    change(dataset)
    target = path.with_name("edited.dcm")
    dataset.save_as(target, enforce_file_format=True)
    return target


def written_by_highdicom(source: Any, path: Path, pixels: NDArray[Any], kind: str, names: Any, **options: Any) -> Path:
    """Write `(z, y, x[, segment])` as a DICOM SEG of a series as another program would."""
    axis = (LPS @ source.affine)[:3, 2]
    images = sorted(map(dcmread, source.files), key=lambda ds: axis @ [float(v) for v in ds.ImagePositionPatient])
    for image in images:
        for keyword in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "PatientBirthDate", "PatientSex"):
            setattr(image, keyword, "")
        # Emptied in the real series; highdicom cannot do without.
        image.SOPClassUID = image.SOPClassUID or image.file_meta.MediaStorageSOPClassUID
        image.SOPInstanceUID = image.SOPInstanceUID or image.file_meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID = image.StudyInstanceUID or "1.2"
        image.SeriesInstanceUID = image.SeriesInstanceUID or "1.3"
    algorithm = hd.AlgorithmIdentificationSequence("x", codes.DCM.ArtificialIntelligence, "1")
    description = [
        hd.seg.SegmentDescription(number, name, codes.SCT.Organ, codes.SCT.Liver, "AUTOMATIC", algorithm)
        for number, name in names.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    made = hd.seg.Segmentation(
        images, pixels, kind, description, hd.UID(), 1, hd.UID(), 1, "m", "m", "1", "1", **options
    )
    with index_closed(made):
        made.save_as(path)
    return path


@contextmanager
def index_closed(image: Any) -> Iterator[Any]:
    """Close, when done, the database of its frames that highdicom keeps in an object, which has no method for it."""
    with ExitStack() as stack:
        for value in vars(image).values():
            if isinstance(value, sqlite3.Connection):
                stack.callback(value.close)
        yield image


def written_by_pydicom(source: Any, path: Path, mask: NDArray[Any], names: dict[int, str]) -> Path:
    """Write a label map as a bare RT-STRUCT, each contour a box around a run of voxels in a row."""
    image = dcmread(source.files[0], stop_before_pixels=True)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CLASSES["RTSTRUCT"], generate_uid(), "RTSTRUCT"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = image.StudyInstanceUID, generate_uid()
    ds.StructureSetROISequence, ds.ROIContourSequence = Items(), Items()
    for index, (value, name) in enumerate(names.items(), start=11):
        region, drawn = Dataset(), Dataset()
        region.ROINumber, region.ROIName, drawn.ReferencedROINumber = index, name, index
        region.ReferencedFrameOfReferenceUID = image.FrameOfReferenceUID
        drawn.ContourSequence = Items([_contour(corners, source.affine) for corners in _boxes(mask == value)])
        ds.StructureSetROISequence.append(region)
        ds.ROIContourSequence.append(drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def _boxes(inside: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Return corners `(4, 3)` in voxels of a box around each run along the first axis."""
    steps = np.diff(np.pad(inside, ((1, 1), (0, 0), (0, 0))).astype(np.int8), axis=0)
    starts, ends = (np.argwhere(steps.transpose(2, 1, 0) == step) for step in (1, -1))
    boxes = []
    for (z, y, begin), (*_, end) in zip(starts, ends, strict=True):
        left, right, low, high = begin - 0.5, end - 0.5, y - 0.5, y + 0.5
        boxes.append(np.array([(left, low, z), (right, low, z), (right, high, z), (left, high, z)], dtype=float))
    return boxes


def _contour(corners: NDArray[np.float64], affine: NDArray[np.float64]) -> Dataset:
    vertices = np.column_stack([corners, np.ones(len(corners))]) @ (LPS @ affine).T
    contour = Dataset()
    contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(corners)
    contour.ContourData = [number(value) for value in vertices[:, :3].ravel()]
    return contour


@pytest.fixture(scope="session")
def abdomen() -> tuple[Written, NDArray[np.uint8]]:
    """A real CT series as SimpleITK reads it, and its label resampled onto it: their y axes run against each other."""
    reader = sitk.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(ABDOMEN / "ct_jpeg2000"))
    reader.SetFileNames(names)
    image = reader.Execute()
    label = sitk.ReadImage(str(ABDOMEN / "ct_jpeg2000_label.nii.gz"))
    resampled = sitk.Resample(label, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    assert sitk.GetArrayViewFromImage(image)[sitk.GetArrayViewFromImage(resampled) == 5].mean() == pytest.approx(
        89, abs=1
    )
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    values = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    series = Written(ABDOMEN / "ct_jpeg2000", [Path(name) for name in names], values, LPS @ affine, "")
    return series, sitk.GetArrayFromImage(resampled).transpose(2, 1, 0)
