"""What holds of SEG and RT-STRUCT alike when they are written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from medseg.errors import CaseError, GeometryError, OutputError, RequestError
from medseg.io import load_label, read_grid
from medseg.io.dicom.rtstruct import write_rtstruct
from medseg.io.dicom.seg import write_seg
from tests.io.dicom.conftest import LABELS, WHEN, random_mask

VALUES = {name.upper(): value for value, name in LABELS.items()}

pytestmark = pytest.mark.parametrize("write", [write_seg, write_rtstruct])


@pytest.fixture
def source(write_series: Callable[..., Any], tmp_path: Path) -> Any:
    return write_series(tmp_path / "ct", shape=(9, 8, 5))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5)),
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 4)] * 3),
    seed=st.integers(0, 99),
)
def test_on_any_oblique_series_a_mask_comes_back_exactly(
    write_series: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, write, shape, angles, spacing, seed
) -> None:
    assume(write is write_rtstruct or shape[0] * shape[1] >= 8)  # what highdicom can pack
    folder = tmp_path_factory.mktemp("oblique")
    source = write_series(folder / "ct", shape=shape, angles=angles, spacing=spacing, seed=seed)
    mask = np.random.default_rng(seed).choice([0, 2, 4, 7], shape)
    path = write(mask, folder / "object.dcm", source.folder, labels=LABELS)
    back = load_label(path, like=source.folder, names=VALUES)
    assert np.array_equal(back[0].numpy(), mask)
    assert np.array_equal(back.affine, read_grid(source.folder).affine)


def test_the_patient_goes_into_the_object_and_nowhere_else(
    write_series: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, write: Any
) -> None:
    def edit(ds: Dataset, _: int) -> None:
        ds.SpecificCharacterSet = "ISO_IR 100"
        ds.PatientName, ds.PatientAge, ds.PatientSex = "Sécret one without carets", "042Y", "O"

    source = write_series(tmp_path / "ct", edit=edit)
    mask = random_mask(source.values.shape)
    with caplog.at_level(logging.DEBUG):
        path = write(mask, tmp_path / "object.dcm", source.folder, labels={**LABELS, 4: "背景"})
    dataset = pydicom.dcmread(path)
    assert str(dataset.PatientName) == "Sécret one without carets"
    assert (dataset.PatientID, dataset.PatientAge, dataset.PatientSex) == ("Secret-4711", "042Y", "O")
    assert np.array_equal(load_label(path, like=source.folder, names={"背景": 1})[0].numpy(), mask == 4)
    assert "cret" not in caplog.text
    assert "4711" not in caplog.text


def test_equal_masks_give_equal_bytes_and_other_masks_other_objects(source: Any, tmp_path: Path, write: Any) -> None:
    def written(name: str, mask: Any, **options: Any) -> Path:
        path: Path = write(mask, tmp_path / name, source.folder, labels=LABELS, **options)
        return path

    mask = random_mask(source.values.shape)
    first, again, later = (written("a", mask, created=WHEN), written("b", mask, created=WHEN), written("c", mask))
    assert again.read_bytes() == first.read_bytes()
    mask[0, 0, 1] = 2 if mask[0, 0, 1] != 2 else 4
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in (first, written("d", mask, created=WHEN), later)]
    assert uids[0] == uids[2] != uids[1]


@pytest.mark.parametrize(
    ("mask", "labels", "error", "told"),
    [
        (lambda shape: np.full(shape, 3), LABELS, CaseError, "values without a label: 3"),
        (lambda shape: np.full(shape, 0.5), LABELS, CaseError, "values without a label: 0.5"),
        (lambda shape: np.full(shape, -1), LABELS, CaseError, "values without a label: -1"),
        (lambda shape: np.zeros(shape[::-1]), LABELS, GeometryError, r"has shape \(5, 8, 9\)"),
        (np.zeros, {}, RequestError, "one or more"),
        (np.zeros, {0: "background"}, RequestError, "from 1 to 65535"),
        (np.zeros, {1: ""}, RequestError, "Invalid DICOM text"),
        (np.zeros, {1: "a\\b"}, RequestError, "Invalid DICOM text"),
    ],
)
def test_masks_and_labels_that_do_not_fit_are_refused_and_nothing_is_written(
    source: Any, tmp_path: Path, write: Any, mask: Any, labels: Any, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        write(mask(source.values.shape), tmp_path / "out" / "object.dcm", source.folder, labels=labels)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_an_output_error(source: Any, tmp_path: Path, write: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write(np.zeros(source.values.shape), tmp_path / "file" / "object.dcm", source.folder, labels=LABELS)
