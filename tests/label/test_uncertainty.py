"""How unsure a network is, on numbers that are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from medseg.bundle.catalog import Bundle
from medseg.errors import CaseError
from medseg.label.predictor import Predictor
from medseg.label.served_bundles import find_served_bundles
from medseg.label.uncertainty import mean_entropy


def _voxels(*rows: list[float]) -> torch.Tensor:
    """Probabilities `(1, K, voxels, 1)`, one row for each voxel."""
    return torch.tensor(rows).T[None, :, :, None]


def test_sure_predictions_have_no_entropy_and_even_ones_have_all() -> None:
    assert mean_entropy(_voxels([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]), "softmax") == 0
    assert mean_entropy(_voxels([1 / 3] * 3), "softmax") == pytest.approx(1)
    assert mean_entropy(_voxels([0.0], [1.0]), "sigmoid") == 0
    assert mean_entropy(_voxels([0.5, 0.5]), "sigmoid") == pytest.approx(1)


def test_a_voxel_counts_by_its_entropy_in_shares_of_the_largest() -> None:
    expected = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3)) / math.log(2)
    assert mean_entropy(_voxels([0.7, 0.3]), "softmax") == pytest.approx(expected)
    assert mean_entropy(_voxels([0.3]), "sigmoid") == pytest.approx(expected)


def test_background_does_not_dilute() -> None:
    unsure = [[0.5, 0.5]]
    assert mean_entropy(_voxels(*unsure, *[[1.0, 0.0]] * 9), "softmax") == pytest.approx(1)
    assert mean_entropy(_voxels(*[[1.0, 0.0]] * 9), "softmax") == 0


@pytest.fixture
def predictor(trained: Bundle, tmp_path: Path) -> Predictor:
    served = find_served_bundles(tmp_path / "tuned", folders=[trained.root]).served[trained.name]
    return Predictor(served, tmp_path / "results")


@pytest.fixture
def known(tiny_data: Path) -> Path:
    """An image that the network was trained on."""
    return sorted((tiny_data / "imagesTr").iterdir())[0]


def test_a_trained_network_is_less_sure_of_noise_than_of_what_it_knows(
    predictor: Predictor, known: Path, tmp_path: Path
) -> None:
    import nibabel
    import numpy as np

    loaded = nibabel.load(known)
    noise = np.random.default_rng(0).normal(100, 40, loaded.shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(noise, loaded.affine), tmp_path / "noise.nii.gz")
    values = [predictor.uncertainty(path) for path in (known, tmp_path / "noise.nii.gz")]
    assert all(0 <= value <= 1 for value in values)
    assert values[0] < values[1]
    assert predictor.uncertainty(known) == values[0]


def test_an_image_that_cannot_be_measured_is_told_and_does_not_spoil_the_next(
    predictor: Predictor, known: Path, tmp_path: Path
) -> None:
    from PIL import Image

    before = predictor.uncertainty(known)
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "torn.nii.gz").write_bytes(known.read_bytes()[:2000])
    for name in ("picture.png", "torn.nii.gz"):
        with pytest.raises(CaseError, match=name):
            predictor.uncertainty(tmp_path / name)
    assert predictor.uncertainty(known) == before
