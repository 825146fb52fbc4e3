"""Small images, labels and data sets on disk, for what reports are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

AFFINE = np.array([[1.5, 0.1, 0, -20], [-0.1, 1.5, 0, 11], [0, 0, 3, 5], [0, 0, 0, 1.0]])
AFFINE[:3, :2] *= 1.5 / np.hypot(1.5, 0.1)
SHAPE = (12, 14, 10)


def write_nifti(path: Path, array: NDArray[Any], affine: NDArray[Any] = AFFINE, *, qform: Any = None) -> Path:
    """Write a NIfTI file with an sform, and a qform where one is given."""
    image = nib.Nifti1Image(array, None)
    image.header.set_zooms((*np.linalg.norm(affine[:3, :3], axis=0)[: array.ndim], *[1.0] * (array.ndim - 3)))
    image.set_sform(affine, code=1)
    image.set_qform(None if qform is None else qform, code=0 if qform is None else 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-900, 1500, shape).astype(np.int16)


def ball(shape: tuple[int, ...] = SHAPE, center: float = 0.4) -> NDArray[np.uint8]:
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm((grid - np.array(shape) * center) / np.array(shape), axis=-1)
    return ((distance < 0.35).astype(np.uint8) + (distance < 0.2)).astype(np.uint8)


@pytest.fixture(scope="session")
def nifti() -> Callable[..., Path]:
    return write_nifti


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A faultless Decathlon data set of three training cases and one for validation."""
    root = tmp_path / "set"
    entries = []
    for number in range(4):
        name = f"case{number}.nii.gz"
        write_nifti(root / "imagesTr" / name, noise(number))
        write_nifti(root / "labelsTr" / name, ball(center=0.4 + 0.05 * number))
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    content = {
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "modality": {"0": "MRI"},
        "numTraining": 3,
        "training": entries[:3],
        "validation": entries[3:],
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def write_dicom(folder: Path, values: NDArray[np.int16], *, patient: str = "Secret-4711", **edits: Any) -> Path:
    """Write a CT series `(columns, rows, slices)` of 0.8 x 0.8 x 2.5 mm along the axes."""
    folder.mkdir(parents=True)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for number in range(values.shape[2]):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
        ds.PatientName, ds.PatientID = f"{patient}^Name", patient
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.Modality, ds.SeriesNumber, ds.InstanceNumber = "CT", 3, number + 1
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient, ds.PixelSpacing = [-30, -40, 2.5 * number], [0.8, 0.8]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Columns, ds.Rows = values.shape[:2]
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.PixelData = np.ascontiguousarray(values[:, :, number].T).tobytes()
        for key, value in edits.items():
            setattr(ds, key, value)
        dcmwrite(folder / f"IM{number:03d}", ds, enforce_file_format=True)
    return folder


@pytest.fixture(scope="session")
def dicom() -> Callable[..., Path]:
    return write_dicom


def kinds(report: Any, *severities: str) -> set[str]:
    return {item.kind for item in report.findings if item.severity in (severities or ("error", "warning", "note"))}


def one(report: Any, kind: str) -> Any:
    found = [item for item in report.findings if item.kind == kind]
    assert len(found) == 1, report.findings
    return found[0]


def image(root: Path, number: int = 0) -> Path:
    return root / "imagesTr" / f"case{number}.nii.gz"


def label(root: Path, number: int = 0) -> Path:
    return root / "labelsTr" / f"case{number}.nii.gz"


def edit_listing(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((root / "dataset.json").read_text())
    change(content)
    (root / "dataset.json").write_text(json.dumps(content))
