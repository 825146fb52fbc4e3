"""Label pyramids as tifffile and Pillow read them."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
from PIL import Image

from medseg.errors import CaseError, RequestError
from medseg.io import load
from medseg.io.slides.tiff_pyramid import write_label_pyramid

tifffile = pytest.importorskip("tifffile", reason="pyramids are written by tifffile, of the extra 'slides'")


def label_map(width, height, seed=0):
    return (
        np.random.default_rng(seed)
        .integers(0, 5, (width // 9 + 1, height // 9 + 1), np.uint8)
        .repeat(9, 0)
        .repeat(9, 1)[:width, :height]
    )


def strips(labels, rows):
    return (labels[:, top : top + rows] for top in range(0, labels.shape[1], rows))


@pytest.mark.parametrize("size", [(37, 50), (512, 512), (513, 1025), (1300, 700), (700, 4200)])
@pytest.mark.parametrize("rows", [16, 700])
def test_every_level_is_every_fourth_pixel_of_the_one_before(tmp_path, size, rows):
    labels = label_map(*size)
    path = write_label_pyramid(strips(labels, rows), tmp_path / "a.tif", size, microns_per_pixel=(0.5, 0.25))
    with tifffile.TiffFile(path) as file:
        (series,) = file.series
        levels = [level.asarray() for level in series.levels]
        assert series.keyframe.is_tiled
        assert [tag.value for tag in (series.keyframe.tags["XResolution"], series.keyframe.tags["YResolution"])] == [
            (20000, 1),
            (40000, 1),
        ]
    assert np.array_equal(levels[0], labels.T)
    for finer, coarser in itertools.pairwise(levels):
        assert np.array_equal(coarser, finer[::4, ::4])
    assert max(levels[-1].shape) <= 1024
    with Image.open(path) as picture:
        assert picture.n_frames == 1
        assert np.array_equal(np.asarray(picture), labels.T)
    assert np.array_equal(load(path, label=True)[0].numpy(), labels)


def test_equal_labels_are_equal_bytes_however_they_come(tmp_path):
    labels = label_map(1100, 600)
    first = write_label_pyramid(strips(labels, 600), tmp_path / "a.tif", labels.shape)
    second = write_label_pyramid(strips(labels, 7), tmp_path / "b.tif", labels.shape)
    assert first.read_bytes() == second.read_bytes()


def test_when_the_labels_break_off_no_file_is_left(tmp_path):
    def torn():
        yield label_map(1100, 600)
        raise CaseError("torn")

    with pytest.raises(CaseError, match="torn"):
        write_label_pyramid(torn(), tmp_path / "a.tif", (1100, 2000))
    assert list(tmp_path.iterdir()) == []


def test_labels_above_255_are_refused(tmp_path):
    with pytest.raises(RequestError, match="int32"):
        write_label_pyramid([np.zeros((5, 5), np.int32)], tmp_path / "a.tif", (5, 5))
    assert list(tmp_path.iterdir()) == []


def test_without_tifffile_the_extra_is_named(tmp_path, monkeypatch):
    real = importlib.import_module

    def missing(name, *rest):
        if name == "tifffile":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(RequestError, match=r"medseg\[slides\]"):
        write_label_pyramid([], tmp_path / "a.tif", (5, 5))
