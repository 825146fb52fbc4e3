"""A set that a bundle can be trained on says nothing; each way not to suit it is told, once, with both sides named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.checks.suitability import Needs
from medseg.diagnosis.doctor import examine
from tests.diagnosis.conftest import SHAPE, ball, write_nifti

NEEDS = Needs(
    name="balls",
    spatial_dims=3,
    channels=1,
    mapping={"0": 0, "1": 1, "2": 2},
    modality="MRI",
    classes={1: "shell", 2: "core"},
    spacing=(1.5, 1.5, 3.0),
)


def found(root: Path, needs: Needs) -> list[tuple[str, str, str]]:
    return [(item.severity, item.kind, item.message) for item in examine(root, needs=needs).findings]


def edit(root: Path, **changes: Any) -> None:
    content = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**content, **changes}))


def test_a_set_that_suits_has_no_findings(dataset: Path) -> None:
    assert found(dataset, NEEDS) == []
    assert found(dataset, replace(NEEDS, mapping=None, spacing=None)) == []


@pytest.mark.parametrize(
    ("spacing", "orientation", "says"),
    [
        ((1.5, 1.5, 1.5), "RAS", "1.5 x 1.5 x 3 mm (RAS), but balls uses 1.5 x 1.5 x 1.5 mm: upsampling adds"),
        ((3.0, 1.5, 1.5), "SAR", ""),
        ((3.0, 1.5, 1.5), "RAS", "1.5 x 1.5 x 3 mm (RAS), but balls uses 3 x 1.5 x 1.5 mm"),
        ((1.5, 4.5, 3.0), "LPS", "finer detail is lost"),
        ((2.9, 2.9, 3.0), "RAS", ""),
    ],
)
def test_spacing_is_compared_along_the_same_axes(
    dataset: Path, spacing: tuple[float, ...], orientation: str, says: str
) -> None:
    findings = found(dataset, replace(NEEDS, spacing=spacing, orientation=orientation))
    assert {(severity, kind) for severity, kind, _ in findings} == (
        {("warning", "spacing mismatch")} if says else set()
    )
    assert len(findings) == (4 if says else 0)
    assert all(says in message for _, _, message in findings)


def _swap_names(root: Path) -> None:
    edit(root, labels={"0": "background", "1": "Core", "2": "shell"})


def _call_it_ct(root: Path) -> None:
    edit(root, modality={"0": "CT"})


def _empty_the_cores(root: Path) -> None:
    for number in range(3):
        label = np.minimum(ball(center=0.4 + 0.05 * number), 1)
        write_nifti(root / "labelsTr" / f"case{number}.nii.gz", label)


def _rename(root: Path) -> None:
    edit(root, labels={"0": "background", "1": "rind", "2": "core"})


@pytest.mark.parametrize(
    ("spoil", "severity", "kind", "says"),
    [
        (_swap_names, "error", "label order", "names the label 1 'Core', but balls uses 1 for 'shell'"),
        (_call_it_ct, "error", "modality mismatch", "dataset.json states CT, but balls is made for MRI"),
        (_empty_the_cores, "warning", "missing class", "No training case contains the class 'core' of balls"),
        (_rename, "note", "label names", "balls uses the label 1 ('rind') as 'shell'"),
    ],
)
def test_each_way_not_to_suit_is_told(
    dataset: Path, spoil: Callable[[Path], None], severity: str, kind: str, says: str
) -> None:
    spoil(dataset)
    findings = found(dataset, NEEDS)
    assert {item[:2] for item in findings} == {(severity, kind)}
    assert says in findings[0][2]


@pytest.mark.parametrize(
    ("window", "says"),
    [((-1000.0, 1000.0), ""), ((2000.0, 3000.0), "are below 2000"), ((-3000.0, -2000.0), "are above -2000")],
)
def test_a_window_that_shows_nothing_is_told(dataset: Path, window: tuple[float, float], says: str) -> None:
    findings = found(dataset, replace(NEEDS, intensity_range=window))
    assert {kind for _, kind, _ in findings} == ({"outside the window"} if says else set())
    assert all(says in message for _, _, message in findings)


def test_names_count_by_the_class_that_the_mapping_gives(dataset: Path) -> None:
    """The files number the classes otherwise, and the mapping of the bundle knows it."""
    edit(dataset, labels={"0": "background", "1": "kidney_left", "2": "rest"})
    kidneys = replace(NEEDS, mapping={"0": 0, "1": 2, "2": 0}, classes={2: "left kidney"})
    assert found(dataset, kidneys) == []
    wrong = found(dataset, replace(kidneys, mapping={"0": 0, "1": 0, "2": 2}))
    assert ("error", "label order") in {item[:2] for item in wrong}
    assert "uses 1 for 'background'" in wrong[0][2]


def test_a_mapping_that_takes_any_value_misses_none(dataset: Path) -> None:
    objects = replace(NEEDS, mapping={"0": 0, "other": 1}, classes={1: "ball"})
    assert {item[:2] for item in found(dataset, objects)} == {("note", "label names")}
    write_nifti(dataset / "labelsTr" / "case0.nii.gz", np.zeros(SHAPE, np.uint8))
    assert "missing class" not in {kind for _, kind, _ in found(dataset, objects)}
