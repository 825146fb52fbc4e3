"""Saved labels as MONAI Label's store tells of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from medseg.errors import RequestError
from medseg.io.dicom.seg import write_seg
from medseg.label.annotations import read_annotation
from medseg.label.records import annotations_of, on_the_series
from tests.io.dicom.conftest import make_series

SEG = "1.2.3.99"


class _Store:
    """The part of a store that is asked, in MONAI Label's form."""

    def __init__(self, root: Path, objects: dict[str, dict[str, Any]]) -> None:
        self.root = root
        self.objects = objects

    def datalist(self) -> list[dict[str, str]]:
        final = [(name, entry) for name, entry in self.objects.items() if "final" in entry["labels"]]
        folder = self.root / "labels" / "final"
        return [
            {
                "image": str((self.root / f"{name}{entry['image']['ext']}").resolve()),
                "label": str(folder / f"{name}{entry['labels']['final']['ext']}"),
            }
            for name, entry in final
        ]

    def json(self) -> dict[str, Any]:
        return {"objects": self.objects}

    def get_label_info(self, name: str, tag: str) -> dict[str, Any]:
        label = self.objects.get(name, {}).get("labels", {}).get(tag)
        return label["info"] if label else {}


def _object(info: dict[str, Any] | None) -> dict[str, Any]:
    labels = {} if info is None else {"final": {"ext": ".nii.gz", "info": info}}
    return {"image": {"ext": ".nii.gz", "info": {}}, "labels": labels}


def test_images_that_are_links_are_called_by_their_ids_and_keep_the_names_of_their_segments(tmp_path: Path) -> None:
    info = [{"name": "posterior", "idx": 1}]
    store = _Store(tmp_path, {"a": _object(None), "b": _object({"label_info": info}), "c": _object({})})
    for name in "abc":
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "elsewhere" / name / "image.nii.gz").touch()
        (tmp_path / f"{name}.nii.gz").symlink_to(tmp_path / "elsewhere" / name / "image.nii.gz")
    found = annotations_of(store)
    assert [(each.name, list(each.info)) for each in found] == [("b", info), ("c", [])]
    assert found[0].image.parent.name == "b"
    assert found[1].label == tmp_path / "labels" / "final" / "c.nii.gz"


def test_a_store_that_changes_meanwhile_is_asked_again(tmp_path: Path) -> None:
    store = _Store(tmp_path, {"a": _object({}), "b": _object({})})
    answers = iter([{"objects": {}}, store.json()])
    store.json = lambda: next(answers)  # type: ignore[method-assign]
    assert [each.name for each in annotations_of(store)] == ["a", "b"]
    store.json = lambda: {"objects": {}}  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="try again"):
        annotations_of(store)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache of a store: a series, whose folder is called by its UID."""
    make_series(tmp_path / "1.2.3.4", uid="1.2.3.4", shape=(7, 5, 6))
    return tmp_path


def _segmentation(cache: Path, mask: NDArray[Any], labels: dict[int, str]) -> Path:
    folder = cache / "labels" / "final" / SEG
    folder.mkdir(parents=True)
    write_seg(mask, folder / "1.dcm", cache / "1.2.3.4", labels=labels)
    return folder


def _never(folder: str, is_seg: bool = False) -> str | None:
    raise AssertionError(folder)


def test_a_segmentation_without_its_empty_frames_lies_on_the_whole_series(cache: Path) -> None:
    mask = np.zeros((7, 5, 6), np.uint8)
    mask[2:5, 1:3, 2] = 1
    mask[2:5, 1:3, 3] = 2
    folder = _segmentation(cache, mask, {1: "anterior", 2: "posterior"})
    assert pydicom.dcmread(folder / "1.dcm").NumberOfFrames == 2
    file = on_the_series(_never)(str(folder), is_seg=True)
    assert file is not None
    label = cache / "labels" / "final" / "1.2.3.4.nrrd"
    Path(file).rename(label)
    entry = {
        "image": {"ext": "", "info": {}},
        "labels": {"final": {"ext": ".nrrd", "info": {"SeriesInstanceUID": SEG}}},
    }
    (annotation,) = annotations_of(_Store(cache, {"1.2.3.4": entry}))
    assert (read_annotation(annotation, {"anterior": 1, "posterior": 2}) == mask).all()
    assert (read_annotation(annotation, {"anterior": 2, "posterior": 1}) == np.array([0, 2, 1])[mask]).all()


def test_a_segmentation_that_cannot_be_read_is_left_out_with_the_reason(cache: Path, caplog) -> None:
    folder = _segmentation(cache, np.ones((7, 5, 6), np.uint8), {1: "anterior"})
    content = (folder / "1.dcm").read_bytes()
    (folder / "1.dcm").write_bytes(content[: len(content) // 2])
    assert on_the_series(_never)(str(folder), is_seg=True) is None
    assert "skipped a DICOM SEG" in caplog.text


def _without_its_series(dataset: pydicom.Dataset) -> None:
    del dataset.ReferencedSeriesSequence


def _of_a_series_elsewhere(dataset: pydicom.Dataset) -> None:
    with pydicom.config.disable_value_validation():
        dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = "../../1.2.3.4"


@pytest.mark.parametrize("spoil", [_without_its_series, _of_a_series_elsewhere])
def test_a_segmentation_of_no_known_series_is_left_out_too(cache: Path, caplog, spoil) -> None:
    file = _segmentation(cache, np.ones((7, 5, 6), np.uint8), {1: "anterior"}) / "1.dcm"
    dataset = pydicom.dcmread(file)
    spoil(dataset)
    dataset.save_as(file)
    assert on_the_series(_never)(str(file.parent), is_seg=True) is None
    assert "skipped a DICOM SEG" in caplog.text


def test_images_are_converted_as_before() -> None:
    assert on_the_series(lambda folder, is_seg=False: f"{folder} {is_seg}")("series") == "series False"
